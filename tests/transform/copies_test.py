"""A step copies no array as large as an output's gradient, whatever the method.

The compiler for CPUs lays a product that sums over two axes out anew: the gradient of
``b`` then begins with a transposed copy of all of dY.
"""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import CLOSE, distance, numbers, perturb
from contract_toolbox import METHODS, make, nodes, replaces_kernel
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxpeft as jp
from benchmarks.hlo import parse
from jaxpeft.numerics import target_of

B, T, D, F, V = 5, 7, 32, 48, 19  # no product of some is one of others
AXES = {"heads": "in out out", "stack": "layer in out"}
SITES = ["one", "two", "heads", "stack"]


def params():
    shapes = {
        "one": (D, F),
        "two": (D, F),
        "heads": (D, 6, F // 6),
        "stack": (2, F, F),
    }
    tree = {
        name: {"kernel": numbers(*shape, seed=i, scale=D**-0.5)}
        for i, (name, shape) in enumerate(shapes.items())
    }
    for name, shape in shapes.items():
        tree[name]["bias"] = numbers(2, F) if name == "stack" else numbers(*shape[1:])
    return tree


def net(params, x):
    """Two kernels of one input, one with heads, a scanned stack; rows of tokens."""

    def use(equation, x, p):
        y = jnp.einsum(equation, x, p["kernel"])
        return jnp.tanh(y + jnp.broadcast_to(p["bias"], y.shape))

    one, two = (use("btd,df->btf", x, params[n]) for n in ("one", "two"))
    heads = use("btd,dhe->bthe", x, params["heads"]).reshape(one.shape)
    layer = lambda y, p: (use("btf,fg->btg", y, p), None)
    return lax.scan(layer, one * two + heads, params["stack"])[0]


def copied(fn, *args) -> collections.Counter:
    """Copies and transposes of arrays as large as an output or an input.

    Not those of what goes around a loop: they copy an array as it lies.
    """
    text = jax.jit(fn).lower(*args).compile().as_text()
    large = {B * T * F, B * T * D}
    return collections.Counter(
        (op, shape)
        for lines in parse(text)[0].values()
        for _, shape, op, rest in lines
        if op in ("copy", "transpose") and shape and math.prod(shape) in large
        if not rest.startswith("%get-tuple-element")
    )


def gradients(target=None):
    """Those of a sum of squares, for the trainable leaves and the input."""
    forward = jp.adapt(net, target=target)
    loss = lambda t, x, f: jnp.sum(forward(jp.combine(t, f), x) ** 2)
    return jax.grad(loss, (0, 1))


@functools.cache
def own_copies():
    """Those of the frozen model itself, forward and back to its input."""
    loss = lambda x, p: jnp.sum(net(p, x) ** 2)
    return copied(jax.grad(loss), numbers(B, T, D, seed=9), params())


def attached(name, **options):
    attach = lambda p, k: jp.attach(p, make(name, **options), SITES, key=k, axes=AXES)
    return perturb(jax.jit(attach)(params(), jax.random.key(1)), scale=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_copies_no_output_or_its_gradient(name):
    trainable, frozen = jp.partition(attached(name))
    args = trainable, numbers(B, T, D, seed=9), frozen
    more = copied(gradients(), *args) - own_copies()
    # Where the kernel itself learns, dW is the model's own product, as it wrote it.
    learns = any(
        replaces_kernel(node) and node.site.path.endswith("kernel")
        for node in nodes(jp.combine(trainable, frozen))
    )
    assert bool(more) == learns, more


def test_the_search_finds_what_other_targets_leave_to_their_compilers():
    trainable, frozen = jp.partition(attached("lora"))
    args = trainable, numbers(B, T, D, seed=9), frozen
    assert copied(gradients("tpu"), *args) - own_copies()
    here, there = (jax.jit(gradients(t))(*args) for t in ("cpu", "tpu"))
    assert distance(here, there) < CLOSE


def test_dropout_adds_no_copy():
    dropping = jp.with_dropout(attached("lora", dropout=0.5), jax.random.key(3))
    trainable, frozen = jp.partition(dropping)
    args = trainable, numbers(B, T, D, seed=9), frozen
    assert not copied(gradients(), *args) - own_copies()


def upright(target, rank):
    """How many products are a gradient of ``a [128, rank]``, row by row."""
    kernel = {"kernel": numbers(128, 96, scale=0.1)}
    tree = jp.attach({"q": kernel}, jp.lora(rank), ["q"], key=jax.random.key(0))
    trainable, frozen = jp.partition(tree)
    forward = jp.adapt(lambda p, x: x @ p["q"]["kernel"], target=target)
    loss = lambda t, f, x: jnp.sum(forward(jp.combine(t, f), x) ** 2)
    args = trainable, frozen, numbers(B, T, 128)
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    return len(re.findall(rf"= f32\[128,{rank}\]\{{1,0\}} dot\(", text))


def test_the_gradient_of_a_tall_factor_is_a_wide_product():
    """Rows of ``d_in`` numbers, not of ``r``: products of few columns are slow."""
    assert upright("cpu", 4) == 0
    assert upright("tpu", 4) == 1  # as the compiler has it
    assert upright("cpu", 64) == 1  # not tall


def test_a_look_up_copies_nothing():
    table, ids = {"table": numbers(V, F, seed=3)}, jnp.arange(B * T).reshape(B, T) % V
    adapted = jp.attach(table, jp.lora(rank=3), ["table"], key=jax.random.key(0))
    trainable, frozen = jp.partition(perturb(adapted))
    forward = jp.adapt(lambda p, ids: p["table"][ids])
    loss = lambda t, f: jnp.sum(forward(jp.combine(t, f), ids) ** 2)
    assert not copied(jax.grad(loss), trainable, frozen)


def test_the_target_is_that_of_the_arrays(monkeypatch):
    """A host that compiles for another machine does not decide."""
    assert target_of(numbers(2)) == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert target_of({"x": numbers(2)}) == "cpu"
    found = []
    jax.eval_shape(lambda x: found.append(target_of(x)), numbers(2))
    assert found == ["tpu"]  # nothing else is known
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    lying = jax.ShapeDtypeStruct(
        (2,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    jax.jit(lambda x: found.append(target_of(x))).lower(lying)
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda: found.append(target_of(())))
    assert found[1:] == ["cpu", "cpu"]


def test_an_unknown_target_is_refused():
    with pytest.raises((ValueError, TypeError), match="target"):
        jp.adapt(net, target="cuda")
