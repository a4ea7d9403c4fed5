"""BoRA against its dense form in float64, its golden site and its invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms_toolbox import (
    M_IN,
    M_OUT,
    SCALE,
    A,
    B,
    G,
    W,
    dense_bora,
    dense_dora,
    made,
    merged,
)

import jaxpeft as jp

ORDERS = [("out", "in"), ("in", "out")]
orders = pytest.mark.parametrize("order", ORDERS, ids="-".join)
SHAPES = [(7, 12), (9, 9), (12, 5)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_site(order, d_in, d_out, rank=3, **options):
    rng = np.random.default_rng(d_in)
    adapter = jp.bora(rank=rank, alpha=2 * rank, order=order, **options)
    w = jnp.asarray(rng.normal(size=(d_in, d_out)))
    frozen, trainable = made(adapter, w)
    moved = {n: x + 0.3 * rng.normal(size=x.shape) for n, x in trainable.items()}
    return adapter, w, frozen, moved


def gradient_of(adapter, w, frozen, trainable, g):
    kernel = lambda t: jnp.sum(merged(adapter, w, frozen, t) * g)
    return jax.grad(kernel)(trainable)


GOLDEN = {
    ("out", "in"): {
        "start": [[2.146229, 1.919646, 0.841820], [2.271284, 0, 4.454354]],
        "kernel": [[2.068934, 1.950610, 0.956365], [2.382551, 0, 5.506673]],
        "exact": {
            "a": [[1.663717], [-0.814361]],
            "b": [[2.408088, -4.492581, -2.548069]],
            "m_out": [0.223827, -0.235177, -0.040226],
            "m_in": [0.370856, 0.917779],
        },
        "held": {
            "a": [[1.990832], [-1.101335]],
            "b": [[2.068934, -4.492581, -4.115399]],
            "m_out": [0.689645, 0, 0.910062],
            "m_in": [0.370856, 0.917779],
        },
    },
    ("in", "out"): {
        "start": [[2.317406, 2, 0.941727], [2.151657, 0, 4.371859]],
        "kernel": [[2.003842, 2, 0.883408], [2.232625, 0, 4.921340]],
        "exact": {
            "a": [[1.553216], [-0.767184]],
            "b": [[2.161192, -4.501294, -2.479608]],
            "m_out": [0.667947, 0, 0.807587],
            "m_in": [0.033454, -0.016727],
        },
        "held": {
            "a": [[1.885329], [-0.984268]],
            "b": [[2.003842, -4.456688, -3.735351]],
            "m_out": [0.667947, 0, 0.807587],
            "m_in": [0.373478, 0.820223],
        },
    },
}


@orders
@pytest.mark.parametrize("held", [False, True])
def test_golden_site(order, held):
    adapter = jp.bora(rank=1, alpha=SCALE, order=order, stop_gradient_norms=held)
    golden = GOLDEN[order]
    frozen, start = made(adapter, W, a=A, b=B)
    np.testing.assert_allclose(start["m_out"], [10**0.5, 2, 20**0.5])
    np.testing.assert_allclose(start["m_in"], [3, 5])
    kernel = merged(adapter, W, frozen, start)
    np.testing.assert_allclose(kernel, golden["start"], atol=1e-6)
    frozen, trainable = made(adapter, W, a=A, b=B, m_out=M_OUT, m_in=M_IN)
    kernel = merged(adapter, W, frozen, trainable)
    np.testing.assert_allclose(kernel, golden["kernel"], atol=1e-6)
    gradient = gradient_of(adapter, W, frozen, trainable, G)
    for name, expected in golden["held" if held else "exact"].items():
        np.testing.assert_allclose(gradient[name], expected, atol=1e-6, err_msg=name)


@orders
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_is_dense(order, shape):
    """Kernel and gradients of the Gram form and of the dense one, both conventions."""
    adapter, w, frozen, t = random_site(order, *shape)
    expected, norms = dense_bora(w, frozen["scale"], t, order)
    got = merged(adapter, w, frozen, t)
    assert np.max(np.abs(got - expected)) < 1e-12 * np.max(np.abs(expected))
    last = 0 if order[1] == "out" else 1
    reached = np.linalg.norm(got, axis=last)
    np.testing.assert_allclose(reached, np.abs(t[f"m_{order[1]}"]), rtol=1e-12)
    g = np.random.default_rng(1).normal(size=shape)
    for held in (None, norms):
        adapter = jp.bora(
            rank=3, alpha=6, order=order, stop_gradient_norms=held is not None
        )
        dense = functools.partial(dense_bora, w, frozen["scale"], order=order)
        expected = jax.grad(lambda t: jnp.sum(dense(t, held=held)[0] * g))(t)  # noqa: B023
        got = gradient_of(adapter, w, frozen, t, g)
        for name in t:
            error = np.max(np.abs(got[name] - expected[name]))
            assert error < 1e-12 * np.max(np.abs(expected[name])), name


@orders
def test_invariances(order):
    adapter, w, frozen, t = random_site(order, 7, 12)
    first, last = (f"m_{axis}" for axis in order)
    kernel = merged(adapter, w, frozen, t)
    same = merged(adapter, w, frozen, t | {first: 3.0 * t[first]})
    np.testing.assert_allclose(same, kernel, rtol=1e-10)
    thrice = merged(adapter, w, frozen, t | {last: 3.0 * t[last]})
    np.testing.assert_allclose(thrice, 3 * kernel, rtol=1e-10)
    frozen_3, _ = made(adapter, 3.0 * w)
    np.testing.assert_allclose(
        merged(adapter, 3.0 * w, frozen_3, t | {"a": 3.0 * t["a"]}), kernel, rtol=1e-10
    )
    g = np.random.default_rng(1).normal(size=w.shape)
    along = lambda gradient, name: float(jnp.vdot(t[name], gradient[name]))
    exact = gradient_of(adapter, w, frozen, t, g)
    assert abs(along(exact, first)) < 1e-10 < abs(along(exact, last))
    held = jp.bora(rank=3, alpha=6, order=order, stop_gradient_norms=True)
    constant = gradient_of(held, w, frozen, t, g)
    np.testing.assert_allclose(along(constant, first), along(constant, last))
    assert abs(along(constant, first)) > 1e-3


@orders
def test_the_transpose_is_the_other_order(order):
    adapter, w, frozen, t = random_site(order, 7, 12)
    other = jp.bora(rank=3, alpha=6, order=order[::-1])
    turned = {"a": t["b"].T, "b": t["a"].T, "m_out": t["m_in"], "m_in": t["m_out"]}
    frozen_t, _ = made(other, w.T)
    np.testing.assert_allclose(
        merged(other, w.T, frozen_t, turned),
        merged(adapter, w, frozen, t).T,
        rtol=1e-12,
    )


def test_with_the_in_norms_of_dora_it_is_dora():
    adapter, w, frozen, t = random_site(("out", "in"), 7, 12)
    expected, _ = dense_dora(w, frozen["scale"], t)
    t = t | {"m_in": jnp.linalg.norm(expected, axis=1)}
    np.testing.assert_allclose(merged(adapter, w, frozen, t), expected, rtol=1e-12)
    dora = jp.dora(rank=3, alpha=6)
    own, _ = made(dora, w)
    mine = {n: t[n] for n in ("a", "b", "m_out")}
    np.testing.assert_allclose(merged(dora, w, own, mine), expected, rtol=1e-12)


@orders
@pytest.mark.parametrize("size", [0.0, 1e-6, 0.1])
def test_dead_features_are_plain_lora(order, size):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(6, 8))
    w[2], w[:, 5] = 0, 0
    adapter = jp.bora(rank=2, order=order)
    params = {"q": {"kernel": jnp.asarray(w)}}
    adapted = jp.attach(params, adapter, ["q"], key=jax.random.key(0))
    (facts,) = jp.describe(adapted).report
    assert facts["dead_out"] == facts["dead_in"] == 1
    node = adapted["q"]["kernel"]
    b = size * rng.normal(size=node.trainable["b"].shape)
    t = node.trainable | {"b": jnp.asarray(b)}
    g = rng.normal(size=w.shape)
    kernel = merged(adapter, w, node.frozen, t)
    gradient = gradient_of(adapter, w, node.frozen, t, g)
    assert all(np.all(np.isfinite(x)) for x in [kernel, *gradient.values()])
    if size == 0:
        np.testing.assert_allclose(kernel, w, atol=1e-12)
    assert gradient["m_out"][5] == 0 and gradient["m_in"][2] == 0
    plain = node.frozen["scale"] * t["a"] @ t["b"]
    np.testing.assert_allclose(kernel[2, 5], plain[2, 5], rtol=1e-12)


def test_magnitudes_move_over_a_bfloat16_kernel():
    with jax.enable_x64(False):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.bfloat16)
        params = {"q": {"kernel": w}}
        adapted = jp.attach(params, jp.bora(rank=2), ["q"], key=jax.random.key(0))
        trainable, frozen = jp.partition(adapted)
        x = jnp.ones((3, 6), jnp.bfloat16)
        forward = jp.adapt(lambda p, x: x @ p["q"]["kernel"])

        def loss(trainable):
            y = forward(jp.combine(trainable, frozen), x)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        start = trainable["q"]["kernel"].trainable
        for _ in range(10):
            step = jax.grad(loss)(trainable)
            move = lambda t, g: t - 1e-4 * jnp.sign(g)
            trainable = jax.tree.map(move, trainable, step)
        end = trainable["q"]["kernel"].trainable
        for name in ("m_out", "m_in"):
            assert end[name].dtype == jnp.float32
            assert np.all(end[name] != start[name]), name


@orders
def test_no_temporary_of_the_kernels_size(order):
    """One float32 2048 x 2048 site, rank 16, 16 tokens; and its FLOPs over LoRA's."""
    with jax.enable_x64(False):
        n, rank, tokens = 2048, 16, 16
        flops, temporaries = {}, {}
        for adapter in (jp.bora(rank=rank, order=order), jp.lora(rank=rank)):
            shapes = {"w": jax.ShapeDtypeStruct((n, n), jnp.float32)}
            attach = lambda p, k: jp.attach(p, adapter, ["w"], key=k)  # noqa: B023
            halves = jp.partition(jax.eval_shape(attach, shapes, jax.random.key(0)))

            def loss(trainable, x, frozen):
                y = jp.adapt(lambda p, x: x @ p["w"])(jp.combine(trainable, frozen), x)
                return jnp.sum(y**2)

            x = jax.ShapeDtypeStruct((tokens, n), jnp.float32)
            step = jax.jit(jax.grad(loss, argnums=(0, 1)))
            compiled = step.lower(halves[0], x, halves[1]).compile()
            flops[adapter.name] = compiled.cost_analysis()["flops"]
            memory = compiled.memory_analysis()
            temporaries[adapter.name] = memory.temp_size_in_bytes
        assert temporaries["bora"] < n * n * 4 / 4, temporaries
        assert flops["bora"] - flops["lora"] <= (9 * rank + 10) * n * n


