"""Exact nearest neighbours in blocks: found by products, proved by differences."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int, Shaped

BACKENDS = ("jax", "numpy")
_BYTES = 2**26  # of differences held at a time


def neighbours(
    x: Shaped[Any, "n d"],
    k: int,
    *,
    block: int = 512,
    extra: int = 8,
    backend: str = "jax",
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    r"""Returns the k nearest other points of every point, exactly.

    Candidates come from :math:`|p|^2 + |q|^2 - 2 p \cdot q` of centred, scaled points,
    one pair of blocks at a time, each pair once; their distances from differences
    :math:`|p - q|`, which do not cancel. Where the rounding of the products could have
    hidden a nearer point, that point's distances to all others are taken by
    differences. A point is not its own neighbour, by its index: copies of it are.

    Args:
        x: points, a row each; any real dtype, on any device.
        k: how many, from 1 to n - 1.
        block: points in a block; memory is of the order of ``block * (d + block)``
            and ``n * (d + k)``.
        extra: candidates beyond k; more of them cost time and save second searches.
        backend: ``"jax"``: float32, on the default device, where products are asked
            for in full precision. ``"numpy"``: float64, on the host.

    Returns:
        ``(distances, indices)``, nearest first; among equals the lower index.

    Raises:
        ValueError: k is out of range, a value is not finite, or ``backend`` is
            unknown.

    Example:
        >>> distances, indices = neighbours(np.array([[0.0], [1.0], [3.0]]), 1)
        >>> distances[:, 0].round(5).tolist(), indices[:, 0].tolist()
        ([1.0, 1.0, 2.0], [1, 0, 1])
    """
    x = check_points(x)
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {BACKENDS}, got {backend!r}.")
    if block < 1 or extra < 0:
        raise ValueError(
            f"`block` must be at least 1 and `extra` at least 0, got {block} and "
            f"{extra}."
        )
    if not 1 <= k < len(x):
        raise ValueError(
            f"`k` is {k}, but {len(x)} points have {len(x) - 1} neighbours each; give "
            f"more points, or k from 1 to {len(x) - 1}."
        )
    single = backend == "jax" and x.dtype == np.float32
    wide = x if single else x.astype(np.float64)
    centred = wide - np.mean(wide, axis=0, dtype=np.float64).astype(wide.dtype)[None]
    size = float(np.sqrt(np.mean(np.square(centred, dtype=np.float64)))) or 1.0
    if backend == "numpy":
        r, indices = _numpy(centred / size, k, block, extra)
    else:
        points = (centred / wide.dtype.type(size)).astype(np.float32)
        r, indices = _jax(points, k, block, extra)
    return r.astype(np.float64) * size, indices


def check_points(x: Any) -> np.ndarray:
    """The points on the host, if they are points."""
    x = np.asarray(x)
    if x.dtype == jnp.bfloat16 or x.dtype.kind in "iub":
        x = x.astype(np.float32 if x.dtype == jnp.bfloat16 else np.float64)
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(
            f"`x` must be points [n, d] of a real dtype, got shape {x.shape} and "
            f"dtype {x.dtype}."
        )
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise ValueError(
            f"`x` has values that are not finite in {len(bad)} of {len(x)} rows, the "
            f"first of them row {bad[0]}."
        )
    return x


# ----------------------------------- In JAX -----------------------------------


def _jax(x, k: int, block: int, extra: int, gram_dtype=jnp.float32):
    """``gram_dtype`` of the products, for tests of what proves the result."""
    n, d = x.shape
    block, kept = min(block, n), min(k + extra, n - 1)
    blocks = -(-n // block)
    x = jnp.asarray(np.pad(x, ((0, blocks * block - n), (0, 0))))
    squares = jnp.sum(jnp.square(x), 1)
    pairs = np.array(list(itertools.combinations_with_replacement(range(blocks), 2)))
    near, candidates = _candidates(
        x.reshape(blocks, block, d),
        squares.reshape(blocks, block),
        jnp.asarray(pairs, np.int32),
        n=n,
        kept=kept,
        dtype=gram_dtype,
    )
    rows = max(1, min(n, _BYTES // (4 * d * kept)))
    r, indices = _refined(x, candidates, rows=rows, k=k)
    squares, r = np.asarray(squares[:n], np.float64), np.array(r[:n], np.float64)
    indices = np.array(indices[:n])
    if kept < n - 1:
        eps = float(jnp.finfo(gram_dtype).eps)
        margin = 4 * eps * d**0.5 * (squares + squares.max())
        last = np.asarray(near[:n, -1], np.float64)
        doubted = np.flatnonzero(~(np.square(r[:, -1]) <= last - margin))
        if len(doubted):
            again = np.resize(doubted, 1 << (len(doubted) - 1).bit_length())
            found = _direct(x, jnp.asarray(again, np.int32), n=n, k=k)
            r[doubted], indices[doubted] = (
                np.asarray(part)[: len(doubted)] for part in found
            )
    return r, indices


@functools.partial(jax.jit, static_argnames=("n", "kept", "dtype"))
def _candidates(x, squares, pairs, *, n: int, kept: int, dtype):
    """The ``kept`` smallest products of each point, and whose they are."""
    blocks, block, _ = x.shape
    place = lax.iota(jnp.int32, block)

    def merge(best, found, i, j):
        """The distances from block i to block j, into the best of block i."""
        own, other = i * block + place, j * block + place
        hidden = (own[:, None] == other[None]) | (other >= n)[None]
        found = jnp.where(hidden, jnp.inf, found)
        values = jnp.concatenate([best[0][i], found], 1)
        names = jnp.broadcast_to(other[None], found.shape)
        names = jnp.concatenate([best[1][i], names], 1)
        smallest, at = lax.top_k(-values, kept)
        names = jnp.take_along_axis(names, at, 1)
        return best[0].at[i].set(-smallest), best[1].at[i].set(names)

    def step(best, pair):
        i, j = pair
        products = jnp.einsum(
            "id,jd->ij",
            x[i].astype(dtype),
            x[j].astype(dtype),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        found = squares[i][:, None] + squares[j][None] - 2 * products
        best = merge(best, found, i, j)
        other = lambda best: merge(best, found.T, j, i)
        return lax.cond(i == j, lambda best: best, other, best), None

    shape = (blocks, block, kept)
    start = (jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
    (values, names), _ = lax.scan(step, start, pairs)
    return values.reshape(-1, kept), names.reshape(-1, kept)


def _nearest(r2, indices, k: int):
    """The k smallest of each row, nearest first, then by index."""
    r2, indices = lax.sort((r2, indices), num_keys=2)
    return jnp.sqrt(r2[..., :k]), indices[..., :k]


@functools.partial(jax.jit, static_argnames=("rows", "k"))
def _refined(x, candidates, *, rows: int, k: int):
    """Distances to the candidates by differences; ``rows`` points at a time."""

    def one(args):
        point, mine = args
        r2 = jnp.sum(jnp.square(x[mine] - point[None]), -1)
        return _nearest(r2, mine, k)

    return lax.map(one, (x, candidates), batch_size=rows)


@functools.partial(jax.jit, static_argnames=("n", "k"))
def _direct(x, rows, *, n: int, k: int):
    """Distances of some points to all others by differences, one point at a time."""
    names = lax.iota(jnp.int32, len(x))

    def one(i):
        r2 = jnp.sum(jnp.square(x - x[i][None]), -1)
        r2 = jnp.where((names == i) | (names >= n), jnp.inf, r2)
        return _nearest(r2, names, k)

    return lax.map(one, rows)


# ----------------------------------- In numpy -----------------------------------


def _numpy(x, k: int, block: int, extra: int):
    n, d = x.shape
    kept, squares = min(k + extra, n - 1), np.sum(np.square(x), 1)
    margin = 4 * np.finfo(np.float64).eps * d**0.5 * (squares + squares.max())
    r, indices = np.empty((n, k)), np.empty((n, k), np.int32)
    for start in range(0, n, block):
        rows = np.arange(start, min(start + block, n))
        gram = squares[rows, None] + squares[None] - 2 * x[rows] @ x.T
        gram[np.arange(len(rows)), rows] = np.inf
        for i, distances in zip(rows, gram, strict=True):
            mine = np.argpartition(distances, kept - 1)[:kept]
            last = distances[mine].max()
            r[i], indices[i] = _numpy_nearest(x, i, np.sort(mine), k)
            if kept < n - 1 and not r[i, -1] ** 2 <= last - margin[i]:
                r[i], indices[i] = _numpy_nearest(x, i, np.delete(np.arange(n), i), k)
    return r, indices


def _numpy_nearest(x, i, others, k: int):
    r2 = np.sum(np.square(x[others] - x[i][None]), 1)
    order = np.argsort(r2, kind="stable")[:k]
    return np.sqrt(r2[order]), others[order]
