"""Moments of a kernel's inputs over many batches, and how their variance is spread."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxpeft.numerics._stream import (
    Leading,
    centre,
    join_leading,
    leading_rows,
    row_cosines,
)


class Moments(NamedTuple):
    """Count, mean and centred scatter of vectors; of a stack one a layer, in front.

    Attributes:
        count: of vectors, ``[...]``.
        mean: ``[..., d]``.
        scatter: the sum of ``(x - mean) (x - mean)^T``, ``[..., d, d]``.
    """

    count: Any
    mean: Any
    scatter: Any


class Spectrum(NamedTuple):
    """Where the variance of a kernel's inputs lies; of a stack one a layer, in front.

    Attributes:
        ratios: shares of the variance, largest first, ``[..., k]``; k is d, or the
            number of leading directions that were kept.
        directions: orthonormal columns, ``[..., d, k]``.
        singular: singular values of the centred inputs, ``[..., k]``.
    """

    ratios: Float[np.ndarray, "*layers k"]
    directions: Float[np.ndarray, "*layers d k"]
    singular: Float[np.ndarray, "*layers k"]


def input_moments(
    x: Float[Array, "*batch d"],
    mask: Shaped[Array | np.ndarray, "*batch"],
    keep: int | None = None,
) -> Moments | Leading:
    """Returns moments of a kernel's inputs, in float32: ``reduce`` of ``capture``.

    Args:
        x: inputs.
        mask: 1 at those that count: the attention mask for all real tokens, or the
            positions that carry loss.
        keep: ``None``: all directions, exactly, in ``d * d`` numbers. A number: so
            many leading ones, of an incremental SVD (``numerics.leading_rows``), for
            wide inputs; some four times what a site may get as ranks.

    Returns:
        Their moments, or their leading directions.

    Example:
        >>> x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> input_moments(x, jnp.asarray([1, 1, 0])).scatter.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w = jnp.asarray(mask).reshape(-1, 1).astype(jnp.float32)
    if keep is not None:
        return leading_rows(x, w[:, 0], min(keep, x.shape[-1]))
    count, mean, centred = centre(x, w[:, 0])
    scatter = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return Moments(count, mean, scatter)


def gather_moments(
    step: Callable[[Any], Mapping[str, Moments | Leading]],
    batches: Iterable[Any],
    *,
    tau: int | float | None = None,
    watch: int = 16,
) -> dict[str, Moments | Leading]:
    """Adds up moments over batches, those of all directions in float64 on the host.

    Args:
        step: ``batch -> {path: Moments}``, one forward pass; a function made by
            ``jaxpeft.capture``, jitted, that ends in ``[1]``.
        batches: what it is given, one after the other.
        tau: stop before the last batch, once a batch turns no leading direction that
            is watched: the cosine with the one before is at least ``tau`` (HF PEFT:
            0.99). ``None``: all batches.
        watch: how many of each site's leading directions must hold still.

    Returns:
        ``{path: Moments}`` of all batches.

    Raises:
        ValueError: there is no batch, a moment is not finite, or ``tau`` is given
            where all directions are kept.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"q": {"kernel": jnp.ones((2, 3))}}
        >>> fn = lambda p, x, mask: x @ p["q"]["kernel"]
        >>> def step(batch):
        ...     reduce = lambda x: input_moments(x, batch[1])
        ...     return jp.capture(fn, ["q"], reduce)(params, *batch)[1]
        >>> batch = jnp.asarray([[1.0, 0.0], [3.0, 0.0]]), jnp.ones(2)
        >>> gather_moments(step, [batch, batch])["q/kernel"].mean.tolist()
        [2.0, 0.0]
    """
    total: dict[str, Moments | Leading] = {}
    for batch in batches:
        before, held = dict(total), []
        for path, new in step(batch).items():
            if not np.all(np.isfinite(new[2])):  # a sum over all entries
                raise ValueError(f"the inputs of {path!r} are not finite")
            old = before.get(path)
            if isinstance(new, Leading):
                total[path] = new if old is None else join_leading(old, new)
                if tau is not None and old is not None:
                    held.append(_held(old, new, total[path], watch))
                continue
            if tau is not None:
                raise ValueError(
                    "`tau` is for leading directions, and `step` gives moments of all; "
                    "leave it out, or write input_moments(x, mask, keep=64)"
                )
            new = Moments(*(np.asarray(x, np.float64) for x in jax.device_get(new)))
            total[path] = new if old is None else _joined(old, new)
        if held and all(np.all(x >= tau) for x in jax.device_get(held)):
            break
    if not total:
        raise ValueError("`batches` has no batch, or `step` gives no site")
    return total


def _held(old: Leading, new: Leading, both: Leading, watch: int):
    """How far each watched direction that is there held still; 0 after no input."""
    size = jnp.sum(both.rows**2, -1)
    there = size > 1e-10 * jnp.max(size, -1, keepdims=True)
    held = jnp.where(there, row_cosines(old, both), 1)[..., :watch]
    return jnp.where(jnp.all(new.count > 0), held, 0)


def _joined(a: Moments, b: Moments) -> Moments:
    """Moments of two samples together (Chan, Golub and LeVeque, 1979)."""
    count = np.maximum(a.count + b.count, 1)
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.count / count)[..., None]
    between = apart[..., :, None] * apart[..., None, :]
    between = between * (a.count * b.count / count)[..., None, None]
    return Moments(a.count + b.count, mean, a.scatter + b.scatter + between)


def spectrum(moments: Moments | Leading) -> Spectrum:
    """Returns how the variance of inputs is spread over directions.

    Args:
        moments: of ``gather_moments``, for one site.

    Returns:
        The spectrum, in float64; of as many directions as were kept. n inputs span
        n - 1 directions at most, so the shares of others are 0.

    Raises:
        ValueError: fewer than two inputs were counted, or all were the same.

    Example:
        >>> scatter = np.diag([1.0, 3.0])
        >>> spectrum(Moments(np.float64(5), np.zeros(2), scatter)).ratios.tolist()
        [0.75, 0.25]
    """
    count = np.asarray(moments.count)
    if np.any(count < 2):
        raise ValueError(
            f"`moments` counts {np.min(count):.0f} inputs; variance needs 2"
        )
    if isinstance(moments, Leading):
        rows = np.asarray(moments.rows, np.float64)
        _, values, vectors = np.linalg.svd(rows, full_matrices=False)
        values, vectors = values**2, vectors.swapaxes(-1, -2)
        trace = np.asarray(moments.spread, np.float64)[..., None]
    else:
        values, vectors = np.linalg.eigh(moments.scatter)
        values, vectors = np.maximum(values[..., ::-1], 0), vectors[..., ::-1]
        trace = np.sum(values, -1, keepdims=True)
    # What is below the rounding of a float32 mean is no variance.
    size = count * np.sum(np.square(moments.mean, dtype=np.float64), -1)
    if np.any(trace[..., 0] <= 1e-12 * size):
        raise ValueError("`moments` have no variance: all inputs are the same")
    spanned = np.arange(values.shape[-1]) < count[..., None] - 1
    values = np.where(spanned, values, 0)
    return Spectrum(values / trace, vectors, np.sqrt(values))
