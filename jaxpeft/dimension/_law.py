r"""How far the ratios of a cloud's distances are from the law that was fitted to them.

In a cloud that is uniform near every point, of dimension d, all estimators' ratios
have a known law. Each is turned into its probability under that law, which is uniform
if it holds, and the largest distance of the two distribution functions is taken
(Kolmogorov and Smirnov's), on the part that the estimator used.
"""

import math

import numpy as np
from jaxtyping import Float

# What clean clouds stay below, times the root of the number of points: 95 of 100, and
# 999 of 1000, by the share that TwoNN discards and by the farthest neighbour of the
# others; in between linear. The ratios of neighbouring points depend on each other, d
# is fitted, and no cloud is uniform over many neighbours, so that no textbook has it:
# `python -m benchmarks.dimension_fit` draws the clouds.
LEVELS = ("95", "99.9")
LIMITS = {
    "twonn": {0: (1.3, 1.7), 0.1: (1.3, 1.8), 0.25: (1.1, 1.55), 0.5: (1.0, 1.35)},
    "mle": {
        **{2: (1.3, 1.7), 4: (1.4, 1.7), 8: (1.4, 1.7), 16: (1.6, 2.05)},
        **{32: (2.3, 2.95), 64: (3.8, 4.6)},
    },
    "gride": {
        **{2: (1.3, 1.7), 4: (1.3, 1.8), 8: (1.3, 2.0), 16: (1.85, 2.4)},
        **{32: (2.55, 3.35), 64: (4.9, 5.9)},
    },
}


def twonn_law(
    log_ratios: Float[np.ndarray, " n"], dim: float
) -> Float[np.ndarray, " n"]:
    r"""Returns the probability of a smaller ratio of TwoNN, :math:`1 - \mu^{-d}`.

    Args:
        log_ratios: ``log mu``, of the second nearest distance over the nearest.
        dim: the dimension ``d``.

    References:
        Facco et al., Scientific Reports 7, 12140 (2017).
    """
    return -np.expm1(-dim * log_ratios)


def gride_law(
    log_ratios: Float[np.ndarray, " n"], dim: float, n1: int, n2: int
) -> Float[np.ndarray, " n"]:
    r"""Returns the probability of a smaller ratio :math:`r_{n2} / r_{n1}`.

    :math:`\mu^{-d}` has the Beta law of ``n1`` and ``n2 - n1``, whose distribution
    function is the tail of a binomial one.

    Args:
        log_ratios: of the distances to the neighbours ``n2`` and ``n1``.
        dim: the dimension ``d``.
        n1: the nearer neighbour, from 1.
        n2: the farther one.

    References:
        Denti et al., Scientific Reports 12, 20005 (2022).
    """
    p, total = np.exp(-dim * log_ratios), n2 - 1
    terms = (math.comb(total, j) * p**j * (1 - p) ** (total - j) for j in range(n1))
    return np.sum(np.stack(list(terms)), axis=0)


def mle_law(
    dim: float, local: Float[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    r"""Returns the probability of a larger local dimension ``1 / m``.

    :math:`(k - 1) \, d \, m` has the Gamma law of ``k - 1``.

    Args:
        dim: the dimension ``d``.
        local: ``1 / m`` of each point (``mle_fit``).
        k: neighbours.

    References:
        Levina and Bickel, NIPS 17 (2004).
    """
    t = (k - 1) * dim / local
    log_terms = [j * np.log(t) - t - math.lgamma(j + 1) for j in range(k - 1)]
    return 1 - np.sum(np.exp(np.stack(log_terms)), axis=0)


def law_distance(
    probabilities: Float[np.ndarray, " n"], discard: int | float = 0.0
) -> float:
    """Returns how far probabilities are from uniform ones (Kolmogorov and Smirnov's).

    Args:
        probabilities: under a law, of each point.
        discard: the share of the largest that is not looked at.

    Returns:
        The largest distance of the two distribution functions, from 0 to 1.
    """
    n = len(probabilities)
    kept = np.sort(probabilities)[: max(1, int(n * (1 - discard)))]
    steps = np.arange(len(kept) + 1) / n
    return float(max(np.max(steps[1:] - kept), np.max(kept - steps[:-1])))


def limits(kind: str, at: int | float, n: int) -> tuple[float, float]:
    """Returns what 95 of 100 and 999 of 1000 clean clouds of n points stay below.

    ``at`` is the share discarded, or the farthest neighbour; beyond the table's end
    they are taken to grow in proportion to that, roughly as they do.
    """
    table = LIMITS[kind]
    beyond = max(1.0, at / max(table)) if kind != "twonn" else 1.0
    of = lambda i: np.interp(at, list(table), [row[i] for row in table.values()])
    return tuple(float(of(i) * beyond / n**0.5) for i in (0, 1))
