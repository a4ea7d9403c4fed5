"""What a comparison found: means, spreads, differences that are told apart or not."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from jaxtyping import Integer

from jaxpeft.compare._rows import mode, rows_by_task, unpacked
from jaxpeft.console import optional

DRAWS = 10_000
Found = dict[str, Any]


def table(
    scored: Mapping[tuple[str, str], Sequence[Found]], *, reference: str
) -> dict[str, Any]:
    """Makes the table of a comparison.

    Args:
        scored: by task and method the results of its rows, a seed each, with ``test``.
        reference: the method that differences are taken from.

    Returns:
        ``{"reference": ..., "rows": [...]}``; a row has ``task``, ``method``,
        ``metric``, ``mode`` (its best is "max" or "min"), ``point`` (what was chosen),
        ``scores`` by seed, ``mean``, ``sd`` (over seeds, with n - 1; ``None`` of one
        seed), ``binomial_sd`` (what a share of so many test rows, or a mean of shares,
        varies by itself; ``None`` for other metrics), sizes and mean costs, and but
        for the reference ``difference``, ``low`` and ``high``
        (``difference``). The best mean of a task comes first.
    """
    made = []
    for (task, method), rows in scored.items():
        first = rows[0]
        metric = first["metric"]
        scores = {r["row"]["seed"]: r["test"]["scores"][metric] for r in rows}
        values = list(scores.values())
        mean = statistics.fmean(values)
        row = {
            "task": task,
            "method": method,
            "metric": metric,
            "mode": mode(first),
            "point": first["row"]["point"],
            "scores": {str(seed): value for seed, value in scores.items()},
            "mean": mean,
            "sd": statistics.stdev(values) if values[1:] else None,
            "binomial_sd": _binomial_sd([r["test"] for r in rows]),
            "test_rows": sum(rows_by_task(first["test"]).values()),
            **{name: first[name] for name in ("trainable", "stored", "head", "steps")},
            "processor_seconds": _mean_cost(rows, "processor_seconds"),
            "peak_bytes": _mean_cost(rows, "peak_bytes"),
        }
        other = scored.get((task, reference))
        if method != reference and other:
            row |= difference(rows, other)
        made.append(row)
    sign = lambda row: -1 if row["mode"] == "max" else 1
    made.sort(key=lambda row: (row["task"], sign(row) * row["mean"]))
    return {"reference": reference, "rows": made}


def _binomial_sd(tests: Sequence[Found]) -> float | None:
    """What the score varies by its test rows alone; a mixture's is a mean of shares."""
    if any(test["right"] is None for test in tests):
        return None
    counts = list(rows_by_task(tests[0]).values())
    shares = [x.mean() for x in _by_task(np.stack([*map(unpacked, tests)]), counts)]
    variance = sum(p * (1 - p) / n for p, n in zip(shares, counts, strict=True))
    return math.sqrt(variance) / len(counts)


