"""Codes: which integers and scales stand for some floats, and their values."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et
# al., arXiv 2305.14314, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How entries become codes.

    Attributes:
        codes: dtype of the codes.
        scale: dtype of the scale.
        most: the code, or the value, that the largest entry of a block has.
        table: the values of the codes, or ``None`` where a code is its own value.
        grouped: whether blocks are groups along the in axis, not all of it.
    """

    codes: Any
    scale: Any
    most: float
    table: tuple[float, ...] | None = None
    grouped: bool = True


KINDS = {
    "int8": Kind(jnp.int8, jnp.float32, 127.0, grouped=False),
    "int4": Kind(jnp.int4, jnp.bfloat16, 7.0),
    "nf4": Kind(jnp.uint4, jnp.bfloat16, 1.0, NF4),
}


def wide_of(dtype: Any) -> Any:
    """The dtype that codes and scales are multiplied in."""
    return jnp.float64 if jnp.dtype(dtype).itemsize > 4 else jnp.float32


def bits_of(dtype: Any) -> int:
    """The bits of a number in an array, where NumPy counts whole bytes."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    return jnp.iinfo(dtype).bits if integer else 8 * dtype.itemsize


def looked_up(codes: jax.Array, table: Sequence[float], dtype: Any) -> jax.Array:
    """``table[codes]`` for 16 values, by selects: a gather is far slower and larger."""
    bits, values = codes.astype(jnp.uint8), [jnp.asarray(x, dtype) for x in table]
    for bit in range(4):
        on = bits & jnp.uint8(1 << bit) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(on, high, low) for low, high in pairs]
    return values[0]


def axis_groups(old: Sequence[int], new: Sequence[int]):
    """The smallest groups of axes that a reshape turns into one another.

    Returns:
        ``[(old axes, new axes)]``, two ranges each.
    """
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def blocks_of(
    shape: Sequence[int], kind: str, axes: tuple[int, ...], group: int
) -> tuple[int, ...]:
    """How many entries share a scale along each axis.

    Raises:
        ValueError: as ``codes_of`` does.
    """
    blocks = [1] * len(shape)
    along = math.prod(shape[i] for i in axes)
    if not KINDS[kind].grouped:
        for i in axes:
            blocks[i] = shape[i]
        return tuple(blocks)
    if along < group:
        raise ValueError(
            f"its {along} entries along in are fewer than one group of {group}"
        )
    left = group
    for i in reversed(axes):
        blocks[i] = math.gcd(left, shape[i])
        left //= blocks[i]
        if blocks[i] < shape[i]:
            break
    if left > 1:
        sizes = " x ".join(str(shape[i]) for i in axes)
        raise ValueError(f"groups of {group} do not divide its {sizes} along in")
    return tuple(blocks)


@functools.partial(jax.jit, static_argnums=(1, 2))
def coded(x: jax.Array, kind: str, blocks: tuple[int, ...]):
    """The codes nearest to an array, and the scale of each block: ``(codes, scale)``.

    Args:
        x: the array.
        kind: a key of ``KINDS``.
        blocks: of ``blocks_of``.
    """
    how = KINDS[kind]
    x = x.astype(wide_of(x.dtype))
    split = [(n // max(b, 1), b) for n, b in zip(x.shape, blocks, strict=True)]
    x = x.reshape(sum(split, ()))
    most = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim, 2)), keepdims=True)
    kept = jnp.finfo(how.scale)
    # Not a cast and back, which XLA leaves out where it can: every program, whatever
    # the shape of its array, is to give the same codes.
    scale = jax.lax.reduce_precision(
        most / jnp.asarray(how.most, x.dtype), kept.nexp, kept.nmant
    )
    scale = jnp.where(scale == 0, jnp.ones((), x.dtype), scale)
    x = x / scale
    if how.table is None:
        most_code = jnp.asarray(how.most, x.dtype)
        codes = jnp.clip(jnp.round(x), -most_code, most_code).astype(how.codes)
    else:
        table = how.table
        middles = [
            (low + high) / 2 for low, high in zip(table, table[1:], strict=False)
        ]
        above = (x > jnp.asarray(m, x.dtype) for m in middles)
        codes = sum(a.astype(jnp.uint8) for a in above).astype(how.codes)
    shape = tuple(s * b for s, b in split)
    scale = scale.reshape(tuple(s for s, _ in split)).astype(how.scale)
    return codes.reshape(shape), scale
