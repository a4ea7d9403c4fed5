"""The contract suite goes on: beside an adapter of another name on the same kernels.

Changes of one kernel are added up. What cannot be added up (scales of a kernel's inputs
or outputs, a kernel that is trained whole, a change that is folded into it) is refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxpeft import adapters, interop
from jaxpeft.console import optional
from jaxpeft.testing._compare import CLOSE, FAR, distance, numbers, perturb
from jaxpeft.testing._fixtures import params as params
from jaxpeft.testing._net import (
    AXES,
    RANK,
    D,
    F,
    accepts,
    make,
    make_params,
    nodes,
    same_bits,
)
from jaxpeft.transform import adapt
from jaxpeft.tree import (
    attach,
    combine,
    count,
    detach,
    extract,
    flat,
    graft,
    lifted_factors,
    merge,
    mergeable,
    partition,
    penalty,
    with_dropout,
)

with optional("Contract tests"):
    import pytest

NAME = "other"
TARGETS = ["dense", "heads", "up"]  # a plain kernel, one with heads, and a stack
DROPOUT = {"dropout": 0.5}  # on under a key alone


@pytest.fixture
def inputs():
    return numbers(8, D, seed=9), numbers(8, F, seed=10)


def each(params, x, wide):
    """What every kernel and bias makes of one input: there, changes add up."""
    dense, heads, up = params["dense"], params["heads"], params["layers"]["up"]
    layer = lambda carry, p: (carry, x @ p["kernel"] + p["bias"][None])
    return {
        "dense": x @ dense["kernel"] + dense["bias"][None],
        "heads": jnp.einsum("tf,fhe->the", wide, heads["kernel"]) + heads["bias"][None],
        "up": lax.scan(layer, None, up)[1],
    }


def put(adapter, name="default"):
    return lambda params, key: attach(
        params, adapter, TARGETS, key=key, axes=AXES, name=name
    )


@functools.cache
def first_alone():
    start = jax.jit(put(adapters.lora(rank=RANK, **DROPOUT)))
    return start(make_params(), jax.random.key(3))


@functools.cache
def alone_of(name):
    """The method by itself: shapes, and its structure."""
    adapter = make(name, **(DROPOUT if accepts(name, *DROPOUT) else {}))
    return adapter, jax.eval_shape(put(adapter), make_params(), jax.random.key(0))


@functools.cache
def beside(name):
    """The method under its name beside a LoRA, or ``None`` once it is refused."""
    adapter, alone = alone_of(name)
    taken = {node.site.path for node in nodes(first_alone())}
    meet = [node for node in nodes(alone) if node.site.path in taken]
    add = lambda: jax.jit(put(adapter, NAME))(first_alone(), jax.random.key(4))
    if all(map(only_adds, meet)):
        return add()
    with pytest.raises(ValueError, match=f"'{NAME}', '{name}'.*cannot share a kernel"):
        add()
    return None


def only_adds(node):
    """Whether all that the method does to a kernel is to add thin products."""
    factors = jax.eval_shape(lifted_factors, node)
    rest = factors.c, factors.o, factors.kernel, node.adapter.folded
    return node.adapter.where.leaf == "kernel" and all(r is None for r in rest)


def test_beside_another_both_train(name, params, inputs):
    if (start := beside(name)) is None:
        return
    trainable, frozen = partition(start)
    same_bits(combine(trainable, frozen), start)
    optimizer, values = optax.adam(1e-2), []

    def loss(trainable, frozen):
        tree = combine(trainable, frozen)
        squares = jax.tree.map(lambda y: jnp.mean(y**2), adapt(each)(tree, *inputs))
        return sum(jax.tree.leaves(squares)) + penalty(tree)

    @jax.jit
    def step(trainable, frozen, state):
        value, gradient = jax.value_and_grad(loss)(trainable, frozen)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, before = jax.jit(optimizer.init)(trainable), flat(trainable)
    for _ in range(3):
        trainable, state, value = step(trainable, frozen, state)
        values.append(float(value))
    assert values[-1] < values[0]
    for path, leaf in flat(trainable).items():
        assert not np.array_equal(leaf, before[path]), f"{path} stays"
    same_bits(detach(combine(trainable, frozen)), params)


def test_beside_another_it_is_saved_and_taken_off(name, params, tmp_path):
    if (start := beside(name)) is None:
        return
    tree = perturb(start, scale=0.1)
    folder = interop.save_adapter(tree, tmp_path / "both")
    same_bits(interop.load_adapter(folder, params), tree)
    first = graft(params, extract(tree, "default"))
    folder = interop.save_adapter(tree, tmp_path / "one", name=NAME)
    same_bits(interop.load_adapter(folder, first), tree)
    # Each comes off as if it sat there alone, and goes back.
    alone = graft(params, extract(tree, NAME))
    assert jax.tree.structure(first) == jax.tree.structure(first_alone())
    assert jax.tree.structure(alone) == jax.tree.structure(alone_of(name)[1])
    same_bits(graft(first, extract(tree, NAME), name=NAME), tree)
    assert count(tree)[0] == count(first)[0] + count(alone)[0]


def test_beside_another_changes_add_up_and_dropout_is_its_own(name, params, inputs):
    if (start := beside(name)) is None:
        return
    tree = perturb(start, scale=0.1)
    first, alone = (graft(params, extract(tree, n)) for n in ("default", NAME))
    trees = {
        "both": tree,
        "first": first,
        "other": graft(params, extract(tree, NAME), name=NAME),
        "alone": alone,  # under the name that the first has
    }

    @jax.jit
    def run(trees, key):
        on = {n: adapt(each)(with_dropout(t, key), *inputs) for n, t in trees.items()}
        off = {n: adapt(each)(t, *inputs) for n, t in trees.items() if n != "other"}
        merged = each(merge(tree), *inputs) if mergeable(tree) else off["both"]
        return on, off, merged, {n: penalty(t) for n, t in trees.items()}

    on, off, merged, penalties = run(trees, jax.random.key(5))
    base = each(params, *inputs)
    change = lambda y: jax.tree.map(np.subtract, y, base)
    add = lambda y, z: jax.tree.map(np.add, change(y), change(z))
    assert distance(change(off["both"]), add(off["first"], off["alone"])) < CLOSE
    assert distance(change(on["both"]), add(on["first"], on["other"])) < CLOSE
    for n in ("first", "other"):  # neither of them is nothing
        assert distance(change(on[n]), change(on["both"])) > FAR
    # The same key drops other entries for another name.
    apart = distance(change(on["other"]), change(on["alone"]))
    assert apart > FAR if accepts(name, *DROPOUT) else apart < CLOSE
    assert mergeable(tree) == mergeable(alone)
    assert distance(off["both"], merged) < CLOSE
    expected = penalties["first"] + penalties["alone"]
    np.testing.assert_allclose(penalties["both"], expected, rtol=1e-6)
