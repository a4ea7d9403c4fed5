"""A comparison from its first row to its table."""

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpeft import data
from jaxpeft.compare._plan import Comparison, Row
from jaxpeft.compare._rows import (
    add_test,
    mode,
    read_row,
    repeats,
    row_file,
    run_row,
)
from jaxpeft.compare._table import plot, table
from jaxpeft.runs import load_program, step_flops, write_json

Found = dict[str, Any]


# What a comparison writes into its folder.
OWN = ("runs", "results", "table.json", "table.png")


def check_out(out: str | Path) -> Path:
    """Returns the folder of a comparison; refuses one with other things in it.

    Args:
        out: new, empty, or that of a comparison.

    Raises:
        ValueError: it is a file, or holds something else.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` {str(out)!r} is a file; give a folder.")
    there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if other := sorted(set(there) - set(OWN)):
        raise ValueError(
            f"`out` {str(out)!r} holds other things, {other[:3]}; give a folder of its "
            "own."
        )
    return folder


def compare(
    comparison: Comparison,
    *,
    config: str | Path,
    train: Path,
    out: Path,
    results: Path | None = None,
    only: Sequence[str] = (),
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what has not been run, chooses, scores what was chosen, makes the table.

    In this order for each task and method: all points of the grid with the seeds that
    choose; the choice, on validation rows, which is written down; the other seeds at
    the point that was chosen; then, for the first time, test scores are read, of that
    point alone. The same call goes on after whatever was done.

    Args:
        comparison: of ``read_comparison``.
        config: its file, for the commands that repeat a row.
        train: the train.py.
        out: a folder for the runs, the table and the picture.
        results: a folder for the rows' results; ``None``: ``out/results``.
        only: names of rows, or beginnings of names (``"trec/lora"``): nothing else is
            run, and no table is made.
        tell: is given a line for each row.

    Returns:
        What ``table`` returns, with ``flops_a_step`` of each row (``runs.step_flops``),
        and ``left_out``: ``{"trec/vera": the reason}``; with ``only`` the rows' results
        by name.

    Raises:
        ValueError: ``out`` holds other things, ``only`` names no row, a task has no
            test rows; a row's file is not of this comparison.
        RuntimeError: a row failed.
    """
    out = check_out(out)
    results = out / "results" if results is None else results
    named = {row.name: row for rows in comparison.rows.values() for row in rows}
    make = dict(train=Path(train), results=results, folder=out / "runs")

    @functools.cache
    def done(name: str) -> Found:
        row = named[name]
        found = read_row(results, row)
        if found is None:
            tell(f"{row.name} ...")
            found = run_row(row, **make, command=repeats(config, row))
        score = found["validation"][found["metric"]]
        tell(f"{row.name}: validation {found['metric']} {score:.4f}")
        return found

    every = list(named.values())
    if only:
        under = lambda row, name: f"{row.name}/".startswith(f"{name}/")
        for name in only:
            if not any(under(row, name) for row in every):
                raise ValueError(
                    f"`only` {name!r} is no row of {config}; the first is "
                    f"{every[0].name!r}, a beginning such as "
                    f"{'/'.join(every[0].name.split('/')[:2])!r} will do."
                )
        asked = [row for row in every if any(under(row, name) for name in only)]
        return {row.name: done(row.name) for row in asked}
    for task in comparison.tasks:
        check_test_rows(task, comparison.rows[task, comparison.reference][0])
    program = load_program(Path(train))
    step = {"attach": program.attach_all, "make_step": program.make_step}
    chosen, left_out, flops = {}, {}, {}
    for (task, method), rows in comparison.rows.items():
        trial = [row for row in rows if row.seed in comparison.choose_with]
        first = done(trial[0].name)
        if why := over_budget(first["trainable"], comparison.budget):
            left_out[f"{task}/{method}"] = why
            tell(f"{task}/{method} is left out: {why}")
            continue
        point = choose(trial, [done(row.name) for row in trial])
        write_json(row_file(results, trial[0]).parent / "choice.json", point)
        taken = [row for row in rows if row.at == point["point"]]
        flops[task, method] = _flops(taken[0], first, step)
        for row in taken:
            done(row.name)
        chosen[task, method] = taken
    # Every choice is made by now: test scores are read for the first time.
    scored = {
        key: [add_test(results, row) for row in rows] for key, rows in chosen.items()
    }
    made = table(scored, reference=comparison.reference) | {"left_out": left_out}
    for row in made["rows"]:
        row["flops_a_step"] = flops[row["task"], row["method"]]
    write_json(out / "table.json", made)
    if scored:
        plot(made, out / "table.png")
    return made


def _flops(row: Row, found: Found, how: dict[str, Any]) -> float:
    """The FLOPs of a step; of a run in stages the mean over all its steps."""
    count = functools.partial(step_flops, row.config, **how)
    if "stages" not in found:
        return count()
    steps = [stage["steps"] for stage in found["stages"]]
    return sum(n * count(stage=i) for i, n in enumerate(steps)) / sum(steps)


def check_test_rows(task: str, row: Row) -> None:
    """Raises where the rows that choose would be those that score."""
    if "test" not in data.task(row.config.data).splits:
        raise ValueError(
            f"task {task!r} has no test rows: what is chosen on its validation rows "
            "would be scored on the same ones; give it some, as data=dict(test=...)."
        )


def choose(rows: Sequence[Row], found: Sequence[Found]) -> dict[str, Any]:
    """Chooses a point of the grid by validation scores alone.

    Args:
        rows: of one task and method, each point with the same seeds.
        found: their results.

    Returns:
        ``point`` (its name), ``metric``, and ``validation``: ``{point: its scores}``.
        Of equal points the first one in the grid is taken.
    """
    metric = found[0]["metric"]
    scores: dict[str, list[float]] = {}
    for row, one in zip(rows, found, strict=True):
        scores.setdefault(row.at, []).append(one["validation"][metric])
    best = max if mode(found[0]) == "max" else min
    point = best(scores, key=lambda at: statistics.fmean(scores[at]))
    return {"point": point, "metric": metric, "validation": scores}


def over_budget(trainable: int, budget: dict[str, Any]) -> str:
    """Why a method does not meet the budget; empty: it does.

    Example:
        >>> over_budget(120, {"trainable": 100, "tolerance": 0.05})
        '120 parameters of adapters train, the budget is 100 within 5%'
    """
    if not budget:
        return ""
    asked, tolerance = budget["trainable"], budget["tolerance"]
    if abs(trainable - asked) <= tolerance * asked:
        return ""
    return (
        f"{trainable:,} parameters of adapters train, the budget is {asked:,} within "
        f"{tolerance:.0%}"
    )
