"""Exact nearest neighbours in blocks: found by products, proved by differences."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int, Shaped

BACKENDS = ("jax", "numpy")
_BYTES = {"cpu": 2**20}  # of differences at a time; on a host in a core's cache
_MANY_BYTES = 2**26
_COARSE = 256  # features from which on coarse products are tried first
_ALIGNED = 64  # bytes
_SPARE = 2  # candidates beyond k that are measured at first


def neighbours(
    x: Shaped[Any, "n d"],
    k: int,
    *,
    block: int = 1024,
    extra: int = 8,
    backend: str = "jax",
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    r"""Returns the k nearest other points of every point, exactly.

    Candidates come from :math:`|p|^2 + |q|^2 - 2 p \cdot q` of centred, scaled points,
    one pair of blocks at a time, each pair once; their distances from differences
    :math:`|p - q|`, which do not cancel. Where rounding of the products could have
    hidden a nearer point, that point's distances to all others are taken by
    differences. Of the candidates only k and two are measured where products show that
    no other can be nearer. Points of 256 features or more are rounded to bfloat16 for a
    first round of products, and what that cut off is reckoned with; only where it
    leaves more than one point in 64 open are there products in full precision. A point
    is not its own neighbour, by its index: copies of it are.

    Args:
        x: points, a row each; any real dtype, on any device.
        k: how many, from 1 to n - 1.
        block: points in a block; memory is of the order of ``block * (d + block)``
            and ``n * (d + k)``.
        extra: candidates beyond k; more of them cost time and save second searches.
        backend: ``"jax"``: float32, on the default device. ``"numpy"``: float64, on
            the host.

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
    return search(x, k, backend=backend, block=block, extra=extra)


def search(
    x: np.ndarray,
    k: int,
    *,
    backend: str,
    block: int,
    extra: int = 8,
    few: int | None = None,
    near_tol: int | float = 0.0,
) -> tuple[Float[np.ndarray, "n some"], Int[np.ndarray, "n some"]]:
    """As ``neighbours``, of points that are checked.

    With only the ``few`` nearest where it is sure of every point that its nearest
    neighbour is no nearer than ``near_tol`` times its k-th.
    """
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
    if backend == "numpy":
        points, size = _scaled(x, np.float64, 1)
        r, indices = _numpy(points, k, block, extra)
    else:
        block = min(block, len(x))
        points, size = _scaled(x, np.float32, block)
        near = None if few is None else (few, near_tol)
        r, indices = _jax(points, len(x), k, block, extra, near=near)
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


