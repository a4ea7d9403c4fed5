r"""The train step of every mixture beside that of one LoRA of its width, in one run.

    taskset -c 0 python -m benchmarks.mixture_speed \
        --json benchmarks/results/mixture_speed.json

N experts of rank r (a universal one among them) against one LoRA of rank N r at the
same sites: all seven linears of every layer of a random Llama, forward, gradient and
AdamW. All steps take turns in an order that goes round, so that whatever else the
machine does falls on all; a ratio to the LoRA is taken in each turn, and its median,
least and greatest are printed, of time and of processor time, in which waiting for a
core that others hold does not count. FLOPs of matmuls and temporaries are the
compiler's.

Mixtures are held to 1.05 of the LoRA's time. On a CPU, where routers are columns of
the down-projections' product, they take 0.98 to 1.04 of it at these sizes (processor
time: 0.97 to 1.05, and in two runs on a less crowded machine 0.96 to 1.03). With a
product for each router they took 1.06 to 1.12, most of it for gradients of 8 columns.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from benchmarks.by_hand import next_token_loss
from benchmarks.flops import mixture_methods
from benchmarks.hlo import matmul_flops
from jaxpeft import models

LIMIT = 1.05  # of a mixture's step over that of one LoRA of its width
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@dataclasses.dataclass(frozen=True)
class Size:
    """One model, batch and mixture; heads are 64 wide."""

    width: int = 1024
    inner: int = 2816
    layers: int = 1
    vocabulary: int = 512
    batch: int = 4
    length: int = 128
    experts: int = 8
    rank: int = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One method; ratios are over the LoRA, whose row is the first.

    Attributes:
        method: its name.
        flops: of the matmuls of a step, over the LoRA's.
        temporaries: bytes, over the LoRA's.
        step_ms: median milliseconds of a step.
        time: median, least and greatest ratio over the turns.
        processor: the same of processor time.
    """

    method: str
    flops: float
    temporaries: float
    step_ms: float
    time: tuple[float, float, float]
    processor: tuple[float, float, float]


def build(
    size: Size, names: Sequence[str] | None = None
) -> tuple[dict[str, tuple[Callable, tuple]], jax.Array]:
    """Returns ``{method: (step, what it starts from)}``, LoRA first, and the batch.

    Args:
        size: what is measured.
        names: the mixtures; ``None``: all.
    """
    config = {
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": max(1, size.width // 64),
        "num_key_value_heads": max(1, size.width // 128),
        "intermediate_size": size.inner,
    }
    model = models.from_config(config, head="causal_lm", scan_layers=True)
    params = models.init(model, jax.random.key(0))
    forward = jp.adapt(model.apply)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)

    def loss(trainable, frozen, ids):
        logits = forward({"params": jp.combine(trainable, frozen)}, ids)
        return next_token_loss(logits, ids)

    @jax.jit
    def step(trainable, state, frozen, ids):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    def start(adapter) -> tuple[Any, Any, Any]:
        run = lambda params, key: jp.attach(
            params, adapter, TARGETS, key=key, axes=model.axes
        )
        trainable, frozen = jp.partition(jax.jit(run)(params, jax.random.key(1)))
        trainable = jax.tree.map(lambda x: x + 0.01, trainable)  # b is 0 at the start
        return trainable, optimizer.init(trainable), frozen

    found = mixture_methods(size.rank, size.experts)
    chosen = [a for a in found if names is None or a.name in names]
    methods = [jp.lora(size.rank * size.experts), *chosen]
    shape = (size.batch, size.length)
    ids = np.random.default_rng(0).integers(0, size.vocabulary, shape, dtype=np.int32)
    return {a.name: (step, start(a)) for a in methods}, jnp.asarray(ids)


def compare(size: Size, turns: int, names: Sequence[str] | None = None) -> list[Row]:
    """Counts every step, then runs them in turns.

    Args:
        size: what is measured.
        turns: of each method; the first, which is not counted, comes on top.
        names: the mixtures; ``None``: all.

    Raises:
        RuntimeError: a loss is no number.
    """
    steps, ids = build(size, names)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        compiled = {
            name: step.lower(*state, ids).compile()
            for name, (step, state) in steps.items()
        }
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[Any]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(turns + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            begun = [clock() for clock in clocks]
            *_, loss = jax.block_until_ready(compiled[name](*steps[name][1], ids))
            if turn:  # the first touches every page for the first time
                now = [clock() for clock in clocks]
                seconds[name].append(np.subtract(now, begun))
            if not np.isfinite(loss):
                raise RuntimeError(f"the loss of {name} is {loss}")
    flops = {name: matmul_flops(c.as_text()) for name, c in compiled.items()}
    room = {n: c.memory_analysis().temp_size_in_bytes for n, c in compiled.items()}
    rows = []
    for name, times in seconds.items():
        ratios = np.divide(times, seconds["lora"]).T.tolist()
        span = [(statistics.median(r), min(r), max(r)) for r in ratios]
        rows.append(
            Row(
                method=name,
                flops=flops[name] / flops["lora"],
                temporaries=room[name] / room["lora"],
                step_ms=round(1e3 * float(np.median(times, 0)[0]), 1),
                time=span[0],
                processor=span[1],
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("method", "FLOPs", "temporaries", "step, ms", "time", "processor time")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    for r in rows:
        spans = [f"{m:.3f} ({a:.2f} to {z:.2f})" for m, a, z in (r.time, r.processor)]
        cells = (r.method, f"{r.flops:.3f}", f"{r.temporaries:.3f}", f"{r.step_ms:.0f}")
        lines.append(f"| {' | '.join([*cells, *spans])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns 1 where a mixture takes too long."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=15, help="of each method")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(Size)]
    size = Size(**{name: getattr(args, name) for name in names})
    rows = compare(size, args.turns)
    print(table(rows))
    if args.json:
        record = {
            "jax": jax.__version__,
            "platform": f"{jax.default_backend()}, {platform.machine()}",
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "size": dataclasses.asdict(size),
            "turns": args.turns,
            "limit": LIMIT,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.time[0] > LIMIT for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
