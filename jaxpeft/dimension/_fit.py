"""From distances of neighbours to a dimension: the estimators themselves."""

import numpy as np
from jaxtyping import Float

METHODS = ("linear", "ml")
COMBINATIONS = ("harmonic", "mean", "median")
_EQUAL = 1e-6  # logarithms of ratios below this are rounding


def twonn_fit(
    r1: Float[np.ndarray, " n"],
    r2: Float[np.ndarray, " n"],
    method: str = "linear",
    discard: int | float | None = None,
) -> float:
    r"""Returns the TwoNN dimension of given distances.

    With :math:`\mu = r_2 / r_1` in rising order, of which the first
    :math:`m = \lfloor N (1 - f) \rfloor` are used,

    .. math::
        d_{linear} = \frac{\sum_i x_i y_i}{\sum_i x_i^2}, \quad
            x_i = \log \mu_i, \; y_i = -\log(1 - i / N), \qquad
        d_{ml} = \frac{m - 1}{\sum_i \log \mu_i + (N - m) \log \mu_m}

    Args:
        r1: distance of each point to its nearest other point.
        r2: distance to the second nearest.
        method: ``"linear"``, a line through the origin, or ``"ml"``, maximum
            likelihood with the largest ratios censored.
        discard: f, the share of the largest ratios that is not used, in [0, 1); by
            default 0.1 of ``"linear"``, which needs some, and 0 of ``"ml"``.

    Returns:
        The dimension.

    Raises:
        ValueError: an argument outside of what is allowed, a distance of 0, or ratios
            that are all 1.

    Example:
        >>> round(twonn_fit(np.ones(3), np.exp([0.1, 0.2, 0.6]), "ml"), 3)
        2.222

    References:
        Facco et al., Estimating the intrinsic dimension of datasets by a minimal
        neighborhood information, 2017, eq. 4 to 6; ``"ml"``: scikit-dimension.
    """
    discard = check_discard(method, discard)
    x = _log_ratios(r1, r2)
    n, m = len(x), _used(len(x), discard)
    if m < 2:
        raise ValueError(
            f"`discard` {discard} leaves {m} of {n} points; give more points or "
            "discard less."
        )
    x = np.sort(x)[:m]
    if method == "linear":
        y = -np.log1p(-np.arange(1, m + 1) / n)
        above, below = np.sum(x * y), np.sum(x * x)
    else:
        above, below = m - 1, np.sum(x) + (n - m) * x[-1]
    if x[-1] < _EQUAL:
        raise ValueError(
            "`r1` and `r2` are equal at every point used: a lattice, not a cloud of "
            "points in general position. It has no TwoNN dimension."
        )
    return float(above / below)


