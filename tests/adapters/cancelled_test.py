"""DoRA and BoRA where a kernel's features are cancelled, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms_toolbox import dense_bora, dense_dora, made, merged

import jaxpeft as jp

METHODS = {
    "dora": jp.dora(rank=2, stop_gradient_norm=False),
    "dora-constant": jp.dora(rank=2),
    "out-in": jp.bora(rank=2),
    "in-out": jp.bora(rank=2, order=("in", "out")),
}
# Of W's norm, and the largest error in the output and in gradients: 30 times
# float32's step over what is left, or the Gram matrices' own at 1e-2.
LEFT = {1: 5e-6, 1e-2: 1e-3, 1e-3: 1e-3, 3e-4: 1e-3, 1e-4: 3e-3, 1e-5: 3e-2}
NEARLY_ALL = (1e-6, 1e-7, 1e-8, 0)


def cancelled(axis, left, d_in=24, d_out=20):
    """A kernel, and factors that leave so much of its feature 3; others are near."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(d_in, d_out)).astype(np.float32)
    a, b = 0.1 * rng.normal(size=(d_in, 2)), 0.1 * rng.normal(size=(2, d_out))
    rest, whole = (w[:, 3], a[:, 0]) if axis == "out" else (w[3], b[0])
    v = rng.normal(size=rest.shape)
    v *= left * np.linalg.norm(rest) / np.linalg.norm(v)
    if axis == "out":
        b[0, 3] = 1.0
        whole[:] = v - rest - a[:, 1] * b[1, 3]
    else:
        a[3, 0] = 1.0
        whole[:] = v - rest - b[1] * a[3, 1]
    return w, {"a": a.astype(np.float32), "b": b.astype(np.float32)}


@functools.partial(jax.jit, static_argnums=0)
def kernel_and_gradient(adapter, w, frozen, trainable, g):
    def loss(t):
        kernel = merged(adapter, w, frozen, t)
        return jnp.sum(kernel * g), kernel

    (_, kernel), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return kernel, gradient


@functools.partial(jax.jit, static_argnums=0)
def by_the_equations(name, w, scale, trainable, g):
    held = dense_dora(w, scale, trainable)[1] if name == "dora-constant" else None

    def dense(t):
        if name.startswith("dora"):
            return dense_dora(w, scale, t, held)[0]
        return dense_bora(w, scale, t, name.split("-"))[0]

    gradient = jax.grad(lambda t: jnp.sum(dense(t) * g))(trainable)
    return dense(trainable), gradient


def in_float64(name, *arrays):
    """The kernel and its gradient by the equations."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        return jax.tree.map(np.asarray, by_the_equations(name, *wide))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", METHODS)
def test_output_and_gradients_of_what_is_left(name, axis):
    adapter = METHODS[name]
    g = np.random.default_rng(2).normal(size=(24, 20)).astype(np.float32)
    for left, allowed in LEFT.items() | dict.fromkeys(NEARLY_ALL).items():
        w, pair = cancelled(axis, left)
        frozen, trainable = made(adapter, w, **pair)
        got, gradient = kernel_and_gradient(adapter, w, frozen, trainable, g)
        for x in (got, *gradient.values()):
            assert np.all(np.isfinite(x)), (left, "finite")
        # Bounded: no entry is larger than magnitudes allow, but for rounding's part.
        assert np.max(np.abs(got)) < 4 * max(map(jnp.max, trainable.values())), left
        if allowed is None:
            continue
        exact, right = in_float64(name, w, frozen["scale"], trainable, g)
        error = np.max(np.abs(np.float64(got) - exact)) / np.max(np.abs(exact))
        assert error < allowed, (left, error)
        for leaf, x in right.items():
            error = np.max(np.abs(np.float64(gradient[leaf]) - x)) / np.max(np.abs(x))
            assert error < allowed, (left, leaf, error)


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_of_zeros_stays_finite(name):
    adapter = METHODS[name]
    rng = np.random.default_rng(0)
    w, g = np.zeros((6, 5), np.float32), np.ones((6, 5), np.float32)
    b = rng.normal(size=(2, 5)).astype(np.float32)
    for given in ({}, {"b": b}):
        frozen, trainable = made(adapter, w)
        got = kernel_and_gradient(adapter, w, frozen, trainable | given, g)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_of_any_size_starts_as_itself(name):
    """Norms are clamped relative to the kernel; none of 1e-12 is lost."""
    for size in (1e-12, 1.0, 1e12):
        w = size * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
        frozen, trainable = made(METHODS[name], w)
        got = merged(METHODS[name], w, frozen, trainable)
        np.testing.assert_allclose(got, w, rtol=1e-5)


@pytest.mark.parametrize("name", ["dora", "out-in"])
def test_stacked_many_axes_and_sharded_agree(name):
    """Layers of which one has a cancelled feature; heads; eight devices."""
    adapter, layers = METHODS[name], []
    x = np.random.default_rng(5).normal(size=(7, 24)).astype(np.float32)

    def step(fn):
        def loss(t, frozen, x):
            y = jp.adapt(fn)(jp.combine(t, frozen), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(adapted, fn):
        (_, y), grads = step(fn)(*jp.partition(adapted), x)
        return y, jax.tree.leaves(grads)

    plain = lambda p, x: x @ p["w"]
    for left in (1, 1e-3):
        w, pair = cancelled("out", left)
        layers.append((w, pair))
    kernels = np.stack([w for w, _ in layers])
    pairs = {n: np.stack([p[n] for _, p in layers]) for n in ("a", "b")}

    def filled(tree, given):
        node = tree["w"]
        new = {
            n: jnp.asarray(v).reshape(node.trainable[n].shape) for n, v in given.items()
        }
        return {"w": node.replace(trainable=node.trainable | new)}

    key = jax.random.key(0)
    alone = [
        run(filled(jp.attach({"w": w}, adapter, ["w"], key=key), pair), plain)
        for w, pair in layers
    ]
    scanned = lambda p, x: jax.lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1]
    roles = {"w": "layer in out"}
    stacked = jp.attach({"w": kernels}, adapter, ["w"], key=key, axes=roles)
    stacked = filled(stacked, pairs)
    heads = jp.attach(
        {"w": layers[1][0].reshape(24, 4, 5)},
        adapter,
        ["w"],
        key=key,
        axes={"w": "in out out"},
    )
    heads = filled(heads, layers[1][1])
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x", "y"))
    spread = jp.attach(
        {"w": jax.device_put(kernels, spec)}, adapter, ["w"], key=key, axes=roles
    )
    spread = filled(spread, pairs)

    def close(got, expected):
        for mine, right in zip(
            jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
        ):
            mine, right = np.ravel(mine), np.ravel(right)
            assert np.max(np.abs(mine - right)) < 1e-3 * np.max(np.abs(right))

    both = jax.tree.map(lambda *each: np.stack(each), *alone)
    close(run(stacked, scanned), both)
    close(run(spread, scanned), both)
    close(run(heads, lambda p, x: jnp.tensordot(x, p["w"], 1)), alone[1])
    text = step(scanned).lower(*jp.partition(spread), x).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert not any("f32[2,24,20]" in line or "f32[2,24,10]" in line for line in gathers)
