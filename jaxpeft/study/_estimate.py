"""Dimensions of the states that a study's runs left, layer by layer."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft import dimension
from jaxpeft.runs import write_json
from jaxpeft.study._collect import ACCURACY, META, RUNS, STATES, read_json

ID = "id.json"
ESTIMATORS = ("twonn-linear", "mle-25", "mle-50")


class Result(NamedTuple):
    """What a study knows of one run.

    Attributes:
        name: "icl-5", "sft-1k@62".
        folder: where it lies.
        meta: what was asked, of ``meta.json``.
        accuracy: the share of right answers, or ``None``.
        accuracy_sd: its standard deviation, or ``None``.
        profiles: by estimator, dimensions of layers 0 to L.
    """

    name: str
    folder: Path
    meta: dict[str, Any]
    accuracy: float | None
    accuracy_sd: float | None
    profiles: dict[str, list[dimension.IdEstimate]]


def find_estimator(
    name: str, *, sd: str = "subsample"
) -> Callable[[Any], dimension.IdEstimate]:
    """Returns the estimator of a name.

    Args:
        name: "twonn-linear", "twonn-ml", "mle-25": Levina and Bickel's over 25
            neighbours, combined by the mean, as the study has it; or "gride-8-16", of
            neighbours 8 and 16.
        sd: as in ``dimension.twonn``.

    Returns:
        ``points [n, d] -> IdEstimate``.

    Raises:
        ValueError: there is none of that name.

    Example:
        >>> find_estimator("mle-25").keywords["k"]
        25
    """
    if name in ("twonn-linear", "twonn-ml"):
        method = name.removeprefix("twonn-")
        return functools.partial(dimension.twonn, method=method, sd=sd)
    if found := re.fullmatch(r"mle-(\d+)", name):
        return functools.partial(dimension.mle, k=int(found[1]), comb="mean", sd=sd)
    if found := re.fullmatch(r"gride-(\d+)-(\d+)", name):
        n1, n2 = map(int, found.groups())
        return functools.partial(dimension.gride, n1=n1, n2=n2, sd=sd)
    raise ValueError(
        f"`estimators` has {name!r}; there are twonn-linear, twonn-ml, mle-K for any "
        "number K of neighbours, mle-50, and gride-N1-N2 for any two, gride-8-16."
    )


def neighbours_needed(name: str) -> int:
    """Returns how many neighbours the estimator of a name looks at.

    Example:
        >>> [neighbours_needed(x) for x in ("twonn-linear", "mle-25", "gride-8-16")]
        [2, 25, 16]
    """
    given = find_estimator(name).keywords
    return given.get("n2", given.get("k", 2))


def remarks(estimates: Iterable[dimension.IdEstimate]) -> list[str]:
    """Returns what there is to say of estimates: of poor fits, of deviations.

    Args:
        estimates: of one cloud or of many.

    Returns:
        Sentences; none where there is nothing to say.
    """
    each = [one for one in estimates if not one.degenerate]
    said = []
    if poor := sum(one.poor for one in each):
        said.append(
            f"poor fit ({poor} of {len(each)}): distances are further from the "
            "estimator's law than in 999 of 1000 clean clouds; the dimension means "
            "little."
        )
    if any(not one.halves for one in each):
        said.append(f"{dimension.ANALYTIC}: estimate with --sd subsample.")
    return said


def estimate_runs(
    folder: str | Path,
    estimators: Sequence[str] = ESTIMATORS,
    *,
    sd: str = "subsample",
    note: Callable[[str], None] = print,
) -> None:
    """Estimates the dimension of every layer of every complete run of a study.

    They go into each run's ``id.json``, after every layer: what is there already, with
    the same ``sd``, is not estimated again. All estimators of a layer share one search
    of neighbours.

    Args:
        folder: the study's folder.
        estimators: names, as in ``find_estimator``.
        sd: as in ``dimension.twonn``.
        note: is told of each run.

    Raises:
        ValueError: an estimator is unknown, or its k is too large for the rows.
        FileNotFoundError: the folder has no complete run.
    """
    functions = {name: find_estimator(name, sd=sd) for name in estimators}
    most = max(map(neighbours_needed, estimators))
    for where in complete_runs(folder):
        states = dimension.LayerFiles(where / STATES)
        file = where / ID
        found = read_json(file) if file.exists() else {}
        done = 0
        for name in functions:
            if found.get(name, {}).get("sd") != sd:
                found[name] = {"sd": sd, "layers": []}
        for layer in range(len(states)):
            todo = {
                n: f for n, f in functions.items() if len(found[n]["layers"]) == layer
            }
            if not todo:
                continue
            with warnings.catch_warnings():
                # How many were merged and fit badly stands in the file and the table.
                warnings.simplefilter("ignore", dimension.DuplicateWarning)
                warnings.simplefilter("ignore", dimension.PoorFitWarning)
                profiles = dimension.id_profile([states[layer]], todo, k=most)
            for name, (one,) in profiles.items():
                found[name]["layers"].append(_to_json(one))
            write_json(file, found)
            done += len(todo)
        note(f"{where.name}: {done} dimensions estimated, {', '.join(functions)}")


def complete_runs(folder: str | Path) -> list[Path]:
    """Returns the folders of a study's complete runs, in the order of their names.

    Args:
        folder: the study's folder.

    Returns:
        The folders.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(file.parent for file in Path(folder).glob(f"{RUNS}/*/{ACCURACY}"))
    if not found:
        raise FileNotFoundError(
            f"`folder` {str(folder)!r} has no complete run of a study; collect first."
        )
    return sorted(found, key=lambda path: _order(path.name))


