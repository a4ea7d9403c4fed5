"""``jaxpeft ranks``: how much rank each site gets, from a model and a task."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpeft.cli._console import note, stage
from jaxpeft.cli._types import ending, whole

NAME = "ranks"
SUMMARY = "choose ranks for a model and a task, before any training"
DESCRIPTION = """\
Estimates from a pretrained model and the training rows of a task how much rank each
kernel gets, without training. The file goes into train.py as
--config.ranks.before=FILE, or into jaxpeft.attach; the table goes to standard output.

  gelora   the rise of the intrinsic dimension of hidden states over a block, plus one
  eva      the directions that explain most of the variance of a kernel's inputs
  uniform  the same rank everywhere, to compare with
"""
EXAMPLE = (
    "jaxpeft ranks --model minilm --task trec --method gelora --out allocation.json"
)
# Attention's queries, keys, values and outputs, whatever a family calls them.
ATTENTION = r"(.*/)?(attention|self_attn|attn)/.*"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="the base model: a folder, a packaged model, or a name on the hub",
    )
    add("--task", required=True, help='a task, "trec" or "rte"')
    add("--method", required=True, help="gelora, eva or uniform")
    add("--out", required=True, metavar="FILE", help="a new file, JSON")
    add(
        "--map",
        type=ending(".png"),
        metavar="FILE",
        help="a PNG of the ranks, with its CSV beside it",
    )
    add(
        "--budget",
        type=whole(1),
        metavar="P",
        help="parameters of low-rank pairs in all",
    )
    add("--rank", type=whole(1), metavar="R", help="the mean rank (eva, uniform)")
    add(
        "--samples",
        type=whole(1),
        metavar="N",
        help="the most rows seen (default: 5000)",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument of the method: rounding=ceil; may be given again",
    )
    add(
        "--task-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the task: size=500; may be given again",
    )
    add(
        "--targets",
        action="append",
        metavar="NAME",
        help="a site, as in jaxpeft.attach; may be given again (default: attention's "
        "kernels)",
    )
    add(
        "--max-length",
        type=whole(1),
        default=128,
        metavar="T",
        help="tokens (default: 128)",
    )
    add("--batch-size", type=whole(1), default=32, metavar="B", help="(default: 32)")
    add("--scan-layers", action="store_true", help="layers in one stack, as in the run")


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    out, picture = new_file(given.out), given.map and new_file(given.map)
    start = new_file(str(out.with_suffix(".npz")))
    fields = named_options("--option", given.option) | {"name": given.method}
    for name in ("budget", "rank", "samples"):
        if getattr(given, name) is not None:
            fields[name] = getattr(given, name)

    from jaxpeft import data, dimension, models, runs

    runs.allocation_function(given.method)  # objects before anything is read
    task = data.task(
        {"name": given.task, **named_options("--task-option", given.task_option)}
    )
    with stage(f"reading {given.model}"):
        model, params = models.load(given.model, scan_layers=given.scan_layers)

    def draw(samples: int, seed: int):
        encoded = data.tokenize(
            data.unpacked(task),
            models.tokenizer(given.model),
            vocab_size=model.config.vocab_size,
            max_length=given.max_length,
            splits=["train"],
        )
        drawn = data.sample(encoded["train"], samples, seed=seed)
        return drawn.rows, data.evaluation_batches(drawn, given.batch_size)

    targets = given.targets or ATTENTION
    with stage(f"{given.method} on {task.name}"):
        found = runs.estimate_allocation(
            *(model, params, fields, draw), targets=targets, start_file=start
        )
    print(found)
    found.save(out)
    note(f"{out}: {found.facts['parameters']:,} parameters at {len(found)} sites")
    if picture:
        title = f"{given.method}, {given.model} on {task.name}"
        rows = found.facts.get("layers", [])
        drawn = dimension.plot_ranks(
            *(found.grid(), picture),
            title=title,
            remarks={str(r["block"]): r["remark"] for r in rows if r.get("remark")},
            legend=found.facts.get("legend"),
        )
        note(f"{drawn}: the map")


def new_file(name: str) -> Path:
    """An output file that is not there yet, in a folder that is; checked first."""
    file = Path(name)
    if file.exists():
        raise FileExistsError(f"{name!r} exists; nothing is overwritten. Name another.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{name!r}: there is no folder {str(file.parent)!r}.")
    return file


def named_options(flag: str, entries: Sequence[str]) -> dict[str, Any]:
    """Entries NAME=VALUE; a value is a Python literal, or else text."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (name and equals) or name in found:
            raise ValueError(f"{flag} {entry!r}: write {flag} NAME=VALUE, once a name.")
        try:
            found[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            found[name] = text
    return found
