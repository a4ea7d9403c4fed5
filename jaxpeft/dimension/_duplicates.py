"""Points that stand twice in a cloud, exactly or nearly."""

import collections
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxpeft.dimension._neighbours import check_points, search

DUPLICATES = ("merge", "raise", "keep")
_REACH = 10  # near copies are seen against the distance to this neighbour
_PASSES = 5
_HARDLY = 1e-3  # a probability of being suspicious; on a line it is 0.09
_BEGINNING = 16  # features of a row, looked at first


class DuplicateWarning(UserWarning):
    """A cloud has points that stand in it twice; they were merged."""


class PrecisionWarning(UserWarning):
    """Points came in bfloat16, whose rounding bends the nearest distances."""


class DegenerateError(ValueError):
    """A cloud has fewer than three distinct points: it has no dimension."""


class Cloud(NamedTuple):
    """Neighbours of the points that are left when copies are merged.

    Attributes:
        r: distances to the nearest other points, nearest first.
        rows: which rows of the points are left, rising.
        n_exact: how many rows were left out as equal to an earlier one.
        n_near: how many as nearly equal to one.
    """

    r: Float[np.ndarray, "n k"]
    rows: Int[np.ndarray, " n"]
    n_exact: int
    n_near: int


def cloud(
    x: Shaped[Any, "rows d"],
    k: int,
    *,
    duplicates: str = "merge",
    near_tol: int | float = 0.01,
    backend: str = "jax",
    block: int = 1024,
) -> Cloud:
    r"""Finds neighbours, once copies of points are merged.

    A copy makes the distance to the nearest neighbour (nearly) 0 and estimates of a
    dimension collapse; leaving out only the points concerned would bias the rest.
    A point is suspicious where its nearest neighbour is nearer than ``near_tol`` times
    its tenth. In a continuous cloud of dimension d a point is so with probability
    :math:`1 - (1 - \mathrm{near\_tol}^d)^9`, d as it is around that point: a cloud may
    be a line here and of many dimensions there, and close pairs are common on the line.
    Only where more points are suspicious than five times what is to be expected and
    five, the second of each pair is left out: of all points, or of those alone that are
    so with a probability below 0.001, whichever has the larger excess. That is done
    again, five times at most. Groups of more than ten near copies are not seen.

    Args:
        x: points, a row each.
        k: how many neighbours.
        duplicates: ``"merge"``: leave copies out, with a ``DuplicateWarning``;
            ``"raise"``: raise instead; ``"keep"``: look for none.
        near_tol: how near is suspicious; 0: only exact copies are looked for.
        backend: as in ``neighbours``.
        block: as in ``neighbours``.

    Returns:
        The neighbours among the points that are left.

    Raises:
        DegenerateError: fewer than three distinct points.
        ValueError: an argument outside of what is allowed, too few points for k, or
            copies with ``duplicates="raise"``.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3))
        >>> cloud(x, 2).n_exact
        0
    """
    options = {"duplicates": duplicates, "near_tol": near_tol}
    found = find(x, k, k, backend=backend, block=block, **options)
    return found._replace(r=found.r[:, :k])


