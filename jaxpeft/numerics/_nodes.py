"""From scores of nodes over steps to a matrix, and from a matrix to chosen nodes."""

from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpeft.numerics._graph import Graph, group_graph

ROWS = ("center", "unit", "none")
SELECTORS = ("ggm", "score", "cov", "ridge", "pinv", "random")
RIDGE = 0.5  # how much of the identity `ridge` mixes in


class NodeScores(NamedTuple):
    """Scores of n nodes over steps, as ``rank_nodes`` takes them.

    Attributes:
        matrix: S ``[n, n]``, shrunk: what the graph is estimated from.
        correlation: ``[n, n]``, not shrunk.
        covariance: ``[n, n]``, not shrunk.
        mean: ``[n]``, mean logarithm; minus infinity for a node that never scored.
        silent: ``[n]``, whether a node never scored, or never changed: its rows are
            those of the identity.
    """

    matrix: np.ndarray
    correlation: np.ndarray
    covariance: np.ndarray
    mean: np.ndarray
    silent: np.ndarray


class Ranking(NamedTuple):
    """How strongly each node hangs together with the important ones.

    Attributes:
        values: ``[n]``, larger is stronger; silent nodes have minus infinity.
        graph: what the solver found, where the selector has one.
    """

    values: np.ndarray
    graph: Graph | None = None


def node_scores(
    scores: Any,
    *,
    row: Literal["center", "unit", "none"] = "none",
    standardise: bool = True,
    shrink: int | float = 0.2,
    thin: int = 1,
) -> NodeScores:
    r"""Returns how the scores of nodes vary together.

    .. math::
        x_{ti} = \log \text{score}_{ti},
        \qquad S = (1 - c)\, \mathrm{corr}(x) + c\, I

    The scale of a step's gradient is common to all nodes and says nothing about any
    two. A graph has room for one thing in common to all, and is as good with it; plain
    correlations drown in it, and so does by="cov" of ``rank_nodes``, unless
    ``row="center"`` takes the mean over nodes off each step. That makes the matrix
    nearly singular, and costs a graph what it knows where many nodes hang together
    (benchmarks/graph_recovery.py).

    Args:
        scores: ``[steps, n]``, at least 0, finite. A 0 counts as the node's smallest
            positive score.
        row: "none" as above; "center" takes off each step's mean over nodes; "unit"
            divides each step's logarithms by their norm, as the authors do.
        standardise: correlations; ``False``: covariances (the authors).
        shrink: c, from 0 to 1.
        thin: keep every so many-th step.

    Returns:
        ``NodeScores``, float64.

    Raises:
        ValueError: an argument outside of what is allowed; fewer than two steps; no
            node that varies; without shrinkage, no more steps than nodes.

    Example:
        >>> steps = np.exp(np.random.default_rng(0).normal(size=(50, 3)))
        >>> node_scores(steps).matrix.shape
        (3, 3)

    References:
        Zheng and Cao, arXiv 2412.08592, and its code. Shrinkage: Ledoit and Wolf, A
        well-conditioned estimator for large-dimensional covariance matrices, 2004.
    """
    scores = np.array(scores, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"`scores` must be [steps, n], got shape {scores.shape}")
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise ValueError("`scores` must be finite and at least 0")
    if row not in ROWS:
        raise ValueError(f"`row` must be one of {', '.join(ROWS)}, got {row!r}")
    if not 0 <= shrink <= 1:
        raise ValueError(f"`shrink` must be from 0 to 1, got {shrink}")
    if thin < 1:
        raise ValueError(f"`thin` must be at least 1, got {thin}")
    scores = scores[::thin]
    steps, n = scores.shape
    if steps < 2:
        raise ValueError(
            f"`scores` must have at least 2 steps, got {steps}; collect for longer, or "
            f"take a smaller `thin` than {thin}"
        )
    if steps <= n and shrink == 0:
        raise ValueError(
            f"{steps} steps of {n} nodes make a singular matrix; collect more than {n} "
            "steps, or write shrink=0.2"
        )
    dead = ~np.any(scores > 0, axis=0)
    least = np.min(np.where(scores > 0, scores, np.inf), axis=0)
    logs = np.log(np.where(scores > 0, scores, np.where(dead, 1.0, least)[None, :]))
    mean = np.where(dead, -np.inf, logs.mean(0))
    still = np.ptp(logs, axis=0) <= 1e-12 * np.maximum(1.0, np.abs(logs).max(0))
    x = np.where(still[None, :], 0.0, logs)
    if row == "center" and not np.all(still):
        common = x.sum(1, keepdims=True) / np.sum(~still)
        x = np.where(still[None, :], 0.0, x - common)
    if row == "unit":
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(norms > 0, norms, 1.0)
    x = x - x.mean(0, keepdims=True)
    silent = still | (np.max(np.abs(x), axis=0) <= 1e-12)
    if np.all(silent):
        raise ValueError(
            "no node's scores vary over the steps, so nothing can be estimated; "
            "collect while the leaves are trained"
        )
    x = np.where(silent[None, :], 0.0, x)
    covariance = x.T @ x / (steps - 1)
    covariance[silent, silent] = 1.0
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    chosen = correlation if standardise else covariance
    matrix = (1 - shrink) * chosen + shrink * np.eye(n)
    return NodeScores(matrix, correlation, covariance, mean, silent)


