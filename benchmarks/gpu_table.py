"""Fine-tuning steps on one GPU: tokens a second, MFU, peak memory; beside HF PEFT.

    python -m benchmarks.gpu_table --json benchmarks/results/gpu_table.json
    python -m benchmarks.gpu_table --model 1b --minutes 5
    python -m benchmarks.gpu_table --model toy --here         # runs anywhere

A Llama of 8 (or 1) billion random weights in bfloat16, adapters of rank 16 on all
linears, one row of 4,096 tokens a step. Ours are the very steps of ``train.py``: loss,
gradient, clipping, AdamW. Beside them stand a LoRA step written by hand
(``benchmarks.by_hand``), and HF PEFT on PyTorch, where PyTorch sees a GPU.

Each row runs in a process of its own, has the GPU alone, and is written when it is
done: a table that is cut off keeps its rows. No row begins, and none goes on, after
``--minutes``. What does not fit without rematerialisation is tried with it, and a row
says which it was. Weights are random, those of adapters too: a step takes no longer for
it, and KaSA's decompositions, which come before the first step, are not measured here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RANK, WARM, STEPS, TURNS = 16, 2, 5, 3
MOST_MINUTES = 10.0
SHARED = dict(
    model_type="llama",
    max_position_embeddings=8192,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
MODELS = {
    "8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "toy": dict(
        vocab_size=128,
        hidden_size=64,  # a group of 4-bit codes
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="float32",  # CPUs compile and compute it sooner
    ),
}


class Row(NamedTuple):
    """One step of the table.

    Attributes:
        side: "ours", "by hand" or "HF PEFT".
        method: a name of ``jaxpeft.adapters``.
        changes: of the config, ``("field", value)``.
        quantise: the kind of a quantised base (``jaxpeft.quantise``), or ``None``.
    """

    side: str
    method: str
    changes: tuple[tuple[str, Any], ...] = ()
    quantise: str | None = None


ROWS = {
    "ours/lora": Row("ours", "lora"),
    "hand/lora": Row("by hand", "lora"),
    "peft/lora": Row("HF PEFT", "lora"),
    "ours/dora": Row("ours", "dora"),
    "ours/bora": Row("ours", "bora"),
    "ours/kasa": Row("ours", "kasa"),
    "ours/lora/nf4": Row("ours", "lora", quantise="nf4"),
    "peft/dora": Row("HF PEFT", "dora"),
}
# (attention, what a layer keeps for its backward pass), in the order tried
ON_A_GPU = (("cudnn", None), ("cudnn", "full"), ("xla", "full"))
ELSEWHERE = ((None, None),)


def measure(row: Row, model: str, tokens: int) -> dict[str, Any]:
    """Measures one row in this process.

    Args:
        row: which.
        model: of ``MODELS``.
        tokens: of a step.

    Returns:
        ``step_seconds`` (of each turn the mean), ``tokens_per_second`` and ``mfu`` (of
        the median turn; 4 FLOPs a parameter and token, of the chip's most; None where
        no figure is known), ``peak_bytes``, ``parameters``, ``device``, and how it ran;
        or why it was ``left_out``.
    """
    if row.side == "HF PEFT":
        from benchmarks.peers.gpu_steps import peft_step as make

        ways: Any = (None, "full")
    else:
        import jax

        from benchmarks.peers import gpu_steps

        gpu = jax.default_backend() == "gpu"
        make = gpu_steps.our_step if row.side == "ours" else gpu_steps.hand_step
        ways = ON_A_GPU if gpu else ELSEWHERE
    failed: dict[str, str] = {}
    for way in ways:
        try:
            found = make(row, {**SHARED, **MODELS[model]}, tokens, RANK, way)
            if isinstance(found, str):
                return {"left_out": found}
            step, facts = found
            seconds = _timed(step)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # Too little memory, or a kernel that does not take these shapes.
            failed[str(way)] = " ".join(str(error).split())[:200]
            continue
        middle = sorted(seconds)[len(seconds) // 2]
        most = facts.pop("flops")
        rate = tokens / middle
        return {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * 4 * facts["parameters"] / most if most else None,
            "peak_bytes": facts.pop("peak")(),
            **facts,
            "failed": failed,
        }
    return {"left_out": "it ran in no way", "failed": failed}


def _timed(step: Callable[[], None]) -> list[float]:
    """Mean seconds of a step, of each turn; ``step`` waits for what it has begun."""
    for _ in range(WARM):
        step()
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        seconds.append((time.perf_counter() - start) / STEPS)
    return seconds


def _apart(name: str, given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The same in a process of its own, which has so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.gpu_table", "--row", name]
        command += ["--model", given.model, "--tokens", str(given.tokens)]
        try:
            done = subprocess.run(
                [*command, "--json", str(out)],
                cwd=ROOT,
                timeout=seconds,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
        except subprocess.TimeoutExpired:
            return {"left_out": f"cut off after {seconds:.0f} s"}
        if out.is_file():
            return json.loads(out.read_text())
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"left_out": f"its process ended with {done.returncode}: {said[:300]}"}


def versions() -> dict[str, str]:
    """Versions of what takes part; a package that is not installed is left out."""
    found = {"python": sys.version.split()[0]}
    packages = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
    for package in (*packages, "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    if "left_out" in row:
        return f"| {name} | {row['left_out']} | | |"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
    return f"| {name} | {row['tokens_per_second']:,.0f} | {mfu} | {peak} |"


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--tokens", type=int, help="a step (4096; of the toy 64)")
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help="in all")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--here", action="store_true", help="all in this process")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.tokens is None:
        given.tokens = 64 if given.model == "toy" else 4096
    if given.row:  # the process of one
        found = measure(ROWS[given.row], given.model, given.tokens)
        given.json.write_text(json.dumps(found))
        return 0
    record: dict[str, Any] = {
        "command": " ".join(
            ["python -m benchmarks.gpu_table", *(argv or sys.argv[1:])]
        ),
        "versions": versions(),
        "model": {"name": given.model, **SHARED, **MODELS[given.model]},
        "tokens_a_step": given.tokens,
        "rank": RANK,
        "rows": {},
    }
    print("| step | tokens/s | MFU | peak memory, GB |\n|---|---|---|---|", flush=True)
    for name in given.only:
        left = given.minutes * 60 - (time.monotonic() - started)
        if left <= 0:
            row = {"left_out": "no time was left"}
        elif given.here:
            row = measure(ROWS[name], given.model, given.tokens)
        else:
            row = _apart(name, given, left)
        record["rows"][name] = row
        print(line(name, row), flush=True)
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            fresh = given.json.with_suffix(".new")
            fresh.write_text(json.dumps(record, indent=1) + "\n")
            fresh.replace(given.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
