"""Norms of ``W + a b`` against the dense matrix, in every dtype of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import made_of_shape
from jaxpeft.numerics import _factored, factored_square_norms, square_norms

# Of the largest norm: what rounding to 16 bits (two bfloat16 parts) allows.
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-5, "float16": 3e-6, "float64": 1e-13}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_square_norms_and_their_gradients(axis, dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        wide = np.float64 if dtype == "float64" else np.float32
        w = jnp.asarray(rng.normal(size=(40, 24)), dtype)
        a, b = (jnp.asarray(rng.normal(size=s), wide) for s in ((40, 3), (3, 24)))
        f = jnp.asarray(rng.uniform(0.5, 2, size=40 if axis == "out" else 24), wide)
        g = jnp.asarray(rng.normal(size=24 if axis == "out" else 40), wide)

        def fast(a, b, f):
            base = square_norms(w, axis, f)
            return factored_square_norms(w, a, b, axis, base, f)

        def dense(a, b, f):
            v = w.astype(wide) + a @ b
            weight = f[:, None] if axis == "out" else f[None, :]
            return jnp.sum(v**2 * weight, 0 if axis == "out" else 1)

        got, pull = jax.vjp(fast, a, b, f)
        expected, dense_pull = jax.vjp(dense, a, b, f)
        assert got.dtype == wide
        for x, y in zip((got, *pull(g)), (expected, *dense_pull(g)), strict=True):
            assert np.max(np.abs(x - y)) < TOLERANCE[dtype] * np.max(np.abs(y))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_bfloat16_kernel_is_not_widened(axis):
    """Neither forward nor backward make a float32 array of its shape."""
    w = jax.ShapeDtypeStruct((40, 24), jnp.bfloat16)
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((40, 3), (3, 24)))
    n = jax.ShapeDtypeStruct((24 if axis == "out" else 40,), jnp.float32)

    def loss(a, b, w, n):
        return jnp.sum(factored_square_norms(w, a, b, axis, n))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(a, b, w, n)
    # As the program is written; what a backend makes of a bfloat16 dot is its own.
    text = lowered.as_text()
    assert "tensor<40x24xbf16>" in text and "tensor<40x24xf32>" not in text
    assert not made_of_shape(lowered.compile().as_text(), [(3, 24, 40)])


# Of a feature's norm in W, what `a b` leaves of it: from all to nothing.
LEFT = (1, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 0)
STEP = 2.0**-23  # float32's
PRECISE = {"float32": 4 * STEP, "bfloat16": 4 * 2.0**-14, "float16": 4 * 2.0**-20}


def cancelling(axis, dtype, n=40):
    """``W, a, b`` whose features keep ``LEFT`` of their norms, two of each."""
    rng, left = np.random.default_rng(3), np.repeat(LEFT, 2)
    w = rng.normal(size=(n, len(left)))
    w = np.asarray(jnp.asarray(w, dtype), np.float64)
    v = rng.normal(size=w.shape)
    v *= left * np.linalg.norm(w, axis=0) / np.linalg.norm(v, axis=0)
    b = np.linalg.qr(rng.normal(size=(len(left), len(left))))[0]
    a = (v - w) @ b.T  # so that W + a b = v
    w, a, b = (w, a, b) if axis == "out" else (w.T, b.T, a.T)
    return jnp.asarray(w, dtype), jnp.float32(a), jnp.float32(b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", PRECISE)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_what_is_left_of_a_feature_has_the_norm_it_has(axis, dtype, weighted):
    """The bounds of the docstring, of each feature alone; its gradients likewise."""
    w, a, b = cancelling(axis, dtype)
    summed = 0 if axis == "out" else 1
    weight = np.random.default_rng(4).uniform(0.5, 2, w.shape[summed])
    weight = jnp.float32(weight) if weighted else None

    @jax.jit
    def fast(a, b, f):
        norms = lambda a, b, f: factored_square_norms(
            w, a, b, axis, square_norms(w, axis, f), f
        )
        got, pull = jax.vjp(norms, a, b, f)
        return got, jax.vmap(pull)(jnp.eye(len(got), dtype=got.dtype))

    got, gradients = fast(a, b, weight)
    with jax.enable_x64(True):
        wide = [None if x is None else np.float64(x) for x in (w, a, b, weight)]

        def dense(a, b, f):
            f = 1.0 if f is None else jnp.expand_dims(f, 1 - summed)
            f = jnp.broadcast_to(f, w.shape)
            return jnp.sum((wide[0] + a @ b) ** 2 * f, summed)

        exact, pull = jax.vjp(dense, *map(jnp.asarray, wide[1:3]), wide[3])
        each = jax.vmap(pull)(jnp.eye(len(exact)))
        f = 1.0 if weight is None else np.expand_dims(wide[3], 1 - summed)
        down, up = wide[1:3] if axis == "out" else (wide[2].T, wide[1].T)
        f_down = down**2 * (1.0 if weight is None else wide[3][:, None])
        size = np.sum(wide[0] ** 2 * f, summed) + f_down.sum(0) @ up**2
    size, norm, exact = np.sqrt(size), np.sqrt(np.float64(got)), np.sqrt(exact)
    least = 8 * STEP * size
    bound = np.maximum(PRECISE[dtype] ** 0.5 / 2, 2 * STEP * size / exact)
    clear, clamped = exact > 1.5 * least, exact < 0.5 * least
    assert clear.sum() == 20 and clamped.sum() == 6
    error = np.abs(norm - exact) / exact
    assert np.all(error[clear] < bound[clear])
    np.testing.assert_allclose(norm[clamped], least[clamped], rtol=1e-5)
    for mine, right in zip(gradients, each, strict=True):
        if right is None:
            continue
        mine = np.float64(mine).reshape(len(exact), -1)
        right = np.asarray(right).reshape(len(exact), -1)
        assert np.all(np.isfinite(mine)) and np.all(mine[clamped] == 0)
        error = np.linalg.norm(mine - right, axis=1) / np.linalg.norm(right, axis=1)
        assert np.all(error[clear] < 4 * bound[clear])


def test_features_of_nothing_have_no_norm():
    w, zero = jnp.zeros((6, 4)), jnp.zeros((2, 4))
    loss = lambda a, b: jnp.sum(
        factored_square_norms(w, a, b, "out", square_norms(w, "out"), eps=1e-3)
    )
    assert loss(jnp.ones((6, 2)), zero) == 0
    for x in jax.grad(loss, (0, 1))(jnp.ones((6, 2)), zero):
        assert np.all(x == 0)
    # Small is not nothing: what is clamped is a part of what there is.
    kernel = 1e-12 * jnp.ones((6, 4))
    squares = square_norms(kernel, "out")
    same = factored_square_norms(kernel, jnp.ones((6, 2)), zero, "out", squares)
    np.testing.assert_allclose(same, squares, rtol=1e-6)


def test_a_step_without_cancelled_features_forms_none():
    """Neither in a stack, where a branch would be computed and thrown away."""
    w, a, b = (jnp.ones(s) for s in ((3, 40, 24), (3, 40, 2), (3, 2, 24)))
    counted = []

    def count(found):
        counted.append(int(found))

    def watched(chosen, start, add):
        jax.debug.callback(count, jnp.sum(chosen))
        return each_feature(chosen, start, add)

    each_feature = _factored._each_feature
    one = lambda w, a, b: factored_square_norms(w, a, b, "out", square_norms(w, "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_factored, "_each_feature", watched)
        jax.block_until_ready(jax.vmap(one)(w, a, b))
        jax.effects_barrier()
        assert sum(counted) == 0 and counted
        jax.block_until_ready(jax.vmap(one)(w, a, -0.5 * b))
        jax.effects_barrier()
    assert sum(counted) == 3 * 24
