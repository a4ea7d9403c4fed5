"""What a run leaves behind: its curves as a picture, its results as JSON and table."""

import importlib.metadata
import itertools
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import rich.console
import rich.table

from jaxpeft.console import optional
from jaxpeft.runs._json import write_json
from jaxpeft.runs._metrics import METRICS_FILE, compile_seconds, memory, read_metrics
from jaxpeft.runs._progress import clock

REPORT_FILE = "report.json"
CURVES_FILE = "curves.png"
PACKAGES = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def plot_curves(
    folder: Path, *, score: str, title: str, best_step: int | None = None
) -> Path:
    """Draws the curves of a run from its metrics file.

    Four panels over the steps: the task loss in training and in evaluation, the
    penalty of the adapters, the learning rates, the score with the best step marked.

    Args:
        folder: the run's folder; it must hold a metrics file.
        score: the name of the score in the ``eval`` events, ``"accuracy"``.
        title: stands above the panels.
        best_step: the step of the best checkpoint, as ``Checkpointer.best`` says it:
            which way a score is better is not decided twice. ``None``: no mark.

    Returns:
        the path of the picture, ``curves.png`` in ``folder``.

    Raises:
        ValueError: there is no ``train`` event to draw.
    """
    with optional("Figures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    train, evals = read_metrics(folder, "train"), read_metrics(folder, "eval")
    if not train:
        raise ValueError(f"`folder` {str(folder)!r} has no training step to draw yet.")
    # A Figure of its own: pyplot's global state belongs to whoever calls us.
    figure = Figure(figsize=(10, 6.4), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    panels = iter(figure.subplots(2, 2, sharex=True).flat)
    for ax in figure.axes:
        ax.margins(x=0.02, y=0.08)
    colours = ("#0b6e99", "#d9730d", "#5c7f2b", "#8b46a8")

    ax = next(panels)
    steps, values = _series(train, "loss")
    ax.plot(steps, values, color=colours[0], alpha=0.3, lw=1)
    ax.plot(steps, _smooth(values), color=colours[0], lw=2, label="training, smoothed")
    ax.plot(*_series(evals, "loss"), "o-", color=colours[1], ms=4, label="evaluation")
    ax.set(title="Task loss", ylim=(0, None))
    ax.legend(frameon=False)

    ax = next(panels)
    steps, values = _series(evals, score)
    ax.plot(steps, values, "o-", color=colours[2], ms=4)
    at_best = dict(zip(steps, values, strict=True)).get(best_step, math.nan)
    if math.isfinite(at_best):
        ax.axhline(at_best, color=colours[2], lw=0.8, ls=":")
        ax.annotate(
            f"best {at_best:.4g} at step {best_step}",
            (1, at_best),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(-4, -14),
            ha="right",
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5},
        )
    ax.set(title=f"Validation {score}")

    ax = next(panels)
    ax.plot(*_series(train, "penalty"), color=colours[3], lw=1.8)
    ax.set(title="Penalty of the adapters", xlabel="step")

    ax = next(panels)
    names = [key for key in train[0] if key.startswith("learning_rate/")]
    looks = itertools.cycle(zip(colours, ("-", "--", "-.", ":"), strict=True))
    for name, (colour, line) in zip(names, looks, strict=False):
        label = name.partition("/")[2]
        ax.plot(*_series(train, name), color=colour, ls=line, lw=1.8, label=label)
    ax.set(title="Learning rates", xlabel="step", ylim=(0, None))
    ax.yaxis.set_major_formatter("{x:.3g}")
    if names:
        ax.legend(frameon=False)

    for ax in figure.axes:
        ax.title.set(fontsize=11, ha="left", x=0)
        ax.grid(axis="y", color="#e6e6e6", lw=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.savefig(folder / CURVES_FILE)
    return folder / CURVES_FILE


def _series(events: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number; values that are not finite become gaps."""
    pairs = [(e["step"], float(e[name])) for e in events if name in e]
    return [s for s, _ in pairs], [
        v if math.isfinite(v) else math.nan for _, v in pairs
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a thirtieth of the values, unbiased from the start."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def versions() -> dict[str, str]:
    """Returns the versions and devices that a number depends on.

    Example:
        >>> sorted(versions())[:3]
        ['devices', 'flax', 'jax']
    """
    device = jax.devices()[0]
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": str(jax.process_count()),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def report(
    folder: Path,
    results: dict[str, Any],
    config: ml_collections.ConfigDict,
    *,
    title: str,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Ends a run: draws the curves, writes ``report.json``, prints the last table.

    Args:
        folder: the run's folder.
        results: JSON-able, with at least ``split``, ``metric``, ``before``, ``after``
            and ``after_last_step`` (dicts of scores), ``best_step``, ``trainable``,
            ``total``, ``seconds``.
        config: the run's config, kept in the report beside versions and command.
        title: stands above picture and table.
        console: where the table goes; None: standard output.

    Returns:
        the results with speed (medians over the run) and memory added. On every
        process but the first nothing else happens, and nothing is added.
    """
    if jax.process_index() != 0:
        return results
    laps = read_metrics(folder, "speed")
    for name in ("step_seconds", "tokens_per_second", "input_wait"):
        values = [lap[name] for lap in laps if name in lap]  # old ones lack the last
        if values:
            results = results | {name: statistics.median(values)}
    results = results | {"compile_seconds": compile_seconds(), **memory()}
    curves = plot_curves(
        folder,
        score=results["metric"],
        title=title,
        best_step=results["best_step"],
    )
    path = folder / REPORT_FILE
    text = {
        "results": results,
        "config": config.to_dict(),
        "versions": versions(),
        "command": sys.argv,
    }
    write_json(path, text)
    rows = _number_rows(results) | {
        "adapter": folder / "adapter",
        "curves": curves,
        "report": path,
        "metrics": folder / METRICS_FILE,
        "checkpoints": folder / "checkpoints",
    }
    print_table(rows, title=title, console=console)
    if tasks := _task_rows(results):
        print_table(tasks, title=f"{title}: before, after", console=console)
    return results


def _task_rows(results: dict[str, Any]) -> dict[str, str]:
    """The scores of each task of a mixture, which are called "trec/accuracy".

    Example:
        >>> scores = {"mean": 0.5, "trec/accuracy": 0.5, "trec/loss": 1.0}
        >>> _task_rows({"before": scores, "after": scores})
        {'trec': 'accuracy 0.5000, 0.5000;  loss 1.0000, 1.0000'}
    """
    shown: dict[str, list[str]] = {}
    for name, after in results["after"].items():
        task, slash, metric = name.rpartition("/")
        if slash:
            before = results["before"][name]
            shown.setdefault(task, []).append(f"{metric} {before:.4f}, {after:.4f}")
    return {task: ";  ".join(scores) for task, scores in shown.items()}


def _number_rows(results: dict[str, Any]) -> dict[str, str]:
    """The part of the last table that is numbers."""
    metric = results["metric"]
    score = f"{results['split']} {metric}"
    before, after, last = (
        f"{results[when][metric]:.4f}"
        for when in ("before", "after", "after_last_step")
    )
    share = results["trainable"] / results["total"]
    memory = f"{results['host_peak_bytes'] / 2**30:.2f} GiB on the host"
    if "device_peak_bytes" in results:
        memory += f", {results['device_peak_bytes'] / 2**30:.2f} GiB on a device"
    waited = ""
    if "input_wait" in results:
        waited = f", {results['input_wait']:.1%} of it waiting for rows"
    return {
        f"{score} before": before,
        f"{score} after": f"{after} at the best step, {results['best_step']}; "
        f"{last} at the last",
        "trainable": f"{results['trainable']:,} of {results['total']:,} parameters "
        f"({share:.2%})",
        "time": f"{clock(results['seconds'])}, of which compiling "
        f"{clock(results['compile_seconds'])}",
        "speed": f"{results['step_seconds']:.3f} s a step, "
        f"{results['tokens_per_second']:,.0f} tokens/s{waited}",
        "memory, peak": memory,
    }


def print_table(
    rows: dict[str, Any], *, title: str, console: rich.console.Console | None = None
) -> None:
    """Prints a table of two columns, one row an entry, on the first process.

    Args:
        rows: {what: value}; values are shown with ``str``.
        title: stands above the table.
        console: where to write; None: standard output.
    """
    if jax.process_index() != 0:
        return
    console = rich.console.Console() if console is None else console
    table = rich.table.Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, rich.text.Text(str(value)))
    console.print(table)
