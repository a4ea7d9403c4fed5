"""Intrinsic dimension of a cloud of points: TwoNN and Levina-Bickel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxpeft.dimension._duplicates import Cloud, DegenerateError, cloud
from jaxpeft.dimension._fit import check_discard, mle_fit, twonn_fit
from jaxpeft.dimension._neighbours import check_points, neighbours

SDS = ("analytic", "subsample")
_HALVES = 10


class IdEstimate(NamedTuple):
    """The intrinsic dimension of a cloud of points.

    Attributes:
        dim: the dimension; nan where there is none.
        sd: its standard deviation.
        n_used: distinct points.
        n_exact: points left out as equal to an earlier one.
        n_near: points left out as nearly equal to one.
        degenerate: whether there are fewer than three distinct points.
        method: how it was estimated, ``"twonn-linear"``.
        halves: the dimensions of ten random halves of the points, the same ones at
            every layer of a profile, where ``sd="subsample"``; for differences.
    """

    dim: float
    sd: float
    n_used: int
    n_exact: int
    n_near: int
    degenerate: bool
    method: str
    halves: tuple[float, ...] = ()


def twonn(
    x: Shaped[Any, "n d"],
    *,
    method: str = "linear",
    discard: int | float | None = None,
    duplicates: str = "merge",
    near_tol: int | float = 0.01,
    sd: str = "analytic",
    seed: int = 0,
    backend: str = "jax",
    block: int = 1024,
) -> IdEstimate:
    r"""Estimates the intrinsic dimension from the two nearest neighbours of each point.

    The formulas stand at ``twonn_fit``. The estimate does not change with rotation,
    shift and one scale for all features. It falls below the truth the more, the higher
    the true dimension and the fewer the points (10 dimensions, 2,000 points: 9.6):
    compare estimates from equally many points only.

    Args:
        x: points, a row each: hidden states of N texts at one layer.
        method: ``"linear"`` or ``"ml"``.
        discard: share of the largest ratios that is not used; by default 0.1 of
            ``"linear"`` and 0 of ``"ml"``.
        duplicates: as in ``cloud``.
        near_tol: as in ``cloud``.
        sd: ``"analytic"``: :math:`d / \sqrt{N}`, as if the ratios were independent;
            the truth is 1.1 to 1.4 times larger. ``"subsample"``: the spread over ten
            random halves without replacement, 1.1 to 1.4 times too large.
        seed: of the halves.
        backend: as in ``neighbours``.
        block: as in ``neighbours``.

    Returns:
        The estimate.

    Raises:
        DegenerateError: fewer than three distinct points.
        ValueError: an argument outside of what is allowed, or values in ``x`` that
            are not finite.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2)) @ np.ones((2, 9))
        >>> round(twonn(x).dim)  # a line in nine dimensions
        1

    References:
        Facco et al., Estimating the intrinsic dimension of datasets by a minimal
        neighborhood information, 2017.
    """
    discard = check_discard(method, discard)

    def fit(r: np.ndarray) -> float:
        return twonn_fit(r[:, 0], r[:, 1], method, discard)

    search = {"backend": backend, "block": block}
    found = cloud(x, 2, duplicates=duplicates, near_tol=near_tol, **search)
    return _estimate(x, found, fit, f"twonn-{method}", sd, seed, search)


def mle(
    x: Shaped[Any, "n d"],
    *,
    k: int = 25,
    comb: str = "harmonic",
    local: bool = False,
    duplicates: str = "merge",
    near_tol: int | float = 0.01,
    sd: str = "analytic",
    seed: int = 0,
    backend: str = "jax",
    block: int = 1024,
) -> IdEstimate | tuple[IdEstimate, Float[np.ndarray, " n_used"]]:
    """Estimates the intrinsic dimension by maximum likelihood over k neighbours.

    The formulas stand at ``mle_fit``; of the estimate as of ``twonn``.

    Args:
        x: points, a row each.
        k: how many neighbours, at least 2.
        comb: ``"harmonic"``, ``"mean"`` or ``"median"`` over points.
        local: whether to return the dimension at every distinct point as well.
        duplicates: as in ``cloud``.
        near_tol: as in ``cloud``.
        sd: as in ``twonn``; the analytic one is far too large here.
        seed: of the halves.
        backend: as in ``neighbours``.
        block: as in ``neighbours``.

    Returns:
        The estimate; with ``local=True`` a pair of it and one number a point.

    Raises:
        DegenerateError: fewer than three distinct points.
        ValueError: an argument outside of what is allowed, or k is too large.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> round(mle(x, k=20).dim)
        2

    References:
        Levina and Bickel, Maximum likelihood estimation of intrinsic dimension, 2005.
    """
    if k < 2:
        raise ValueError(f"`k` must be at least 2, got {k}")
    search = {"backend": backend, "block": block}
    found = cloud(x, k, duplicates=duplicates, near_tol=near_tol, **search)
    fit = lambda r: mle_fit(r, comb)[0]
    result = _estimate(x, found, fit, f"mle-{k}-{comb}", sd, seed, search)
    return (result, mle_fit(found.r, comb)[1]) if local else result


def no_dimension(n: int, method: str) -> IdEstimate:
    """What a profile holds where a layer has fewer than three distinct points."""
    nan = float("nan")
    return IdEstimate(nan, nan, 0, n, 0, True, method)


def _estimate(
    x: Any,
    found: Cloud,
    fit: Callable[[np.ndarray], float],
    method: str,
    sd: str,
    seed: int,
    search: dict[str, Any],
) -> IdEstimate:
    if sd not in SDS:
        raise ValueError(f"`sd` must be one of {SDS}, got {sd!r}")
    n, dim, halves = len(found.rows), fit(found.r), ()
    spread = dim / n**0.5
    if sd == "subsample":
        x, k = check_points(x), found.r.shape[1]
        halves = tuple(
            fit(_nearest(x[rows], k, search))
            for rows in _random_halves(len(x), found.rows, seed)
        )
        spread = float(np.std(halves, ddof=1))
    return IdEstimate(
        dim, spread, n, found.n_exact, found.n_near, False, method, halves
    )


def _random_halves(n: int, kept: np.ndarray, seed: int) -> list[np.ndarray]:
    """Ten halves of all rows, each without the copies that were merged.

    They depend on the number of rows and the seed alone: the same rows at each layer.
    """
    generator = np.random.default_rng(seed)
    halves = [generator.permutation(n)[: n // 2] for _ in range(_HALVES)]
    return [np.intersect1d(half, kept) for half in halves]


def _nearest(x: np.ndarray, k: int, search: dict[str, Any]) -> np.ndarray:
    if len(x) <= max(k, 2):
        # Fewer than three points have no dimension; more have one, and no spread.
        error = DegenerateError if len(x) < 3 else ValueError
        raise error(
            f"`sd`='subsample' needs halves of more than {max(k, 2)} distinct points, "
            f"got {len(x)}; give more points, or sd='analytic'."
        )
    return neighbours(x, k, **search)[0]


def plateau(
    x: Shaped[Any, "n d"],
    estimator: Callable[[Any], IdEstimate] = twonn,
    *,
    least: int = 128,
    seed: int = 0,
) -> IdEstimate:
    """Estimates at n, n / 2, n / 4, ... points, and takes where that changes least.

    Noise makes a cloud look larger at small distances, curvature at large ones; where
    two neighbouring scales agree, neither is felt.

    Args:
        x: points, a row each.
        estimator: what to estimate with.
        least: the fewest points to estimate from.
        seed: of the subsets, each half of the one before.

    Returns:
        The mean of the two neighbouring scales that differ least, with the larger
        one's counts, the smaller one's uncertainty, and no halves.

    Raises:
        ValueError: fewer than ``2 * least`` points.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(600, 2))
        >>> round(plateau(x).dim)
        2
    """
    x = check_points(x)
    if least < 4 or len(x) < 2 * least:
        raise ValueError(
            f"`x` has {len(x)} points; two scales need {2 * max(least, 4)}, with "
            f"`least` at least 4, got {least}"
        )
    order = np.random.default_rng(seed).permutation(len(x))
    sizes = [len(x)]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    each = [estimator(x[np.sort(order[:size])]) for size in sizes]
    steps = [abs(a.dim - b.dim) for a, b in zip(each, each[1:], strict=False)]
    at = int(np.argmin(steps))
    large, small = each[at : at + 2]
    dim, method = (large.dim + small.dim) / 2, f"{large.method}-plateau"
    return large._replace(dim=dim, sd=small.sd, method=method, halves=())
