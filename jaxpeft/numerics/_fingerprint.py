"""Fingerprints of kernels: cheap, computed where the kernel lies, order-independent."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpeft.numerics._quantised import Quantised, dense

# How far the projection of a folded kernel may be off, over its Frobenius norm. The
# kernel is folded again on loading, perhaps by another machine's rounding (1e-7 in
# float32, 4e-3 for a few entries in bfloat16); another base is some 1 away.
PROJECTION_TOLERANCE = 1e-3


def _mix(x):
    """Spreads every bit of each word over all of it (the end of MurmurHash3)."""
    x ^= x >> jnp.uint32(16)
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> jnp.uint32(13)
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def _mixed_index(shape: tuple[int, ...], seed: int):
    """Hashes each entry's position; fuses into the reduction, so costs no memory."""
    index, stride = jnp.full(shape, seed, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(index)


@jax.jit
def _sums(x):
    x = jnp.asarray(x)
    if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.int8)  # codes of 4 bits, too
    width = min(8 * x.dtype.itemsize, 32)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    words = bits.astype(jnp.uint32)

    def total(seed):
        return jnp.sum(_mix(words ^ _mixed_index(words.shape, seed)), dtype=jnp.uint32)

    return total(0x243F6A88), total(0xB7E15162)


def checksum(x: Array | np.ndarray | Quantised) -> str:
    """Returns 16 hex digits that change with any bit of an array, or its order.

    Integer sums modulo 2^32, so the same on every device, sharding and backend. A
    check against mistakes, not against forgery.

    Args:
        x: an array of any shape; of a quantised one codes and scales count.

    Returns:
        16 hexadecimal digits; of a quantised one, two times 16.

    Example:
        >>> checksum(jnp.arange(3.0)) == checksum(jnp.arange(3.0)[::-1])
        False
    """
    if isinstance(x, Quantised):
        return checksum(x.codes) + checksum(x.scale)
    high, low = (int(part) for part in _sums(x))
    return f"{high:08x}{low:08x}"


@jax.jit
def _projected(x):
    x = jnp.asarray(dense(x))
    x = x.astype(np.promote_types(x.dtype, np.float32))
    minus = _mixed_index(x.shape, 0x243F6A88) >> jnp.uint32(31) == 1
    return jnp.sum(jnp.where(minus, -x, x)), jnp.sqrt(jnp.sum(x * x))


def projection(x: Array | np.ndarray | Quantised) -> tuple[float, float]:
    """Returns a fixed projection of an array and its norm, both stable to rounding.

    Args:
        x: a floating array of any shape, or a quantised one, whose values count.

    Returns:
        ``(sum of entries under a fixed pattern of signs, Frobenius norm)``.
    """
    along, norm = (float(part) for part in _projected(x))
    return along, norm