def _by_task(rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Cuts ``[..., rows]`` into its tasks."""
    return np.split(rows, np.cumsum(counts)[:-1], axis=-1)


def _mean_cost(rows: Sequence[Found], name: str) -> float:
    return statistics.fmean(row["cost"][name] for row in rows)


def difference(
    rows: Sequence[Found], others: Sequence[Found], *, draws: int = DRAWS
) -> dict[str, float | bool]:
    """The mean difference of two methods, paired by seed, and how sure it is.

    The interval is a percentile bootstrap: seeds are drawn with replacement, and where
    the score is a share of right rows, test rows too, the same for both methods; where
    it is the mean of such shares over the tasks of a mixture, within each task.

    Args:
        rows: a method's results, a seed each.
        others: the reference's.
        draws: of the bootstrap; the draws are the same in every call.

    Returns:
        ``difference`` of the seeds that both have, ``low`` and ``high`` of the 95%
        interval, ``apart``: whether it leaves 0 out. Empty where no seed is in both.

    References:
        Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics
        7(1), 1979.
    """
    mine, theirs = ({r["row"]["seed"]: r for r in each} for each in (rows, others))
    seeds = [seed for seed in mine if seed in theirs]
    if not seeds:
        return {}
    bits = [[unpacked(side[s]["test"]) for s in seeds] for side in (mine, theirs)]
    known = all(x is not None for side in bits for x in side)
    counts = [rows_by_task(side[s]["test"]) for side in (mine, theirs) for s in seeds]
    if known and all(count == counts[0] for count in counts):
        right, of_other = (np.stack(side) for side in bits)
        gain = right.astype(np.int8) - of_other.astype(np.int8)
        parts = _by_task(gain, list(counts[0].values()))
        drawn = _bootstrap(parts, draws)
        middle = statistics.fmean(float(part.mean()) for part in parts)
    else:
        metric = rows[0]["metric"]
        score = lambda side: np.array(
            [side[s]["test"]["scores"][metric] for s in seeds]
        )
        each = score(mine) - score(theirs)
        random = np.random.default_rng(0)
        drawn = each[random.integers(0, len(each), (draws, len(each)))].mean(1)
        middle = float(each.mean())
    low, high = (float(x) for x in np.quantile(drawn, (0.025, 0.975)))
    apart = bool(low > 0 or high < 0)
    return {"difference": middle, "low": low, "high": high, "apart": apart}


def _bootstrap(
    parts: Sequence[Integer[np.ndarray, "seeds _"]], draws: int
) -> np.ndarray:
    """Mean gains of ``draws`` resamples of seeds and, task by task, of rows."""
    seeds = len(parts[0])
    random = np.random.default_rng(0)
    found = np.empty(draws)
    for i in range(draws):
        some = random.integers(0, seeds, seeds)
        each = [part[some].mean(0) for part in parts]
        again = [x[random.integers(0, len(x), len(x))].mean() for x in each]
        found[i] = sum(again) / len(again)
    return found


def show(made: Mapping[str, Any]) -> rich.table.Table:
    """The table for a terminal."""
    shown = rich.table.Table(title=f"differences from {made['reference']}")
    for name in (
        "task",
        "method",
        "test",
        "sd",
        "difference (95%)",
        "trains",
        "stores",
        "whole",
    ):
        shown.add_column(name, no_wrap=name in ("task", "method"))
    for row in made["rows"]:
        shown.add_row(*_cells(row))
    for name, why in made.get("left_out", {}).items():
        shown.add_row(*name.split("/"), "left out", why)
    return shown


def _cells(row: Mapping[str, Any]) -> list[str]:
    spread = "-" if row["sd"] is None else f"{row['sd']:.4f}"
    gain = "-"
    if "difference" in row:
        gain = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        gain += "" if row["apart"] else ", not told apart"
    # Of the adapters; what is trained whole, a head at least, is apart.
    sizes = (f"{row[name]:,}" for name in ("trainable", "stored", "head"))
    return [row["task"], row["method"], f"{row['mean']:.4f}", spread, gain, *sizes]


def plot(made: Mapping[str, Any], file: Path) -> Path:
    """Draws every method's scores, seed by seed, a panel a task.

    Args:
        made: of ``table``.
        file: a PNG.

    Returns:
        The file.
    """
    with optional("Figures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in made["rows"]))
    most = max(sum(row["task"] == task for row in made["rows"]) for task in tasks)
    size = (4.6 * len(tasks) + 0.6, 0.34 * most + 1.5)
    figure = Figure(figsize=size, layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    for ax, task in zip(
        figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True
    ):
        rows = [row for row in made["rows"] if row["task"] == task][::-1]
        for place, row in enumerate(rows):
            colour = "#d9730d" if row["method"] == made["reference"] else "#0b6e99"
            scores = list(row["scores"].values())
            ax.plot(scores, [place] * len(scores), "o", ms=4, alpha=0.5, color=colour)
            ax.plot(row["mean"], place, "|", ms=16, mew=2, color=colour)
        ax.set_yticks(range(len(rows)), [row["method"] for row in rows])
        ax.set(title=task, xlabel=f"test {rows[0]['metric']}")
        ax.margins(x=0.08, y=0.08)
        ax.title.set(fontsize=11, ha="left", x=0)
        ax.grid(axis="x", color="#e6e6e6", lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file