def twonn_points(
    r1: Float[np.ndarray, " n"],
    r2: Float[np.ndarray, " n"],
    discard: int | float = 0.1,
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Returns the points that ``"linear"`` fits a line to, to look at them.

    Args:
        r1: distance of each point to its nearest other point.
        r2: distance to the second nearest.
        discard: as in ``twonn_fit``, above 0.

    Returns:
        ``(log mu, -log(1 - i / N))``; where they leave the line, TwoNN's law does not
        hold.

    Example:
        >>> x, y = twonn_points(np.ones(10), np.exp(np.arange(1.0, 11.0)))
        >>> len(x), round(float(y[0]), 3)
        (9, 0.105)
    """
    x = _log_ratios(r1, r2)
    m = _used(len(x), check_discard("linear", discard))
    return np.sort(x)[:m], -np.log1p(-np.arange(1, m + 1) / len(x))


def mle_fit(
    r: Float[np.ndarray, "n k"], comb: str = "harmonic"
) -> tuple[float, Float[np.ndarray, " n"]]:
    r"""Returns the Levina-Bickel dimension of given distances.

    .. math::
        m_i = \frac{1}{k - 1} \sum_{j < k} \log \frac{r_{ik}}{r_{ij}}, \qquad
        d = 1 / \mathrm{mean}_i\, m_i \;\text{(harmonic)}, \quad
        \mathrm{mean}_i\, 1 / m_i, \quad \mathrm{median}_i\, 1 / m_i

    Args:
        r: distances to the k nearest other points, nearest first; k at least 2.
        comb: ``"harmonic"``, the maximum-likelihood pooling; ``"mean"``, about
            (k - 1) / (k - 2) larger, and at the mercy of one tight neighbourhood; or
            ``"median"``.

    Returns:
        The dimension, and ``1 / m_i`` of every point.

    Raises:
        ValueError: ``comb`` is unknown, k is below 2, or a distance is 0.

    Example:
        >>> d, local = mle_fit(np.exp([[0.0, 0.5], [0.0, 1.0]]), "mean")
        >>> d, local.tolist()
        (1.5, [2.0, 1.0])

    References:
        Levina and Bickel, Maximum likelihood estimation of intrinsic dimension, 2005;
        ``"harmonic"``: MacKay and Ghahramani, comments on it, 2005.
    """
    if comb not in COMBINATIONS:
        raise ValueError(f"`comb` must be one of {COMBINATIONS}, got {comb!r}")
    if r.shape[1] < 2:
        raise ValueError(f"`k` must be at least 2, got {r.shape[1]}")
    _check_positive(r[:, 0])
    m = np.mean(np.log(r[:, -1:] / r[:, :-1]), axis=1)
    if np.any(m < _EQUAL):
        raise ValueError(
            f"{np.count_nonzero(m < _EQUAL)} points have all {r.shape[1]} neighbours "
            "at one distance: a lattice has no such dimension. Give a larger `k`."
        )
    local = 1 / m
    means = {"harmonic": 1 / np.mean(m), "mean": np.mean(local)}
    return float(means.get(comb, np.median(local))), local


def gride_fit(
    r1: Float[np.ndarray, " n"], r2: Float[np.ndarray, " n"], n1: int = 8, n2: int = 16
) -> tuple[float, float]:
    r"""Returns the Gride dimension of given distances, and its standard deviation.

    The maximum over d, which is the only one, of the likelihood of
    :math:`\mu = r_{n2} / r_{n1}`,

    .. math::
        f(\mu) = \frac{d \, (\mu^d - 1)^{n_2 - n_1 - 1}}
            {B(n_2 - n_1, n_1) \, \mu^{(n_2 - 1) d + 1}}

    With ``n2 = n1 + 1`` it is :math:`N / (n_1 \sum \log \mu)`, and with ``n1 = 1``
    TwoNN's, whose ``"ml"`` has N - 1 for N.

    Args:
        r1: distance of each point to its ``n1``-th nearest other point.
        r2: distance to the ``n2``-th nearest.
        n1: the nearer neighbour, from 1.
        n2: the farther one, above ``n1``.

    Returns:
        The dimension, and its deviation by the curvature of the likelihood, as if the
        ratios were independent.

    Raises:
        ValueError: ``n1`` or ``n2`` out of range, a distance of 0, or ratios that are
            all 1.

    Example:
        >>> dim, sd = gride_fit(np.ones(2), np.exp([0.1, 0.3]), n1=1, n2=2)
        >>> round(dim, 6), round(sd, 6)
        (5.0, 3.535534)

    References:
        Denti et al., The generalized ratios intrinsic dimension estimator, 2022.
    """
    check_orders(n1, n2)
    x = _log_ratios(r1, r2)
    if np.max(x) < _EQUAL:
        raise ValueError(
            f"neighbours {n1} and {n2} are equally far at every point: a lattice has "
            "no such dimension. Give a larger `n2`."
        )
    n, more, total = len(x), n2 - n1 - 1, n1 * float(np.sum(x))
    x = x[x > 0]  # where two are equally far, a term has its limit
    equal = more * (n - len(x))

    def slope(d: float) -> float:
        """Of the log-likelihood, times d: it falls, from (n2 - n1) n at 0."""
        y = d * x
        return n + equal + more * np.sum(y * np.exp(-y) / -np.expm1(-y)) - d * total

    low = high = n / total
    while slope(high) > 0:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:  # to the last bit
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    bend = np.sum(np.square(x) * np.exp(-low * x) / np.square(np.expm1(-low * x)))
    curvature = (n + equal) / low**2 + more * bend
    return float(low), float(curvature**-0.5)


def check_orders(n1: int, n2: int) -> None:
    """Raises where these are no two neighbours, the nearer first."""
    if not 1 <= n1 < n2:
        raise ValueError(
            f"`n1` must be at least 1 and `n2` above it, got {n1} and {n2}; write "
            "n1=8, n2=16."
        )


def check_discard(method: str, discard: int | float | None) -> float:
    """The share to discard, of a method that is known."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}")
    discard = {"linear": 0.1, "ml": 0.0}[method] if discard is None else discard
    if not 0 <= discard < 1:
        raise ValueError(f"`discard` must be in [0, 1), got {discard}")
    if method == "linear" and discard == 0:
        raise ValueError(
            "`discard` must be above 0 with method='linear', whose last point lies at "
            "infinity; write discard=0.1, or method='ml'."
        )
    return float(discard)


def _used(n: int, discard: float) -> int:
    used = int(n * (1 - discard))
    return used if discard == 0 else min(used, n - 1)


def _check_positive(r1: np.ndarray) -> None:
    if zeros := np.count_nonzero(r1 == 0):
        raise ValueError(
            f"{zeros} of {len(r1)} points lie on another point and have no ratio of "
            "distances; write duplicates='merge'."
        )


def _log_ratios(r1: np.ndarray, r2: np.ndarray) -> np.ndarray:
    _check_positive(r1)
    return np.log(np.asarray(r2, np.float64) / np.asarray(r1, np.float64))
