"""Norms of ``W + a b`` against the dense matrix, in every dtype of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import made_of_shape
from jaxpeft.numerics import factored_square_norms, square_norms

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
