"""Estimates as a table, as JSON and as a picture."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import rich.console
import rich.table

from jaxpeft.console import optional
from jaxpeft.runs._estimate import (
    REMATS,
    Attach,
    MakeStep,
    Try,
    as_flags,
    estimate,
    fit,
)
from jaxpeft.runs._report import versions
from jaxpeft.training import StepEstimate

GIB = 2**30
# Fields of an estimate that make up its peak, and what they are called.
PARTS = {
    "base": "base",
    "adapters": "adapters",
    "optimizer": "optimiser",
    "batch": "batch",
    "padding": "padding of these",
    "temporaries": "temporaries",
    "outputs": "outputs",
    "code": "program",
}


def dry_run(
    config: ml_collections.ConfigDict,
    *,
    attach: Attach,
    make_step: MakeStep,
    target: str | None = None,
    slices: int = 1,
    num_labels: int | None = None,
    look: bool = False,
    json_file: str | Path | None = None,
    picture: str | Path | None = None,
) -> list[Try]:
    """Estimates a config's step, shows what it needs, and objects if it does not fit.

    Args:
        config: as for ``estimate``.
        attach: as for ``estimate``.
        make_step: as for ``estimate``.
        target: a name, as for ``estimate``. JAX is kept off this computer's
            accelerators where it names another machine.
        slices: as for ``estimate``.
        num_labels: as for ``estimate``.
        look: whether to look for what would fit (``fit``).
        json_file: where to write all that was found, too.
        picture: where to draw the memory, a PNG file.

    Returns:
        What was compiled; one entry unless ``look``.

    Raises:
        ValueError: nothing of it fits: by how much, and what to change; and as
            ``estimate``.
    """
    if target is not None and not target.startswith("gpu"):
        jax.config.update("jax_platforms", "cpu")
    parts: dict[str, Any] = {"attach": attach, "make_step": make_step}
    asked: dict[str, Any] = {"target": target, "slices": slices}
    asked["num_labels"] = num_labels
    if look:
        tries = fit(config, **parts, **asked, tell=_tell)
    else:
        tries = [Try({}, estimate(config, **parts, **asked))]
    if json_file is not None:
        Path(json_file).write_text(json.dumps(record(config, tries), indent=1) + "\n")
    if picture is not None:
        plot_memory(tries, picture)
    show(tries[-1])
    if not tries[-1].estimate.fits:
        raise ValueError(too_large(config, tries[-1].estimate, looked=look))
    return tries


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def record(config: ml_collections.ConfigDict, tries: Sequence[Try]) -> dict[str, Any]:
    """Returns what was found, for JSON.

    Args:
        config: what was estimated.
        tries: of ``fit``, or one.
    """
    return {
        "config": json.loads(config.to_json_best_effort()),
        "versions": versions(),
        "tries": [{"changes": one.changes, **one.estimate.to_dict()} for one in tries],
    }


def show(one: Try, console: rich.console.Console | None = None) -> None:
    """Prints an estimate.

    Args:
        one: what was compiled.
        console: where to; ``None``: standard output.
    """
    found = one.estimate
    console = rich.console.Console() if console is None else console
    axes = " x ".join(f"{name} {n}" for name, n in found.mesh.items())
    title = f"{found.target}: {found.devices} devices, {axes}"
    if one.changes:
        title += f"\nwith {as_flags(one.changes)}"
    table = rich.table.Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(found):
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(table)


def _rows(found: StepEstimate) -> list[tuple[str, str, str] | None]:
    rows: list[tuple[str, str, str] | None] = []
    for name, words in PARTS.items():
        size = getattr(found, name)
        if size or name in ("base", "adapters"):
            rows.append((words, _size(size), ""))
    of = "memory unknown" if found.memory is None else f"of {_size(found.memory)}"
    rows.append(("peak of a device", _size(found.peak), of))
    largest = [one for one in found.largest if one.bytes >= found.peak / 100]
    for one in largest[:3]:
        rows.append(("  a large array", _size(one.bytes), f"{one.what}, {one.source}"))
    if found.flops is None:
        return [*rows, None, ("", "", "the compiler gave up: no more is known")]
    rows += [None, ("matmuls", f"{found.flops / 1e12:.3f} TFLOP", "a device and step")]
    rows.append(("memory traffic", f"{found.traffic / 1e9:.2f} GB", ""))
    for one in found.collectives:
        what = f"{one.count} in groups of {one.devices}, {one.sent / 1e9:.3f} GB sent"
        rows.append((one.kind, f"{one.bytes / 1e9:.3f} GB", what))
    rows += [None] * bool(found.seconds)
    for name, seconds in found.seconds.items():
        rows.append((f"bound by {name}", f"{1e3 * seconds:.2f} ms", ""))
    if found.step_seconds:
        rate = found.tokens / found.step_seconds / found.devices
        rows.append(("tokens/s a device", f"{rate:,.0f}", "at most"))
        rows.append(("MFU", f"{found.mfu:.1%}", "at most, at 4 FLOPs a parameter"))
    rows += [None, ("trace and compile", f"{found.compile_seconds:.1f} s", "")]
    return rows + [("assumed", "", note) for note in found.notes]


def _size(count: int | float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def too_large(
    config: ml_collections.ConfigDict, found: StepEstimate, *, looked: bool = False
) -> str:
    """Returns by how much a step is too large for a machine, and what to change.

    Args:
        config: what was estimated.
        found: its estimate, which does not fit.
        looked: whether ``fit`` has tried all that it knows.
    """
    held, memory = found.base + found.adapters + found.optimizer, found.memory or 0
    over = (
        f"a step needs {_size(found.peak)} on each device, "
        f"{_size(found.peak - memory)} more than the {_size(memory)} that there are"
    )
    if looked:
        advice = (
            "nothing that --fit tries is enough: take fewer or shorter rows "
            "(`config.batch_size`, `config.lengths`), or more devices"
        )
    elif held > 0.8 * memory:
        advice = (
            f"base, adapters and optimiser alone are {_size(held)}: cut them over more "
            "devices (`config.mesh.fsdp`, `config.mesh.tensor`), or keep the base in "
            "fewer bytes (--config.model.param_dtype=bfloat16, "
            "--config.model.quantise=nf4)"
        )
    elif config.model.remat in REMATS[:-1]:
        advice = (
            "keep less for the backward pass (--config.model.remat=full), then take "
            "more micro-batches (`config.accumulate`); --fit tries both"
        )
    else:
        advice = (
            "take more micro-batches (`config.accumulate`), or cut more "
            "(`config.mesh`); --fit tries both"
        )
    return f"{over}. What to change: {advice}."


def plot_memory(tries: Sequence[Try], file: str | Path) -> Path:
    """Draws the memory of a device as bars, one for each try, with its limit.

    Args:
        tries: of ``fit``, or one.
        file: a PNG file.

    Returns:
        the file.
    """
    with optional("Figures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(tries)), layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, one in enumerate(tries):
        left = 0.0
        sizes = {words: getattr(one.estimate, n) for n, words in PARTS.items()}
        for index, (words, size) in enumerate(sizes.items()):
            label = words if place == 0 else None
            color = f"C{index}"
            axes.barh(place, size / GIB, left=left, color=color, label=label)
            left += size / GIB
    memory = tries[0].estimate.memory
    if memory is not None:
        axes.axvline(memory / GIB, color="black", linestyle="--")
    names = [
        as_flags(one.changes).replace("--config.", "") or "as it is" for one in tries
    ]
    axes.set_yticks(range(len(tries)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB a device")
    axes.set_title(f"{tries[0].estimate.target}, {tries[0].estimate.devices} devices")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(file)
    return Path(file)