def important_nodes(mean: Any, count: int) -> np.ndarray:
    """Returns the ``count`` nodes of largest mean logarithm, sorted; ties in order.

    Args:
        mean: ``[n]``, ``NodeScores.mean``.
        count: how many, at least 1; no more than nodes that ever scored.

    Raises:
        ValueError: ``count`` is out of range.

    Example:
        >>> important_nodes([0.1, 3.0, 2.0], 2)
        array([1, 2])
    """
    mean = np.asarray(mean, np.float64)
    alive = int(np.sum(np.isfinite(mean)))
    if not 1 <= count <= alive:
        raise ValueError(
            f"`count` of important nodes must be from 1 to the {alive} nodes that "
            f"have a score, got {count}"
        )
    return np.sort(np.argsort(-mean, kind="stable")[:count])


def rank_nodes(
    found: NodeScores,
    important: Any,
    *,
    by: Literal["ggm", "score", "cov", "ridge", "pinv", "random"] = "ggm",
    rank_by: Literal["omega", "delta"] = "omega",
    rcond: int | float = 1e-15,
    seed: int = 0,
    **options: Any,
) -> Ranking:
    r"""Returns how strongly nodes depend on the important ones, by one selector.

    Args:
        found: from ``node_scores``.
        important: I, indices of nodes.
        by: "ggm": norms of Omega's columns, :math:`\lVert \Omega_{I j} \rVert`
            (``group_graph``); "score": the mean logarithm alone; "cov": norms of the
            correlation's columns, no graph; "ridge": of
            :math:`((1 - c) \mathrm{corr} + c I)^{-1}`, c = 0.5, a graph without the
            penalty; "pinv": of the covariance's pseudo-inverse, which is what the
            authors' code amounts to; "random": a floor.
        rank_by: "delta" takes the columns of Delta, with exact zeros, for "ggm".
        rcond: singular values below this part of the largest count as 0, for "pinv".
        seed: for "random".
        **options: of ``group_graph``, for "ggm".

    Returns:
        A ``Ranking``.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> steps = np.exp(np.random.default_rng(0).normal(size=(50, 3)))
        >>> rank_nodes(node_scores(steps), [0], by="cov").values.shape
        (3,)
    """
    choices = {"by": (by, SELECTORS), "rank_by": (rank_by, ("omega", "delta"))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(allowed)}, got {value!r}"
            )
    n, graph = len(found.mean), None
    index = np.asarray(important, int)
    if by == "score":
        values = found.mean
    elif by == "random":
        values = np.random.default_rng(seed).uniform(size=n)
    else:
        if by == "ggm":
            graph = group_graph(found.matrix, index.tolist(), **options)
            matrix = graph.omega if rank_by == "omega" else graph.delta
        elif by == "cov":
            matrix = found.correlation
        elif by == "ridge":
            matrix = (1 - RIDGE) * found.correlation + RIDGE * np.eye(n)
            matrix = np.linalg.inv(matrix)
        else:
            matrix = np.linalg.pinv(found.covariance, rcond=rcond, hermitian=True)
        values = np.linalg.norm(matrix[index], axis=0)
    return Ranking(np.where(found.silent, -np.inf, values), graph)


def select_nodes(
    values: Any,
    important: Any,
    *,
    count: int | None = None,
    sizes: Any = None,
    budget: int | None = None,
) -> np.ndarray:
    """Returns the nodes to keep: the important ones, then the strongest others.

    Args:
        values: ``[n]``, ``Ranking.values``. Ties go in the order of the nodes.
        important: indices of nodes that are kept in any case.
        count: how many to keep, important ones included.
        sizes: ``[n]``, parameters of each node, for ``budget``.
        budget: in place of ``count``: the most parameters. Nodes are taken in order
            until the next one does not fit.

    Returns:
        Sorted indices.

    Raises:
        ValueError: ``count`` or ``budget`` below what the important nodes need, or
            above what can be chosen; none or both of them.

    Example:
        >>> select_nodes([0.0, 3.0, 2.0, 9.0], [0], count=3)
        array([0, 1, 3])
    """
    values = np.asarray(values, np.float64)
    kept = list(dict.fromkeys(int(i) for i in important))
    inside = np.isin(np.arange(len(values)), kept)
    others = np.flatnonzero(~inside & (values > -np.inf))
    order = others[np.argsort(-values[others], kind="stable")]
    if (count is None) == (budget is None):
        raise ValueError("give one of `count` and `budget`")
    if budget is not None:
        sizes = np.asarray(sizes)
        spent = int(sizes[kept].sum())
        if spent > budget:
            raise ValueError(
                f"`budget` {budget} is below the {spent} parameters of the {len(kept)} "
                "important nodes"
            )
        fits = np.cumsum(sizes[order]) <= budget - spent
        return np.sort(np.concatenate([kept, order[fits]]).astype(int))
    if not len(kept) <= count <= len(kept) + len(order):
        raise ValueError(
            f"`count` must be from the {len(kept)} important nodes to the "
            f"{len(kept) + len(order)} that can be chosen, got {count}"
        )
    return np.sort(np.concatenate([kept, order[: count - len(kept)]]).astype(int))


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's correlation of two sets of values; equals share their mean rank.

    Example:
        >>> rank_correlation([1.0, 5.0, 9.0], [2.0, 4.0, 3.0])
        0.5
    """

    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    one, other = ranks(np.asarray(one)), ranks(np.asarray(other))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.round(np.corrcoef(one, other)[0, 1], 12))
