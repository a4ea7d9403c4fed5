r"""A batch of many adapters beside the same batch with one, in one run.

    python -m benchmarks.many_adapters
    taskset -c 0 python -m benchmarks.many_adapters \
        --json benchmarks/results/many_adapters.json

A random Llama with adapters of rank 16 on all seven linears of every layer, 32 rows:

- reading: a forward pass over all tokens of the rows;
- writing: ``models.generate`` from prompts of 16 tokens, with a cache.

"one" is an adapted tree, the same adapter for every row; "mixed" are slots, 16 adapters
and two rows of each (for writing ``with_rows(..., copies=True)``, which is counted);
"apart" is what there is without slots, one call for each adapter with its own two rows.
They take turns, so that whatever else the machine does falls on
all; a ratio to "one" is taken in each turn, and its median, least and greatest are
printed. Matmul FLOPs and temporaries of the forward pass are the compiler's.

A mixed batch is held to 1.3 times "one". What it costs more is the reading of 16 pairs
where "one" reads a single one: at width 512 they are as many numbers as the kernel
itself, and writing, which read them anew for each token, took 1.38 times as long; with
copies for the rows, taken once, 1.25 (processor time, the two and "one" in turns). The
figures in ``benchmarks/results`` are of width 1024 and from before there were copies.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from benchmarks.hlo import matmul_flops
from jaxpeft import models, serving
from jaxpeft.tree import nodes

LIMIT = 1.3  # of a mixed batch over one with one adapter
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        width: of the hidden states.
        inner: of the MLP.
        layers: of the decoder.
        vocabulary: tokens.
        rows: of the batch.
        adapters: in the batch; must divide ``rows``.
        rank: of every adapter.
        tokens: of each row in the forward pass.
        prompt: tokens of each prompt.
        new: tokens written after it.
    """

    width: int = 1024
    inner: int = 2816
    layers: int = 2
    vocabulary: int = 2048
    rows: int = 32
    adapters: int = 16
    rank: int = 16
    tokens: int = 32
    prompt: int = 16
    new: int = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        task: ``"reading"`` or ``"writing"``.
        layers: ``"unrolled"`` or ``"scanned"``.
        how: how the slots are read.
        seconds: medians by way.
        ratios: by way, over "one": median, least and greatest.
        flops: matmul FLOPs of the forward pass by way, over "one".
        temporaries: bytes of the forward pass by way.
    """

    task: str
    layers: str
    how: str
    seconds: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]
    flops: dict[str, float]
    temporaries: dict[str, int]


def build(size: Size, scan: bool, how: str | None):
    """``(model, params, slots, the adapters by name)``."""
    config = {
        "model_type": "llama",
        "hidden_size": size.width,
        "num_attention_heads": max(1, size.width // 64),
        "num_key_value_heads": max(1, size.width // 128),
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "vocab_size": size.vocabulary,
    }
    model = models.from_config(config, head="causal_lm", scan_layers=scan)
    params = models.init(model, jax.random.key(0))
    slots = serving.slots(
        params,
        TARGETS,
        capacity=size.adapters,
        rank=size.rank,
        axes=model.axes,
        how=how,
    )

    @jax.jit
    def trained(key):
        keys = jax.random.split(key)
        method = jp.lora(rank=size.rank)
        tree = jp.attach(params, method, TARGETS, key=keys[0], axes=model.axes)
        trainable, frozen = jp.partition(tree)
        leaves, treedef = jax.tree.flatten(trainable)
        draws = jax.random.split(keys[1], len(leaves))
        moved = [
            x + 0.02 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, draws, strict=True)
        ]
        return jp.extract(jp.combine(treedef.unflatten(moved), frozen))

    trees = {}
    for i in range(size.adapters):
        tree = jp.graft(params, trained(jax.random.key(i + 1)))
        trees[f"adapter {i}"] = tree
        slots = serving.load(slots, f"adapter {i}", tree)
    return model, params, slots, trees


def ways(size: Size, params, slots, trees) -> dict[str, list[tuple[Any, int]]]:
    """For each way the calls that it makes: ``(tree, rows)``."""
    names = [name for name in trees for _ in range(size.rows // size.adapters)]
    mixed = serving.with_rows(slots.tree, serving.rows(slots, names))
    return {
        "base": [(params, size.rows)],
        "one": [(trees["adapter 0"], size.rows)],
        "mixed": [(mixed, size.rows)],
        "apart": [(tree, size.rows // size.adapters) for tree in trees.values()],
    }


def compare(size: Size, scan: bool, how: str | None, turns: int) -> list[Row]:
    """Runs every way in turns: a row for reading and one for writing."""
    model, params, slots, trees = build(size, scan, how)
    calls = ways(size, params, slots, trees)
    mixed = calls["mixed"][0][0]
    index = nodes(mixed)[0].call["rows"].reshape(-1, size.rows)[0]
    forward = jax.jit(jp.adapt(lambda tree, ids: model.apply({"params": tree}, ids)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, size.vocabulary, (size.rows, size.tokens), np.int32)

    def read(tree, rows):
        return jax.block_until_ready(forward(tree, jnp.asarray(ids[:rows])))

    def write(tree, rows):
        if tree is mixed:  # each row's pair, once for all its tokens
            tree = serving.with_rows(slots.tree, index, copies=True)
        prompts = ids[:rows, : size.prompt].tolist()
        return models.generate(model, tree, prompts, max_new_tokens=size.new, stop=())

    compiled = {
        way: forward.lower(each[0][0], jnp.asarray(ids[: each[0][1]])).compile()
        for way, each in calls.items()
    }
    flops = {
        way: matmul_flops(c.as_text()) * len(calls[way]) for way, c in compiled.items()
    }
    temporaries = {
        way: c.memory_analysis().temp_size_in_bytes for way, c in compiled.items()
    }
    used = dict(nodes(slots.tree)[0].adapter.options)
    made = []
    for task, run in (("reading", read), ("writing", write)):
        times = _in_turns(run, calls, turns)
        ratios = {
            way: [t / o for t, o in zip(ts, times["one"], strict=True)]
            for way, ts in times.items()
        }
        made.append(
            Row(
                task=task,
                layers="scanned" if scan else "unrolled",
                how=used["how"],
                seconds={way: statistics.median(ts) for way, ts in times.items()},
                ratios={
                    way: (statistics.median(r), min(r), max(r))
                    for way, r in ratios.items()
                },
                flops={way: n / flops["one"] for way, n in flops.items()},
                temporaries=temporaries,
            )
        )
    return made


def _in_turns(run: Callable, calls, turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(turns + 1):
        for way, each in calls.items():
            start = time.perf_counter()
            for tree, rows in each:
                run(tree, rows)
            if turn:  # the first one compiles
                times[way].append(time.perf_counter() - start)
    return times


def table(rows: list[Row]) -> str:
    """The figures as text."""
    lines = []
    for row in rows:
        lines.append(f"{row.task}, {row.layers}, {row.how}")
        for way, (middle, least, most) in row.ratios.items():
            lines.append(
                f"  {way:6} {row.seconds[way] * 1e3:8.1f} ms  {middle:.2f} times one "
                f"({least:.2f} to {most:.2f});  forward: {row.flops[way]:.3f} of the "
                f"FLOPs, {row.temporaries[way] / 2**20:.1f} MiB of temporaries"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns 1 where a mixed batch takes too long."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9, help="of each way")
    parser.add_argument("--how", help="how the slots are read (default: as on this)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    args = parser.parse_args(argv)
    names = [field.name for field in dataclasses.fields(Size)]
    size = Size(**{name: getattr(args, name) for name in names})
    rows = [
        r for scan in (False, True) for r in compare(size, scan, args.how, args.turns)
    ]
    print(table(rows))
    if args.json:
        record = {
            "jax": jax.__version__,
            "platform": f"{jax.default_backend()}, {platform.processor()}",
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "size": dataclasses.asdict(size),
            "turns": args.turns,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.ratios["mixed"][0] > LIMIT for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