LLAMA3 = {
    **{n: (4096, 4096) for n in ("q", "o")},
    **{n: (4096, 1024) for n in ("k", "v")},
    **{n: (4096, 14336) for n in ("gate", "up")},
    "down": (14336, 4096),
}
LLAMA2 = {n: (4096, 4096) for n in "qkv"} | {"up": (4096, 11008), "down": (11008, 4096)}
ROBERTA = {"query": (768, 768), "value": (768, 768)}
COUNTS = [  # layers, {module: (d_in, d_out)}, rank, BoRA's, DoRA's
    (12, ROBERTA, 8, 331_776, 313_344),
    (32, LLAMA2, 32, 57_851_904, 56_975_360),
    (32, {n: LLAMA3[n] for n in "qv"}, 16, 7_241_728, 6_979_584),
    (32, LLAMA3, 16, 44_564_480, 43_319_296),
]


@pytest.mark.parametrize("layers, sizes, rank, bora, dora", COUNTS, ids=range(4))
def test_golden_counts(layers, sizes, rank, bora, dora):
    """Rank r of BoRA costs what a LoRA of rank r + 1 does; no weights needed."""
    stacks = {
        n: jax.ShapeDtypeStruct((layers, *s), jnp.bfloat16) for n, s in sizes.items()
    }
    options = {"targets": list(sizes), "axes": {".*": "layer in out"}}
    for adapter, count in ((jp.bora(rank), bora), (jp.dora(rank), dora)):
        attach = lambda p, k: jp.attach(p, adapter, key=k, **options)  # noqa: B023
        adapted = jax.eval_shape(attach, stacks, jax.random.key(0))
        assert jp.count(adapted)[0] == count
    assert bora == layers * sum((rank + 1) * sum(s) for s in sizes.values())


def test_bad_options():
    with pytest.raises(ValueError, match="`order` must be one of"):
        jp.bora(order=("in", "in"))
    with pytest.raises(ValueError, match="`eps`.*positive"):
        jp.bora(eps=0.0)
    assert jp.bora(order=["in", "out"]) is jp.bora(order=("in", "out"))
