"""Figures, tables and findings of one study or of several."""

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft import dimension
from jaxpeft.runs import write_json
from jaxpeft.study._collect import STATES
from jaxpeft.study._estimate import Result, read_runs, remarks, without_steps
from jaxpeft.study._findings import findings

DRAWS = 10  # of each size in the figure of scales


def report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    estimator: str = "twonn-linear",
    layer: int | None = None,
) -> dict[str, Any]:
    """Draws every figure whose numbers are there, and says which are not and why.

    Args:
        folders: of studies, one for each model and task.
        out: where to write PNG and CSV files, ``table.csv`` and ``report.json``.
        estimator: of which the figures are; those of fit and scale are TwoNN's.
        layer: which one the figures of fit and of scale look at; ``None``: the middle.

    Returns:
        What is in ``report.json``: ``rows`` of the table, ``figures``, ``skipped`` with
        reasons, ``findings`` of each study, and ``remarks`` on poor fits and on
        deviations that are too small. ``rows`` count poor fits from layer 1 on.

    Raises:
        FileNotFoundError: a folder has no complete run.
        ValueError: a run has no dimensions by the estimator, or no such layer.
    """
    out = Path(out)
    studies: dict[str, dict[str, Result]] = {}
    for folder in folders:
        runs = {run.name: run for run in read_runs(folder)}
        for run in runs.values():
            if estimator not in run.profiles:
                raise ValueError(
                    f"{str(run.folder)!r} has no dimensions by {estimator!r}, only by "
                    f"{sorted(run.profiles) or 'none'}; estimate them first."
                )
        meta = next(iter(runs.values())).meta
        name = f"{Path(meta['model']).name} on {meta['task']['name']}"
        if name in studies:
            raise ValueError(f"`folders` has {name} twice; a study for each pair.")
        studies[name] = runs
    figures: list[str] = []
    skipped: dict[str, str] = {}
    table, told = [], {}
    for name, runs in studies.items():
        suffix = f"_{re.sub(r'[^A-Za-z0-9]+', '-', name)}" if len(studies) > 1 else ""
        one = _Drawing(out, suffix, name, runs, estimator, figures, skipped)
        one.summary()
        one.demonstrations()
        one.training()
        one.agreement()
        one.cloud(layer)
        table += [_row(name, run) for run in runs.values()]
        told[name] = [x._asdict() for x in findings(runs, estimator)]
    _over_studies(studies, estimator, out, figures, skipped)
    every = [
        one
        for runs in studies.values()
        for run in runs.values()
        for one in run.profiles[estimator][1:]
    ]
    found = {
        "estimator": estimator,
        "rows": table,
        "figures": figures,
        "skipped": skipped,
        "findings": told,
        "remarks": remarks(every),
    }
    columns = list(dict.fromkeys(key for row in table for key in row))
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    write_json(out / "report.json", found)
    return found