def _scaled(x: np.ndarray, dtype: Any, block: int) -> tuple[np.ndarray, float]:
    """Centred points of mean square 1, and what they were divided by.

    In float64, or float32 throughout where ``x`` and the result are; a part at a time.
    Rows of zeros are added up to a multiple of ``block``.
    """
    n, d = x.shape
    wide = np.result_type(x.dtype, dtype)
    mean = np.mean(x, axis=0, dtype=np.float64).astype(wide)[None]
    rows = max(1, _BYTES["cpu"] // mean.nbytes)
    parts = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    total = sum(_square(x[part] - mean) for part in parts)
    if not 1e-30 < total < np.inf:  # of the least and the largest float32
        total = sum(_square((x[part] - mean).astype(np.float64)) for part in parts)
    size = float(np.sqrt(total / x.size)) or 1.0
    points = _aligned((-(-n // block) * block, d), dtype)
    for part in parts:
        points[part] = (x[part] - mean) / wide.type(size)
    return points, size


def _square(x: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.dot(x.ravel(), x.ravel()))


def _aligned(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Zeros that start where JAX on a host can use them without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


# ----------------------------------- In JAX -----------------------------------


def _jax(x, n: int, k: int, block: int, extra: int, gram_dtype=None, near=None):
    """Of the first n rows of ``x``, whole blocks of which the others are zero.

    ``gram_dtype`` of the products is for tests of what proves the result. Without one,
    products of many features are taken in bfloat16 first, at twice the speed or more;
    where too many points stay open, in float32 after all. ``near`` as in ``search``.
    """
    few, tol = near or (k, 0.0)
    kept = min(max(k, few + extra), n - 1)
    x = jax.device_put(x)
    coarse = [jnp.bfloat16] if x.shape[1] >= _COARSE else []
    for dtype in [gram_dtype] if gram_dtype else [*coarse, jnp.float32]:
        found = _candidates(x, n, block=block, kept=kept, dtype=dtype)
        names, floors, ceilings = (np.asarray(part)[:n] for part in found)
        r, indices, doubted = _measured(x, names, floors, few)
        if 64 * len(doubted) <= n:
            break
    if len(doubted):
        parts = _direct(x, _padded(doubted), n=n, k=r.shape[1])
        r[doubted], indices[doubted] = (
            np.asarray(part)[: len(doubted)] for part in parts
        )
    if few < k and np.any(r[:, 0] < tol * ceilings[:, k - 1]):
        return _jax(x, n, k, block, extra, gram_dtype)
    return r, indices


def _measured(x, names: np.ndarray, floors: np.ndarray, k: int):
    """The k nearest of the candidates, and of which points it is not sure.

    The first few candidates are measured, and all others only where one of them may be
    nearer than the k-th.
    """
    n, kept = names.shape
    first = min(k + _SPARE, kept)
    r, indices = _nearest_of(x, np.arange(n), names[:, :first], k)
    left = np.flatnonzero(~(r[:, -1] <= floors[:, min(first, kept - 1)]))
    if len(left) and first < kept:
        r[left], indices[left] = _nearest_of(x, left, names[left], k)
        left = left[~(r[left, -1] <= floors[left, -1])]
    return r, indices, left if kept < n - 1 else left[:0]


def _nearest_of(x, who: np.ndarray, names: np.ndarray, k: int):
    """Distances of some points to their candidates by differences, the k least."""
    n, each = names.shape
    many = _BYTES.get(jax.default_backend(), _MANY_BYTES)
    rows = max(1, min(n, many // (4 * x.shape[1] * each)))
    whole = np.resize(who, len(x)).astype(np.int32)
    padded = min(whole, _padded(who), key=len)
    at = np.resize(names, (len(padded), each))
    r, indices = _refined(x, padded, at, rows=rows, k=k)
    return np.array(r, np.float64)[:n], np.array(indices)[:n]


def _padded(rows: np.ndarray) -> np.ndarray:
    """Repeated up to a power of two, so that few sizes are compiled."""
    return np.resize(rows, 1 << (len(rows) - 1).bit_length()).astype(np.int32)


def _candidates(x, n: int, *, block: int, kept: int, dtype):
    r"""The ``kept`` nearest of each point by products, and bounds of their distances.

    Points :math:`x = c + e`, with c in ``dtype`` and products of c summed in float32:
    :math:`|x_i - x_j| \ge |c_i - c_j| - |e_i| - |e_j|`.

    Returns:
        Whose they are ``[rows, kept]``; the least distance that each and all behind it
        can have, also those that are not among them; and the largest that each and all
        before it can have.
    """
    starts = range(0, len(x), block)
    # Sliced before: on hosts a slice that is fused is read at half the speed.
    parts = [
        _coarse(lax.slice_in_dim(x, i, i + block), n - i, dtype=dtype) for i in starts
    ]
    best = [
        (
            jnp.full((block, kept), -jnp.inf, jnp.float32),
            jnp.zeros((block, kept), jnp.int32),
        )
    ] * len(parts)
    # A loop of calls: on hosts, XLA's products in a scan take twice the time.
    for i, one in enumerate(parts):
        best[i] = _within(one, best[i], starts[i])
        for j in range(i + 1, len(parts)):
            best[i], best[j] = _between(
                one, parts[j], best[i], best[j], starts[i], starts[j]
            )
    return _bounded(parts, best)


class _Part(NamedTuple):
    """A block of points c, minus their squares, and the lengths of what is cut off.

    A row that only fills the block has minus infinity for its square.
    """

    c: Any
    minus: Any
    off: Any


@functools.partial(jax.jit, static_argnames="dtype")
def _coarse(x, n, *, dtype):
    kind = jnp.finfo(dtype)
    c = lax.reduce_precision(x, kind.nexp, kind.nmant)  # on hosts faster than casts
    square = jnp.sum(jnp.square(c), 1)
    minus = jnp.where(lax.iota(jnp.int32, len(x)) < n, -square, -jnp.inf)
    return _Part(c.astype(dtype), minus, jnp.sqrt(jnp.sum(jnp.square(x - c), 1)))


def _closeness(one, other):
    """Minus the squared distances: the nearest first, for ``top_k``."""
    products = jnp.einsum(
        "id,jd->ij",
        one.c,
        other.c,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return 2 * products + one.minus[:, None] + other.minus[None]


def _merged(best, found, start):
    """The largest of ``found``, of points from ``start`` on, and of the best so far."""
    kept, block = best[0].shape[1], found.shape[1]
    values, at = lax.top_k(found, min(kept, block))
    values = jnp.concatenate([best[0], values], 1)
    names = jnp.concatenate([best[1], at + start], 1)
    values, at = lax.top_k(values, kept)
    return values, jnp.take_along_axis(names, at, 1)


@jax.jit
def _within(part, best, start):
    """The best of a block's points in the block."""
    own = jnp.eye(len(part.c), dtype=bool)
    return _merged(best, jnp.where(own, -jnp.inf, _closeness(part, part)), start)


@jax.jit
def _between(one, other, best, best_other, start, start_other):
    """The best of two blocks' points in the other one."""
    found = _closeness(one, other)
    mine = _merged(best, found, start_other)
    return mine, _merged(best_other, found.T, start)


@jax.jit
def _bounded(parts, best):
    minus, off = (jnp.concatenate([part[i] for part in parts]) for i in (1, 2))
    values, names = (jnp.concatenate(part) for part in zip(*best, strict=True))
    squares = jnp.where(jnp.isinf(minus), 0, -minus)
    d = parts[0].c.shape[1]
    rounding = 4 * np.finfo(np.float32).eps * d**0.5 * (squares + jnp.max(squares))
    off, rounding = (off + jnp.max(off))[:, None], rounding[:, None]
    least = jnp.sqrt(jnp.maximum(-values - rounding, 0)) - off
    most = jnp.sqrt(jnp.maximum(-values, 0) + rounding) + off
    return names, least, most


def _nearest(r2, indices, k: int):
    """The k smallest of each row, nearest first, then by index."""
    r2, indices = lax.sort((r2, indices), num_keys=2)
    return jnp.sqrt(r2[..., :k]), indices[..., :k]


@functools.partial(jax.jit, static_argnames=("rows", "k"))
def _refined(x, who, candidates, *, rows: int, k: int):
    """Distances to the candidates by differences; ``rows`` points at a time."""

    def one(args):
        i, mine = args
        r2 = jnp.sum(jnp.square(x[mine] - x[i][None]), -1)
        return _nearest(r2, mine, k)

    return lax.map(one, (who, candidates), batch_size=rows)


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
