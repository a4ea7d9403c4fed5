"""The train step of jaxpeft beside that of HF PEFT on PyTorch, on the CPU, in one run.

    python -m benchmarks.against_peers
    python -m benchmarks.against_peers --json benchmarks/results/peers.json

For a tiny and a small encoder (BERT) and decoder (Llama), random weights: the same
weights, batch, targets, rank and optimiser on both sides, each in a process of its
own. What is compared is **processor time on one core**: all processes are pinned to
the same core, so that XLA and PyTorch run one thread of work each, and time in which
the core works for others does not count. They take turns, a few steps at a time; a
ratio is taken for each turn, and its median, least and greatest are printed. A third
process runs the frozen model alone, forward and the gradient of every layer's input,
in the same compiler as ours: the step over it is what adapters and the optimiser cost.
Peak memory is each process's own, over what it held before its model was there: the
compiler's memory is in it.

The losses of the first step must agree, or nothing is reported.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

ENCODER_TARGETS = {
    "theirs": r".*encoder\.layer.*(query|key|value|dense)",
    "ours": r".*encoder/.*(query|key|value|dense)",
}
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODER_TARGETS = {"theirs": _LINEARS, "ours": _LINEARS}


@dataclasses.dataclass(frozen=True)
class Size:
    """One model and batch."""

    name: str
    width: int
    layers: int
    heads: int
    batch: int
    length: int
    vocabulary: int = 2048


SIZES = (
    Size("tiny", width=128, layers=2, heads=4, batch=8, length=64),
    Size("small", width=384, layers=6, heads=6, batch=16, length=64),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        model: size and kind.
        method: the adapter.
        peer: the other library.
        step_ms: median milliseconds of processor time a step, ours then theirs.
        time: our time over theirs: median, least and greatest over the turns.
        frozen: our time over that of our frozen model, likewise.
        memory_mb: peak memory in MB (10^6 bytes), ours then theirs.
        memory: our peak over theirs.
    """

    model: str
    method: str
    peer: str
    step_ms: tuple[float, float]
    time: tuple[float, float, float]
    frozen: tuple[float, float, float]
    memory_mb: tuple[float, float]
    memory: float


def write_model(folder: Path, kind: str, size: Size) -> None:
    """Writes a random model as a Hugging Face folder, and a batch beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    common = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "pad_token_id": 0,
    }
    if kind == "encoder":
        config = transformers.BertConfig(
            **common,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=4,
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        heads = {"num_key_value_heads": size.heads // 2, "tie_word_embeddings": False}
        config = transformers.LlamaConfig(**common, **heads)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, size.vocabulary, (size.batch, size.length), dtype=np.int32)
    labels = rng.integers(0, 4, size.batch, dtype=np.int32)
    np.savez(folder / "batch.npz", ids=ids, labels=labels if kind == "encoder" else ids)


class Worker:
    """A process that trains, or writes, when told to."""

    def __init__(self, module: str, settings: dict):
        """Starts it and waits for the result of its first step."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if settings["quiet"] else None,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        )
        self.first = self.ask(settings)["result"]

    def ask(self, command: dict) -> dict:
        """Sends one command and waits for its answer."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.process.args[-1]} ended with code {self.process.wait()}; run "
                "again with --verbose to see why"
            )
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate(timeout=60)


def compare(
    folder: Path,
    kind: str,
    size: Size,
    method: str,
    rank: int,
    turns: int,
    quiet: bool,
    core: int,
) -> Row:
    """Runs both sides, and our frozen model, in turns on one core.

    Raises:
        RuntimeError: the first losses differ: it is not the same step.
    """
    settings = {
        "folder": str(folder),
        "batch": str(folder / "batch.npz"),
        "kind": kind,
        "targets": ENCODER_TARGETS if kind == "encoder" else DECODER_TARGETS,
        "method": method,
        "rank": rank,
        "scan": False,
        "quiet": quiet,
        "core": core,
    }
    modules = ("benchmarks.peers.with_jaxpeft", "benchmarks.peers.with_peft")
    workers = [Worker(module, settings) for module in modules]
    losses = [w.first for w in workers]
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
        raise RuntimeError(f"the first losses differ: {losses}; not the same step")
    workers.append(Worker(modules[0], settings | {"method": "frozen"}))
    each = workers[1].ask({"steps": 2})["processor"] / 2
    steps = max(2, round(1.0 / each))  # a turn takes about a second
    used: list[list[float]] = [[], [], []]
    for turn in range(turns):
        for i in (0, 1, 2) if turn % 2 else (2, 1, 0):
            used[i].append(workers[i].ask({"steps": steps})["processor"] / steps)
    peaks = [w.ask({"memory": True})["bytes"] for w in workers]
    for w in workers:
        w.close()
    ours, theirs, frozen = used
    ms = [1e3 * statistics.median(s) for s in used]
    return Row(
        model=f"{size.name} {kind}",
        method=method,
        peer="HF PEFT",
        step_ms=(round(ms[0], 2), round(ms[1], 2)),
        time=_ratio(ours, theirs),
        frozen=_ratio(ours, frozen),
        memory_mb=(round(peaks[0] / 1e6, 1), round(peaks[1] / 1e6, 1)),
        memory=peaks[0] / peaks[1],
    )


def _ratio(these: list[float], those: list[float]) -> tuple[float, float, float]:
    ratios = sorted(a / b for a, b in zip(these, those, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("model", "method", "ms a step, ours / theirs", "time ratio (range)")
    head += ("over our frozen model (range)", "peak memory ratio")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    spread = lambda three: "{:.2f} ({:.2f} to {:.2f})".format(*three)
    for r in rows:
        lines.append(
            f"| {r.model} | {r.method} | {r.step_ms[0]:.1f} / {r.step_ms[1]:.1f} | "
            f"{spread(r.time)} | {spread(r.frozen)} | {r.memory:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--methods", nargs="+", default=["lora", "dora"], choices=["lora", "dora"]
    )
    parser.add_argument("--sizes", nargs="+", default=[s.name for s in SIZES])
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--core", type=int, default=cores[0], choices=cores)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--verbose", action="store_true", help="show what workers say")
    args = parser.parse_args(argv)
    rows = []
    for size in (s for s in SIZES if s.name in args.sizes):
        for kind in ("encoder", "decoder"):
            with tempfile.TemporaryDirectory() as folder:
                write_model(Path(folder), kind, size)
                for method in args.methods:
                    rows.append(
                        compare(
                            Path(folder),
                            kind,
                            size,
                            method,
                            args.rank,
                            args.turns,
                            not args.verbose,
                            args.core,
                        )
                    )
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))
    if args.json:
        packages = ("jax", "torch", "transformers", "peft", "optax")
        record = {
            "versions": {p: metadata.version(p) for p in packages},
            "machine": f"{platform.machine()}, one core of {os.cpu_count()}",
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