class _Drawing:
    """The figures of one study."""

    def __init__(self, out, suffix, title, runs, estimator, figures, skipped):
        self.out, self.suffix, self.title = out, suffix, title
        self.runs, self.estimator = runs, estimator
        self.figures, self.skipped = figures, skipped

    def draw(self, name: str, function, *given, **options) -> None:
        file = self.out / f"{name}{self.suffix}.png"
        if function is not dimension.plot_agreement:
            options["title"] = self.title
        function(*given, file, **options)
        self.figures.append(file.name)

    def skip(self, name: str, why: str) -> None:
        self.skipped[f"{name}{self.suffix}"] = why

    def profile(self, run: Result) -> list[dimension.IdEstimate]:
        return run.profiles[self.estimator]

    def scores(self, runs: Mapping[Any, Result]) -> dict[Any, Any] | None:
        if any(run.accuracy is None for run in runs.values()):
            return None
        return {key: (run.accuracy, run.accuracy_sd) for key, run in runs.items()}

    def summary(self) -> None:
        shown = without_steps(self.runs)
        profiles = {name: self.profile(run) for name, run in shown.items()}
        scores = self.scores(shown)
        self.draw("summary", dimension.plot_profiles, profiles, scores=scores)

    def demonstrations(self) -> None:
        runs = {
            r.meta["shots"]: r
            for r in self.runs.values()
            if r.meta["paradigm"] == "icl"
        }
        self.against("shots", runs, "demonstrations", "needs two numbers of --shots")

    def training(self) -> None:
        names = {
            n.partition("@")[0]
            for n, r in self.runs.items()
            if r.meta["paradigm"] == "sft"
        }
        for name in sorted(names):
            base = self.runs.get("icl-0")
            runs = {} if base is None else {0: base}
            for run in self.runs.values():
                of = run.name.partition("@")[0]
                if of == name and run.meta["step"] is not None:
                    runs[run.meta["step"]] = run
            why = "needs --shots 0 and --sft RUN@STEP,STEP"
            self.against(f"dynamics_{name.removeprefix('sft-')}", runs, "step", why)
        if not names:
            self.skip("dynamics", "needs --sft")

    def against(self, name: str, runs: dict[int, Result], label: str, why: str) -> None:
        if len(runs) < 2:
            return self.skip(name, why)
        profiles = {x: self.profile(run) for x, run in runs.items()}
        scores = self.scores(runs)
        self.draw(
            *(name, dimension.plot_dynamics, profiles), scores=scores, label=label
        )

    def agreement(self) -> None:
        others = [
            name
            for name in next(iter(self.runs.values())).profiles
            if name.startswith("mle") != self.estimator.startswith("mle")
            and all(name in run.profiles for run in self.runs.values())
        ]
        if not others:
            return self.skip("agreement", "needs TwoNN and an mle-K of --estimator")
        other = "mle-50" if "mle-50" in others else others[-1]
        pairs = [
            pair
            for run in self.runs.values()
            for pair in zip(self.profile(run)[1:], run.profiles[other][1:], strict=True)
        ]
        dims = ([pair[i].dim for pair in pairs] for i in (0, 1))
        self.draw(
            *("agreement", dimension.plot_agreement, *dims),
            labels=(self.estimator, other),
            poor=[a.poor or b.poor for a, b in pairs],
        )

    def cloud(self, layer: int | None) -> None:
        run = next(iter(self.runs.values()))
        states = dimension.LayerFiles(run.folder / STATES)
        layer = len(states) // 2 if layer is None else layer
        if not 0 < layer < len(states):
            raise ValueError(f"`layer` {layer} must be from 1 to {len(states) - 1}.")
        points = np.array(states[layer])
        self.title = f"{self.title}, {run.name}, layer {layer}"
        near = dimension.cloud(points, 2)
        self.draw("fit", dimension.plot_fit, near.r[:, 0], near.r[:, 1])
        points = points[near.rows]
        draws = np.random.default_rng(0)
        sizes = [len(points) // part for part in (1, 2, 4, 8, 16)]
        if len(points) < 32:
            return self.skip("scale", "needs 32 different rows")
        dims: dict[int, list[float]] = {}
        for n in filter(lambda n: n >= 16, sizes):
            for _ in range(1 if n == len(points) else DRAWS):
                rows = np.sort(draws.permutation(len(points))[:n])
                with warnings.catch_warnings():  # the figure of the fit says it
                    warnings.simplefilter("ignore", dimension.PoorFitWarning)
                    one = dimension.twonn(points[rows])
                dims.setdefault(n, []).append(one.dim)
        self.draw("scale", dimension.plot_scale, dims)


def _over_studies(
    studies: Mapping[str, Mapping[str, Result]],
    estimator: str,
    out: Path,
    figures: list[str],
    skipped: dict[str, str],
) -> None:
    profiles = {
        name: {n: r.profiles[estimator] for n, r in without_steps(runs).items()}
        for name, runs in studies.items()
    }
    shared = [
        paradigm
        for paradigm in next(iter(profiles.values()))
        if all(paradigm in each for each in profiles.values())
    ]
    if len(shared) < 2:
        skipped["differences"] = "needs two paradigms that all studies have"
    else:
        table, _ = dimension.difference_map(profiles, shared)
        dimension.plot_differences(table, shared, out / "differences.png")
        figures.append("differences.png")
    if len(studies) < 2:
        skipped["areas"] = "needs several studies: --runs again"
    else:
        areas = {
            p: [dimension.normalized_auc(each[p]) for each in profiles.values()]
            for p in shared
        }
        dimension.plot_areas(areas, out / "areas.png")
        figures.append("areas.png")


def _row(study: str, run: Result) -> dict[str, Any]:
    row = {
        "study": study,
        "run": run.name,
        "shots": run.meta["shots"],
        "step": run.meta["step"],
        "rows": run.meta["rows"],
        "accuracy": run.accuracy,
        "sd accuracy": run.accuracy_sd,
    }
    for name, profile in run.profiles.items():
        row[f"area {name}"] = dimension.normalized_auc(profile)
        if all(layer.halves for layer in profile[1:]):
            row[f"sd {name}"] = dimension.normalized_auc_sd(profile)
        row[f"poor fits {name}"] = sum(layer.poor for layer in profile[1:])
    first = next(iter(run.profiles.values()))[1:]
    row["merged rows"] = max(layer.n_exact + layer.n_near for layer in first)
    return row