def read_runs(folder: str | Path) -> list[Result]:
    """Returns what a study knows of its complete runs.

    Args:
        folder: the study's folder.

    Returns:
        The runs: without adapter by demonstrations, then adapters by step.

    Raises:
        FileNotFoundError: there is none.

    Example:
        >>> [run.accuracy for run in read_runs("runs/study")]  # doctest: +SKIP
        [0.31, 0.52, 0.87]
    """
    results = []
    for where in complete_runs(folder):
        file = where / ID
        profiles = {}
        for name, read in (read_json(file) if file.exists() else {}).items():
            if len(read["layers"]) == len(dimension.LayerFiles(where / STATES)):
                profiles[name] = [_from_json(layer) for layer in read["layers"]]
        scored, meta = read_json(where / ACCURACY), read_json(where / META)
        pair = scored["accuracy"], scored.get("sd")
        results.append(Result(where.name, where, meta, *pair, profiles))
    return results


def without_steps(runs: Mapping[str, Result]) -> dict[str, Result]:
    """Returns the runs without the steps on the way to an adapter.

    Args:
        runs: by name, in their order.

    Returns:
        Of each adapter itself, or the last step where that is all there is.
    """
    last = {re.sub(r"@\d+", "", name): name for name in runs}
    return {name: runs[name] for name in last.values()}


def _order(name: str) -> tuple[Any, ...]:
    """Demonstrations by their number, then adapters, each behind its steps.

    Controls stand behind what they are of.
    """
    main, _, control = name.partition("~")
    stem, _, step = main.partition("@")
    kind, _, rest = stem.partition("-")
    if kind == "icl":
        return 0, "", 0, int(rest), control
    return 1, rest, not step, int(step or 0), control


def _to_json(one: dimension.IdEstimate) -> dict[str, Any]:
    """Without nan, which JSON does not know: there is no dimension."""
    return {k: None if v != v else v for k, v in one._asdict().items()}


def _from_json(layer: dict[str, Any]) -> dimension.IdEstimate:
    nan = float("nan")
    kept = {k: nan if v is None else v for k, v in layer.items()}
    return dimension.IdEstimate(**kept | {"halves": tuple(layer["halves"])})
