"""Intrinsic dimension of a cloud of points: TwoNN, Levina-Bickel and Gride."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxpeft.dimension import _law as law
from jaxpeft.dimension._fit import (
    check_discard,
    check_orders,
    gride_fit,
    mle_fit,
    twonn_fit,
)
from jaxpeft.dimension._neighbours import check_points
from jaxpeft.dimension._points import Points

SDS = ("analytic", "subsample")
ANALYTIC = (
    "analytic sds are too small: on hidden states of real models estimators differed "
    "by 8 to 18 of them"
)


class PoorFitWarning(UserWarning):
    """The law that an estimator rests on does not hold of the points."""


class IdEstimate(NamedTuple):
    """The intrinsic dimension of a cloud of points.

    An estimate is the one number of a law of distances that has just one. ``fit`` says
    whether they follow it: the largest distance between the distribution function of
    the ratios that the estimator looks at and the fitted one, on the part of them that
    it uses. Where it does not hold (near copies, parts of several dimensions, a
    lattice) ``dim`` is a number that means little, however small its ``sd``.

    Attributes:
        dim: the dimension; nan where there is none.
        sd: its standard deviation. The analytic one is that of independent ratios of
            points that follow the law, too small: on hidden states of real models
            estimators differed by 8 to 18 of them.
        n_used: distinct points.
        n_exact: points left out as equal to an earlier one.
        n_near: points left out as nearly equal to one.
        degenerate: whether there are fewer than three distinct points.
        method: how it was estimated, ``"twonn-linear"``.
        halves: the dimensions of ten random halves of the points, the same ones at
            every layer of a profile, where ``sd="subsample"``; for differences.
        fit: the distance, from 0, a good one, to 1; nan where it is not known.
        fit_95: what 95 of 100 clean clouds of as many points stay below.
        fit_999: what 999 of 1000 do; a larger ``fit`` is a poor one.
    """

    dim: float
    sd: float
    n_used: int
    n_exact: int
    n_near: int
    degenerate: bool
    method: str
    halves: tuple[float, ...] = ()
    fit: float = float("nan")
    fit_95: float = float("nan")
    fit_999: float = float("nan")

    @property
    def poor(self) -> bool:
        """Whether the fit is worse than that of 999 of 1000 clean clouds."""
        return self.fit > self.fit_999


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

    Warns:
        PoorFitWarning: the ratios do not follow the law, so the dimension means little;
            see ``IdEstimate``.

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
    rule = _Rule(
        f"twonn-{method}",
        2,
        lambda r: twonn_fit(r[:, 0], r[:, 1], method, discard),
        lambda r, dim: law.twonn_law(np.log(r[:, 1] / r[:, 0]), dim),
        lambda n: law.limits("twonn", discard, n),
        discard,
    )
    return _estimate(x, rule, duplicates, near_tol, sd, seed, backend, block)[0]


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
        The estimate; with ``local=True`` a pair of it and one number a point. Its
        ``fit`` is of the local dimensions to their law around the ``"harmonic"`` one.

    Warns:
        PoorFitWarning: as of ``twonn``; here as well where the dimension is not the
            same everywhere.

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
    rule = _Rule(
        f"mle-{k}-{comb}",
        k,
        lambda r: mle_fit(r, comb)[0],
        lambda r, dim: law.mle_law(*mle_fit(r), k),
        lambda n: law.limits("mle", k, n),
    )
    result, r = _estimate(x, rule, duplicates, near_tol, sd, seed, backend, block)
    return (result, mle_fit(r, comb)[1]) if local else result


def gride(
    x: Shaped[Any, "n d"],
    *,
    n1: int = 8,
    n2: int | None = None,
    duplicates: str = "merge",
    near_tol: int | float = 0.01,
    sd: str = "analytic",
    seed: int = 0,
    backend: str = "jax",
    block: int = 1024,
) -> IdEstimate:
    r"""Estimates the intrinsic dimension from two neighbours further out than TwoNN's.

    What bends the nearest distances, as noise, rounding and near copies do, is hardly
    felt there: of 2,000 points of dimension 5 of which a tenth stand twice, TwoNN gives
    0.8 to 2.5 by how near, and this 4.9 to 5. The further out, the more the estimate
    feels curvature and an uneven density. The likelihood stands at ``gride_fit``.

    Notation:
        paper             here
        n_1, n_2          n1, n2
        mu, r_n2 / r_n1   the ratio of two columns of ``neighbours``

    Args:
        x: points, a row each.
        n1: the nearer neighbour, from 1; 1 and 2 are TwoNN's.
        n2: the farther one; ``None``: twice ``n1``, as in the paper.
        duplicates: as in ``cloud``.
        near_tol: as in ``cloud``.
        sd: ``"analytic"``: by the curvature of the likelihood, as if the ratios were
            independent, which with more neighbours is more too small than of
            ``twonn``; or ``"subsample"``, as there.
        seed: of the halves.
        backend: as in ``neighbours``.
        block: as in ``neighbours``.

    Returns:
        The estimate.

    Warns:
        PoorFitWarning: as of ``twonn``.

    Raises:
        DegenerateError: fewer than three distinct points.
        ValueError: an argument outside of what is allowed, or too few points.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> round(gride(x).dim)
        2

    References:
        Denti et al., The generalized ratios intrinsic dimension estimator, Scientific
        Reports 2022.
    """
    n2 = 2 * n1 if n2 is None else n2
    check_orders(n1, n2)
    columns = lambda r: (r[:, n1 - 1], r[:, n2 - 1])
    rule = _Rule(
        f"gride-{n1}-{n2}",
        n2,
        lambda r: gride_fit(*columns(r), n1, n2)[0],
        lambda r, dim: law.gride_law(-np.log(np.divide(*columns(r))), dim, n1, n2),
        lambda n: law.limits("gride", n2, n),
        spread=lambda r: gride_fit(*columns(r), n1, n2)[1],
    )
    return _estimate(x, rule, duplicates, near_tol, sd, seed, backend, block)[0]


def no_dimension(n: int, method: str) -> IdEstimate:
    """What a profile holds where a layer has fewer than three distinct points."""
    nan = float("nan")
    return IdEstimate(nan, nan, 0, n, 0, True, method)


class _Rule(NamedTuple):
    """An estimator: what it makes of distances, and the law of what it looks at."""

    method: str
    k: int
    fit: Callable[[np.ndarray], float]
    law: Callable[[np.ndarray, float], np.ndarray]
    limits: Callable[[int], tuple[float, float]]
    discard: float = 0.0
    spread: Callable[[np.ndarray], float] | None = None


def _estimate(
    x: Any,
    rule: _Rule,
    duplicates: str,
    near_tol: int | float,
    sd: str,
    seed: int,
    backend: str,
    block: int,
) -> tuple[IdEstimate, np.ndarray]:
    """The estimate, and the distances it rests on."""
    if sd not in SDS:
        raise ValueError(f"`sd` must be one of {SDS}, got {sd!r}")
    points = x if isinstance(x, Points) else Points(x)
    search = {"backend": backend, "block": block}
    found = points.cloud(rule.k, duplicates=duplicates, near_tol=near_tol, **search)
    n, dim, halves = len(found.rows), rule.fit(found.r), ()
    if sd == "subsample":
        each = points.halves(rule.k, found, seed, search)
        halves = tuple(rule.fit(r) for r in each)
        spread = float(np.std(halves, ddof=1))
    else:
        spread = rule.spread(found.r) if rule.spread else dim / n**0.5
    fit = law.law_distance(rule.law(found.r, dim), rule.discard)
    result = IdEstimate(
        *(dim, spread, n, found.n_exact, found.n_near, False, rule.method, halves),
        *(fit, *rule.limits(n)),
    )
    warn_of_poor_fit([result], "the points", 4)
    return result, found.r


def warn_of_poor_fit(
    estimates: list[IdEstimate], what: str, stacklevel: int = 3
) -> None:
    """Warns once, if an estimate has a poor fit."""
    poor = [each for each in estimates if each.poor]
    if poor:
        one = max(poor, key=lambda each: each.fit / each.fit_999)
        warnings.warn(
            f"{what} do not follow the law that {one.method} fits: {one.fit:.3f} from "
            f"it, and of clean clouds 999 of 1000 stay below {one.fit_999:.3f}. The "
            f"dimension, {one.dim:.2f}, means little. Points that nearly stand twice, "
            "rounding, or parts of several dimensions do that: look at "
            "dimension.plot_fit, remove repeated inputs, and compare dimension.gride, "
            "which hardly feels near copies.",
            PoorFitWarning,
            stacklevel=stacklevel,
        )


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
        one's counts, the smaller one's uncertainty, the worse fit, and no halves.

    Warns:
        PoorFitWarning: one of the two does not follow the estimator's law.

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)  # one of them all, below
        each = [estimator(x[np.sort(order[:size])]) for size in sizes]
    steps = [abs(a.dim - b.dim) for a, b in zip(each, each[1:], strict=False)]
    at = int(np.argmin(steps))
    large, small = each[at : at + 2]
    dim, method = (large.dim + small.dim) / 2, f"{large.method}-plateau"
    worse = large if large.fit / large.fit_999 > small.fit / small.fit_999 else small
    result = large._replace(dim=dim, sd=small.sd, method=method, halves=())
    result = result._replace(fit=worse.fit, fit_95=worse.fit_95, fit_999=worse.fit_999)
    warn_of_poor_fit([result], "the points")
    return result
