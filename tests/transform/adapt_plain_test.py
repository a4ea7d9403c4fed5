"""``adapt`` through plain JAX functions: each way a weight can reach its matmul."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import (
    CLOSE,
    check,
    distance,
    everything,
    gate,
    gated,
    input_scale,
    numbers,
    output_scale,
    pair,
    prepare,
    run_with_gradients,
)
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft as jp

P = PartitionSpec
D, F, L, E = 12, 20, 3, 4
ADAPTERS = pytest.mark.parametrize(
    "adapter", [pair(), output_scale(), input_scale(), everything()], ids=str
)


@pytest.fixture
def x():
    return numbers(5, D)


@pytest.fixture
def w():
    return numbers(D, F, seed=1, scale=0.3)


@jax.custom_vjp
def leaky(x):
    return jnp.where(x > 0, x, 0.1 * x)


leaky.defvjp(lambda x: (leaky(x), x), lambda x, g: (jnp.where(x > 0, g, 0.1 * g),))


@jax.custom_jvp
def soft(x):
    return jnp.log1p(jnp.exp(x))


soft.defjvp(lambda p, t: (soft(p[0]), jax.nn.sigmoid(p[0]) * t[0]))


def mesh(*names):
    shape = (2,) * len(names)
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape, names, auto, devices=jax.devices()[: 2 ** len(names)])


# name: (fn(params, x), shape of the weight, roles)
MODELS = {
    "matmul": (lambda p, x: x @ p["w"], (D, F), "in out"),
    "left operand": (lambda p, x: p["w"].T @ x.T, (D, F), "in out"),
    "transposed, [out, in]": (lambda p, x: x @ p["w"].T, (F, D), "out in"),
    "vector input": (lambda p, x: x[0] @ p["w"], (D, F), "in out"),
    "einsum": (lambda p, x: jnp.einsum("td,df->ft", x, p["w"]), (D, F), "in out"),
    "einsum, many axes": (
        lambda p, x: jnp.einsum("tab,hbca->thc", x.reshape(5, 3, 4), p["w"]),
        (4, 4, 5, 3),
        "out in out in",
    ),
    "reshape joins out": (
        lambda p, x: x @ p["w"].reshape(D, F),
        (D, 4, 5),
        "in out out",
    ),
    "reshape joins in": (
        lambda p, x: x @ p["w"].reshape(D, F),
        (3, 4, F),
        "in in out",
    ),
    "reshape splits": (
        lambda p, x: jnp.einsum("td,dhe->the", x, p["w"].reshape(D, 4, 5)),
        (D, F),
        "in out",
    ),
    "columns": (lambda p, x: x @ p["w"][:, 2:9], (D, F), "in out"),
    "rows": (lambda p, x: x[:, :7] @ p["w"][:7], (D, F), "in out"),
    "every second": (lambda p, x: x @ p["w"][:, ::2], (D, F), "in out"),
    "split": (
        lambda p, x: jnp.tanh(x @ jnp.split(p["w"], [8], 1)[0])
        * (x @ jnp.split(p["w"], [8, 16], 1)[1]),
        (D, F),
        "in out",
    ),
    "times a scalar": (lambda p, x: x @ (p["w"] * 0.3), (D, F), "in out"),
    "scalar times": (lambda p, x: x @ (p["s"] * p["w"]), (D, F), "in out"),
    "over a scalar": (lambda p, x: x @ (p["w"] / 3.0), (D, F), "in out"),
    "jit inside": (
        lambda p, x: jax.jit(lambda w, x: x @ w)(p["w"], x),
        (D, F),
        "in out",
    ),
    "checkpoint_name": (
        lambda p, x: x @ checkpoint_name(p["w"], "weight"),
        (D, F),
        "in out",
    ),
    "optimisation barrier": (
        lambda p, x: x @ lax.optimization_barrier(p["w"]),
        (D, F),
        "in out",
    ),
    "custom_vjp activation": (lambda p, x: leaky(x @ p["w"]), (D, F), "in out"),
    "custom_jvp activation": (lambda p, x: soft(x @ p["w"]), (D, F), "in out"),
    "cond": (
        lambda p, x: lax.cond(
            x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: -jnp.sin(x) @ w, p["w"], x
        ),
        (D, F),
        "in out",
    ),
    "switch on a closure": (
        lambda p, x: lax.switch(
            1 + (x[0, 0] > 0).astype(jnp.int32),
            [lambda: jnp.zeros((5, F)), lambda: x @ p["w"], lambda: 2.0 * x @ p["w"]],
        ),
        (D, F),
        "in out",
    ),
    "used twice": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        (D, F),
        "in out",
    ),
    "squeeze": (lambda p, x: x @ p["w"][0], (1, D, F), "layer in out"),
    "expand": (
        lambda p, x: (x[None] @ p["w"][None])[0],
        (D, F),
        "in out",
    ),
    "look-up": (
        lambda p, x: jnp.tanh(p["w"][jnp.asarray([[1, 2], [11, 1]])]),
        (D, F),
        "in out",
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(1, 5, 3, 4), p["w"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        (3, 2, 4, 7),
        "in in in out",
    ),
}  # fmt: skip
# What a model does to its own weight, without an adapter too. (The residuals of a
# cond are those of all branches: zeros where a branch has none.)
OWN = {
    "scalar": ("multiply", "divide", "broadcast"),
    "convolution": ("reverse",),
    "closure": ("broadcast",),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name, x, keys):
    fn, shape, roles = MODELS[name]
    adapter = everything()
    if name == "convolution":  # an input scale has no convolution form
        adapter = pair()
    allow = next((ops for key, ops in OWN.items() if key in name), ())
    check(
        fn,
        {"w": numbers(*shape, seed=1, scale=0.3), "s": jnp.float32(0.3)},
        x,
        sites={"w": roles},
        keys=keys,
        adapter=adapter,
        allow=allow,
    )


@ADAPTERS
@pytest.mark.parametrize("name", ["matmul", "transposed, [out, in]", "columns"])
def test_each_term_of_the_formula_alone(name, adapter, x, keys):
    fn, shape, roles = MODELS[name]
    w = numbers(*shape, seed=1, scale=0.3)
    check(fn, {"w": w}, x, sites={"w": roles}, keys=keys, adapter=adapter)


def test_a_weight_used_against_its_roles_in_out(x, w, keys):
    """``x @ w.T`` of a kernel whose adapter was made for ``x @ w``."""
    x = numbers(5, F)
    fn = lambda p, x: x @ p["w"].T
    sites, inferred = {"w": "in out"}, {"w": "out in"}
    check(fn, {"w": w}, x, sites=sites, inferred=inferred, keys=keys)


def test_a_gate_in_all_positions(x, w, keys):
    adapted = prepare({"w": w}, gated(), ["w"], keys)
    leaf = adapted["w"].trainable
    expected = x @ w + gate(x @ leaf["router"], x @ leaf["a"]) @ leaf["b"]
    right = jp.adapt(lambda p, x: x @ p["w"])(adapted, x)
    left = jp.adapt(lambda p, x: jnp.einsum("df,td->ft", p["w"], x))(adapted, x).T
    high = jp.adapt(lambda p, x: x[None, :, None] @ p["w"])(adapted, x)[0, :, 0]
    for y in (right, left, high):
        assert distance(y, expected) < CLOSE
    assert not jp.mergeable(adapted)
    with pytest.raises(ValueError, match="depends on the input"):
        jp.merge(adapted)


def test_stop_gradient_stops_the_base_alone(x, w, keys):
    """A model that freezes its own weight does not freeze the adapter on it."""
    adapted = prepare({"w": w}, everything(), ["w"], keys)
    stopped = lambda p, x: x @ lax.stop_gradient(p["w"])
    free = lambda p, x: x @ p["w"]
    got, got_grads, _ = run_with_gradients(jp.adapt(stopped), adapted, [x])
    expected, expected_grads, _ = run_with_gradients(jp.adapt(free), adapted, [x])
    assert distance(got, expected) < CLOSE
    assert distance(got_grads, expected_grads) < CLOSE
    base = jax.grad(lambda a: jnp.sum(jp.adapt(stopped)(a, x)))(adapted)["w"].base
    assert jnp.all(base == 0)


def test_sharding_constraint(x, w, keys):
    sharding = NamedSharding(mesh("tensor"), P(None, "tensor"))
    fn = lambda p, x: x @ lax.with_sharding_constraint(p["w"], sharding)
    # On two devices each holds half a kernel; the half must not be formed either.
    check(fn, {"w": w}, x, sites={"w": "in out"}, keys=keys, halves=2)
    adapted = prepare({"w": w}, pair(), ["w"], keys)
    assert "sharding_constraint" in str(jax.make_jaxpr(jp.adapt(fn))(adapted, x))


SQUARE = 14  # layers that can follow each other, of a size no activation has


def layer(w, x):
    return x + jnp.tanh(x @ w)


SCANS = {
    "shared over the steps": (
        lambda p, x: lax.scan(lambda x, _: (layer(p["w"], x), None), x, None, L)[0],
        (),
    ),
    "stack": (
        lambda p, x: lax.scan(lambda x, w: (layer(w, x), None), x, p["w"])[0],
        (L,),
    ),
    "stack backwards, two at a time": (
        lambda p, x: lax.scan(
            lambda x, w: (layer(w, x), jnp.sum(x)), x, p["w"], reverse=True, unroll=2
        ),
        (L,),
    ),
    "checkpoint over a stack": (
        lambda p, x: lax.scan(
            jax.checkpoint(lambda x, w: (layer(w, x), None), prevent_cse=False),
            x,
            p["w"],
        )[0],
        (L,),
    ),
    "a body that reads w[i]": (
        lambda p, x: lax.scan(
            lambda x, i: (layer(p["w"][i], x), None), x, jnp.arange(L)
        )[0],
        (L,),
    ),
    "fori_loop with dynamic_index_in_dim": (
        lambda p, x: lax.fori_loop(
            0,
            L,
            lambda i, x: layer(lax.dynamic_index_in_dim(p["w"], i, keepdims=False), x),
            x,
        ),
        (L,),
    ),
    "unrolled w[i]": (
        lambda p, x: layer(p["w"][2], layer(p["w"][1], layer(p["w"][0], x))),
        (L,),
    ),
    "in the loop carry": (
        lambda p, x: lax.scan(
            lambda c, _: ((c[0], layer(c[0], c[1])), None), (p["w"], x), None, L
        )[0][1],
        (),
    ),
    "nested": (
        lambda p, x: lax.scan(
            lambda x, ws: lax.scan(lambda x, w: (layer(w, x), None), x, ws), x, p["w"]
        )[0],
        (2, L),
    ),
    "while, with the weight in the carry": (
        lambda p, x: lax.fori_loop(
            0, L, lambda i, c: (c[0], layer(c[0], c[1])), (p["w"], x)
        )[1],
        (),
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_loop(name, keys):
    # Kernels [14, 16] cut to [14, 14] after use would form slices; a square kernel
    # is told from its transpose by the roles alone.
    fn, stack = SCANS[name]
    w = numbers(*stack, SQUARE, SQUARE, seed=1, scale=SQUARE**-0.5)
    x = numbers(5, SQUARE)
    roles = "layer " * len(stack) + "in out"
    # A body that picks its own slice: the gradient of any such loop, adapted or not,
    # keeps the slices of all steps for the way back.
    kept = (
        ("dynamic-update-slice", "broadcast") if "i]" in name or "fori" in name else ()
    )
    check(fn, {"w": w}, x, sites={"w": roles}, keys=keys, allow=kept)


def test_while_with_an_unknown_number_of_steps(keys):
    """No reverse mode through ``while``: values and forward mode."""
    w, x = numbers(D, D, seed=1, scale=0.3), numbers(5, D)

    def fn(p, x):
        go = lambda c: (jnp.sum(c[1] ** 2) > 1e-2) & (c[0] < 9)
        step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) * 0.5)
        return lax.while_loop(go, step, (0, x))[1]

    adapted = prepare({"w": w}, everything(), ["w"], keys)
    tangent = jax.tree.map(jnp.ones_like, adapted)
    got = jax.jvp(jp.adapt(fn), (adapted, x), (tangent, x))
    expected = jax.jvp(lambda a, x: fn(jp.merge(a), x), (adapted, x), (tangent, x))
    for y, z in zip(got, expected, strict=True):
        assert distance(y, z) < CLOSE


def test_vmapped_experts(keys):
    w, x = numbers(E, D, F, seed=1, scale=0.3), numbers(E, 5, D)
    fn = lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x)
    check(fn, {"w": w}, x, sites={"w": "batch in out"}, keys=keys)


def test_experts_by_einsum_on_one_input(keys):
    """The expert axis of the kernel is a batch axis that the input lacks."""
    w, x = numbers(5, D, F, seed=1, scale=0.3), numbers(5, D)
    fn = lambda p, x: jnp.einsum("td,edf->tef", x, p["w"])
    sites, inferred = {"w": "expert in out"}, {"w": "out in out"}
    check(fn, {"w": w}, x, sites=sites, inferred=inferred, keys=keys)


@pytest.mark.parametrize("sizes", [(3, 0, 4, 4), (11, 0, 0, 0)], ids=str)
def test_ragged_dot_experts(sizes, keys):
    w, x = numbers(E, D, F, seed=1, scale=0.3), numbers(11, D)
    sizes = jnp.asarray(sizes)
    fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)
    check(fn, {"w": w}, x, sizes, sites={"w": "expert in out"}, keys=keys)


def test_shard_map_column_parallel(x, w, keys):
    @partial(
        jax.shard_map,
        mesh=mesh("data", "tensor"),
        in_specs=(P(None, "tensor"), P("data")),
        out_specs=P("data", "tensor"),
    )
    def column(w, x):
        return jnp.tanh(x @ w)

    x = jnp.concatenate([x, x[:1]])
    fn = lambda p, x: column(p["w"], x)
    check(fn, {"w": w}, x, sites={"w": "in out"}, keys=keys, halves=2)


def test_shard_map_row_parallel_with_psum(x, w, keys):
    @partial(
        jax.shard_map,
        mesh=mesh("data", "tensor"),
        in_specs=(P("tensor", None), P("data", "tensor")),
        out_specs=P("data"),
    )
    def row(w, x):
        return lax.psum(x @ w, "tensor")

    x = jnp.concatenate([x, x[:1]])
    fn = lambda p, x: row(p["w"], x)
    # `o` scales each shard's partial sum, `fixed` and `a` are cut along in: all linear.
    check(fn, {"w": w}, x, sites={"w": "in out"}, keys=keys, halves=2)
