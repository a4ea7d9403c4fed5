"""Thin factors to start from whose product is zero."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

ZERO_STARTS = ("uniform", "gaussian", "embedding")


def zero_factors(
    key: Key[Array, ""],
    shape: tuple[int, int],
    rank: int,
    start: Literal["uniform", "gaussian", "embedding"] = "uniform",
    dtype=jnp.float32,
) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
    """Returns two factors, one random and one zero.

    ============  ==========================================  ====================
    ``start``     ``a [d_in, r]``                             ``b [r, d_out]``
    ============  ==========================================  ====================
    "uniform"     Uniform(-1/sqrt(d_in), 1/sqrt(d_in))        0
    "gaussian"    Normal(0, (1/r)^2)                          0
    "embedding"   0                                           Normal(0, 1)
    ============  ==========================================  ====================

    Args:
        key: a typed key.
        shape: ``(d_in, d_out)``.
        rank: r, at least 1.
        start: see the table.
        dtype: of both factors.

    Returns:
        ``(a [d_in, r], b [r, d_out])``.

    Example:
        >>> a, b = zero_factors(jax.random.key(0), (4, 2), 1)
        >>> a.shape, b.shape, bool(jnp.all(jnp.abs(a) <= 0.5)), float(jnp.sum(b))
        ((4, 1), (1, 2), True, 0.0)
    """
    d_in, d_out = shape
    a, b = jnp.zeros((d_in, rank), dtype), jnp.zeros((rank, d_out), dtype)
    if start == "uniform":
        bound = 1 / math.sqrt(d_in)
        return jax.random.uniform(key, a.shape, dtype, -bound, bound), b
    if start == "gaussian":
        return jax.random.normal(key, a.shape, dtype) / rank, b
    return a, jax.random.normal(key, b.shape, dtype)