def find(
    x: Any,
    k: int,
    most: int,
    *,
    duplicates: str,
    near_tol: int | float,
    backend: str,
    block: int,
) -> Cloud:
    """As ``cloud``, with up to ``most`` neighbours or more; k of them there must be."""
    dtype = getattr(x, "dtype", np.dtype(float))
    x = check_points(x)
    if dtype == jnp.bfloat16:
        warnings.warn(
            "the points came in bfloat16. Where features are far from 0 its rounding "
            "is as large as the nearest distances, and the dimension far off. Keep "
            "the states in float32 from the forward pass on.",
            PrecisionWarning,
            stacklevel=4,
        )
    if duplicates not in DUPLICATES:
        raise ValueError(
            f"`duplicates` must be one of {DUPLICATES}, got {duplicates!r}"
        )
    if not 0 <= near_tol < 1:
        raise ValueError(f"`near_tol` must be in [0, 1), got {near_tol}")
    rows, n_near, likely = np.arange(len(x)), 0, 1.0
    if duplicates != "keep":
        rows = _distinct(x)
    n_exact = len(x) - len(rows)
    if len(rows) < 3:
        raise DegenerateError(
            f"`x` has {len(rows)} distinct rows of {len(x)}; a dimension needs at "
            "least 3. (The last token of a prompt is often the same in every row: "
            "pool by 'mean', or leave layer 0 out.)"
        )
    options = {"backend": backend, "block": block}
    for left in reversed(range(_PASSES + 1)):
        # A search more is needed only where something was merged.
        reach = min(max(most, _REACH), len(rows) - 1)
        looks = duplicates != "keep" and near_tol > 0 and left
        r, indices = search(
            x if len(rows) == len(x) else x[rows],
            reach,
            few=min(most, reach),
            near_tol=near_tol if looks else 0.0,
            **options,
        )
        if not looks or r.shape[1] < reach:  # no point is suspicious
            break
        copies, likely = _near(r, indices, near_tol, 0 if n_near else 5, likely)
        if not len(copies):
            break
        n_near += len(copies)
        rows = np.delete(rows, copies)
        if len(rows) < 3:
            raise DegenerateError(
                f"`x` has {len(x)} rows, of which {n_exact} are equal to another and "
                f"{n_near} nearly so; a dimension needs at least 3 distinct ones."
            )
    if n_exact + n_near:
        said = (
            f"{n_exact} of {len(x)} points are equal to an earlier one and {n_near} "
            "nearly so"
        )
        if duplicates == "raise":
            raise ValueError(
                f"{said}; write duplicates='merge' to leave them out, or remove "
                "repeated inputs before the forward pass."
            )
        warnings.warn(
            f"{said}; they were left out. Remove repeated inputs before the forward "
            "pass to be rid of this.",
            DuplicateWarning,
            stacklevel=4,
        )
    if r.shape[1] < k:
        raise ValueError(
            f"`k` is {k}, but there are {len(rows)} distinct points; give more points, "
            f"or k up to {len(rows) - 1}."
        )
    return Cloud(r, rows, n_exact, n_near)


def _distinct(x: np.ndarray) -> np.ndarray:
    """The first row of every set of equal ones."""
    beginnings = _keys(x[:, :_BEGINNING])
    known = collections.Counter(beginnings)
    first: dict[bytes, int] = {}
    for i, key in enumerate(beginnings):  # few rows begin as another does
        first.setdefault(key if known[key] == 1 else _keys(x[i : i + 1])[0], i)
    return np.array(list(first.values()))


def _keys(x: np.ndarray) -> list[bytes]:
    """What is the same of equal rows alone."""
    return [row.tobytes() for row in np.ascontiguousarray(x + x.dtype.type(0))]  # no -0


def _near(
    r: np.ndarray, indices: np.ndarray, near_tol: float, chance: int, likely: float
) -> tuple[np.ndarray, float]:
    """Which points to leave out as near copies, and of what probability at most.

    That is ``likely``, or less where the excess of suspicious points is larger among
    those that chance alone hardly ever makes so.
    """
    last, none = min(_REACH, r.shape[1]), np.array([], int)
    close = r[:, 0] < near_tol * r[:, last - 1]
    if not np.any(close):
        return none, likely
    p = _probabilities(r[:, :last], indices[:, :last], near_tol)

    def excess(most: float) -> float:
        among = p <= most
        return np.count_nonzero(close & among) - 5 * np.sum(p[among])

    likely = max(sorted({likely, _HARDLY}), key=excess)
    if not excess(likely) > chance:
        return none, likely
    suspicious = np.flatnonzero(close & (p <= likely))
    return np.unique(np.maximum(suspicious, indices[suspicious, 0])), likely


def _probabilities(r: np.ndarray, indices: np.ndarray, near_tol: float) -> np.ndarray:
    """How likely each point is suspicious, by the dimension around it.

    That is Levina and Bickel's of its neighbours and theirs, without near copies.
    """
    far = r[:, -1:]
    seen = r >= near_tol * far
    logs = np.log(far / np.where(seen, r, far)).sum(1)
    counts = seen.sum(1) - 1.0  # the last has a ratio of 1
    logs, counts = (x + x[indices].sum(1) for x in (logs, counts))
    dims = counts / np.maximum(logs, np.finfo(float).tiny)
    return 1 - (1 - near_tol**dims) ** (r.shape[1] - 1)
