"""Dimensions layer by layer, the area below them, and how two such profiles differ."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpeft.dimension._duplicates import DegenerateError
from jaxpeft.dimension._estimate import (
    IdEstimate,
    PoorFitWarning,
    no_dimension,
    twonn,
    warn_of_poor_fit,
)
from jaxpeft.dimension._points import Points

Dims = Sequence[IdEstimate | float]
Estimator = Callable[[Any], IdEstimate]


def id_profile(
    states: Iterable[Any],
    estimator: Estimator | Mapping[str, Estimator] = twonn,
    *,
    k: int = 2,
) -> list[IdEstimate] | dict[str, list[IdEstimate]]:
    """Estimates the dimension of each layer's states, one layer after the other.

    Args:
        states: for each of L + 1 layers points [N, D], as one array or one by one;
            those that ``collect`` left in a folder are read one at a time.
        estimator: ``x -> IdEstimate``, ``functools.partial(mle, k=50)``; or several,
            ``{name: estimator}``, which share one search of neighbours a layer.
        k: how many neighbours to look for at the first layer, the most that any of
            them needs; others follow by themselves. Only of use with several.

    Returns:
        One estimate a layer, of several estimators ``{name: estimates}``; where a layer
        has fewer than three distinct points, ``dim`` is nan and ``degenerate`` True.

    Warns:
        PoorFitWarning: at some layers the points do not follow an estimator's law.

    Example:
        >>> states = np.random.default_rng(0).normal(size=(2, 200, 3))
        >>> states[0] = 1.0  # the same token in every row
        >>> [estimate.degenerate for estimate in id_profile(states)]
        [True, False]
    """
    several = estimator if isinstance(estimator, Mapping) else {"": estimator}
    found: dict[str, list[IdEstimate]] = {name: [] for name in several}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)  # one for all layers, below
        for x in states:
            points = Points(x, k)
            for name, function in several.items():
                try:
                    found[name].append(function(points))
                except DegenerateError:
                    found[name].append(no_dimension(len(x), "none"))
            k = points.k
    for name, each in found.items():
        known = next((e.method for e in each if not e.degenerate), "none")
        found[name] = [e._replace(method=known) for e in each]
        poor = [i for i, e in enumerate(each) if e.poor]
        warn_of_poor_fit(found[name], f"the points of layers {poor}")
    return found if isinstance(estimator, Mapping) else found[""]


def dims_of(profile: Dims) -> np.ndarray:
    """The dimensions of a profile, as given or of its estimates."""
    return np.array([getattr(each, "dim", each) for each in profile], np.float64)


def normalized_auc(profile: Dims, *, include_layer0: bool = False) -> float:
    """Returns the mean height of a profile: its area over layers scaled to [0, 1].

    Args:
        profile: dimensions or estimates of layers 0 to L.
        include_layer0: whether the input of the first block counts, too. The last
            token of a prompt is often the same in all texts and has no dimension
            there.

    Returns:
        The area by trapezoids; of a constant profile the constant.

    Raises:
        ValueError: fewer than two layers count, or one of them has no dimension.

    Example:
        >>> normalized_auc([9.0, 1.0, 2.0, 3.0])
        2.0

    References:
        Janapati and Ji, A comparative study of learning paradigms in large language
        models via intrinsic dimension, arXiv 2412.06245.
    """
    first = 0 if include_layer0 else 1
    dims = dims_of(profile)[first:]
    if len(dims) < 2:
        raise ValueError(
            f"`profile` has {len(dims)} layers from layer {first} on; an area needs 2."
        )
    if len(bad := np.flatnonzero(~np.isfinite(dims))):
        raise ValueError(
            f"`profile` has no dimension at layers {(bad + first).tolist()}: fewer "
            "than three distinct points there."
        )
    return float(np.trapezoid(dims, np.linspace(0.0, 1.0, len(dims))))


def normalized_auc_sd(profile: Sequence[IdEstimate]) -> float:
    """Returns the standard deviation of ``normalized_auc``, from halves of the points.

    Args:
        profile: estimated with ``sd="subsample"``.

    Returns:
        The spread over the halves, 1.1 to 1.4 times too large, as of one estimate.

    Raises:
        ValueError: a layer has no halves from layer 1 on.

    Example:
        >>> layer = IdEstimate(3.0, 0.1, 9, 0, 0, False, "mle", (3.0, 3.5))
        >>> round(normalized_auc_sd([layer] * 3), 3)
        0.354
    """
    return float(np.std(_areas_of_halves("profile", profile), ddof=1))


def id_difference(p: Dims, q: Dims) -> float:
    """Returns by how much the normalised area of one profile is above another's.

    Args:
        p: a profile.
        q: another, of the same texts for a difference that means something.

    Returns:
        ``normalized_auc(p) - normalized_auc(q)``.

    Example:
        >>> id_difference([0.0, 4.0, 4.0], [0.0, 3.0, 3.0])
        1.0
    """
    return normalized_auc(p) - normalized_auc(q)


def difference_sd(p: Sequence[IdEstimate], q: Sequence[IdEstimate]) -> float:
    """Returns the standard deviation of ``id_difference``, from the same halves.

    Errors that both share cancel, so this is far below the two combined.

    Args:
        p: a profile estimated with ``sd="subsample"``.
        q: another, of the same texts and with the same seed.

    Returns:
        The spread of the difference over the halves.

    Raises:
        ValueError: a profile has no halves from layer 1 on.

    Example:
        >>> half = IdEstimate(3.0, 0.1, 9, 0, 0, False, "mle", (3.0, 3.1))
        >>> difference_sd([half] * 3, [half] * 3)
        0.0
    """
    each = [_areas_of_halves(n, x) for n, x in (("p", p), ("q", q))]
    return float(np.std(np.subtract(*each), ddof=1))


def _areas_of_halves(name: str, profile: Sequence[IdEstimate]) -> list[float]:
    halves = [e.halves for e in profile[1:]]
    if not all(halves):
        raise ValueError(f"`{name}` has no halves; estimate with sd='subsample'")
    return [normalized_auc([0.0, *dims]) for dims in zip(*halves, strict=True)]


def difference_map(
    runs: Mapping[Hashable, Mapping[str, Dims]], paradigms: Sequence[str]
) -> tuple[Float[np.ndarray, "p p"], list[Hashable]]:
    """Returns how much higher each paradigm's dimension is than each other's.

    Args:
        runs: ``{(model, data set): {paradigm: profile}}``.
        paradigms: their order in the matrix.

    Returns:
        ``(H, used)``: H[p, q], the mean of ``id_difference`` over the runs that have
        every paradigm, antisymmetric; and the keys of these runs.

    Raises:
        ValueError: no run has every paradigm.

    Example:
        >>> run = {"icl-5": [0.0, 4.0, 4.0], "sft": [0.0, 3.0, 3.0]}
        >>> difference_map({("gpt2", "sst2"): run}, ["icl-5", "sft"])[0].tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    used = [key for key, run in runs.items() if set(paradigms) <= set(run)]
    if not used:
        raise ValueError(
            f"`runs` has none of {len(runs)} with all of the paradigms "
            f"{list(paradigms)}; it has {[sorted(run) for run in runs.values()][:3]}"
        )
    areas = np.array(
        [[normalized_auc(runs[key][p]) for p in paradigms] for key in used]
    )
    return np.mean(areas[:, :, None] - areas[:, None], axis=0), used
