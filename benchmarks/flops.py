"""Matmul FLOPs and temporary memory of a train step, over the theoretical minimum.

    python -m benchmarks.flops
    python -m benchmarks.flops --json flops.json --rank 16 --width 512

Compiles (does not run) the train step, loss and gradients, of a scanned,
rematerialised encoder and decoder with an adapter at every linear, for every
low-rank method of ``jaxpeft.adapters``. Printed beside each other:

- ``frozen``: no adapter, forward and the gradient of every layer's input;
- ``adapt``: the adapted step through ``jaxpeft.adapt``. Held to at most 1.02;
- ``merge``: the same step with ``jaxpeft.merge`` inside, for comparison.

FLOPs are counted in the optimised HLO with loops multiplied out (``hlo.py``) and
divided by the minimum (``programs.py``). Temporaries are XLA's for this machine.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from benchmarks.hlo import made_of_shape, matmul_flops
from benchmarks.programs import (
    Program,
    decoder,
    encoder,
    factors_of,
    low_rank_pairs,
)

LIMIT = 1.02


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step.

    Attributes:
        program: the model.
        method: the adapter's name, or ``"-"``.
        way: ``"frozen"``, ``"adapt"`` or ``"merge"``.
        flops: matmul FLOPs of a step.
        ratio: over the minimum.
        temporary_bytes: of XLA's buffers for this device.
        kernel_temporaries: arrays of a kernel's full shape that are computed.
    """

    program: str
    method: str
    way: str
    flops: float
    ratio: float
    temporary_bytes: int
    kernel_temporaries: int


def methods() -> dict[str, Any]:
    """The constructors of ``jaxpeft.adapters`` whose factors are low-rank pairs."""
    found = {}
    for name in sorted(n for n in dir(jp.adapters) if not n.startswith("_")):
        constructor = getattr(jp.adapters, name)
        if not callable(constructor):
            continue
        adapter = constructor()
        if adapter.rank is None:
            continue
        factors, trainable = factors_of(adapter, 2, 8, 6)
        f = jax.eval_shape(factors, trainable)
        scaled = f.c is not None or f.o is not None
        if f.a is not None and f.kernel is None and f.phi is None and not scaled:
            found[name] = constructor
    return found


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _attached(program: Program, adapter: jp.core.Adapter) -> Any:
    def attach(params, key):
        names = [w.name for w in program.linears]
        adapted = jp.attach(params, adapter, names, key=key, axes=program.axes)
        if program.head:
            adapted = jp.attach(adapted, jp.full(), list(program.head), key=key)
        return adapted

    return jax.eval_shape(attach, program.params, jax.random.key(0))


def _row(program: Program, method: str, way: str, loss, args, minimum: float) -> Row:
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    text = compiled.as_text()
    shapes = []
    for w in program.linears:
        shapes += [(w.d_in, w.d_out), (program.layers, w.d_in, w.d_out)]
    flops = matmul_flops(text)
    return Row(
        program=program.name,
        method=method,
        way=way,
        flops=flops,
        ratio=flops / minimum,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        kernel_temporaries=len(made_of_shape(text, shapes)),
    )


def measure(program: Program, rank: int, merge: bool = True) -> Iterator[Row]:
    """Compiles every way of running one program.

    Args:
        program: what to measure.
        rank: of the adapters.
        merge: whether to compile merging in the step, too.

    Yields:
        A ``Row`` each.
    """
    ids = jax.ShapeDtypeStruct((program.batch, program.length), jnp.int32)

    # Forward and dX need something below the layers to differentiate: a shift of
    # the first norm's or embedding's output would do; a factor on the tokens' table
    # is the least intrusion.
    def frozen(gain, params, ids):
        table = _embedding_path(params)
        tables = jax.tree_util.tree_map_with_path(
            lambda path, x: x * gain if jax.tree_util.keystr(path) == table else x,
            params,
        )
        return program.loss(tables, ids)

    gain = jax.ShapeDtypeStruct((), jnp.float32)
    args = (gain, program.params, ids)
    minimum = program.frozen_flops()
    yield _row(program, "-", "frozen", frozen, args, minimum)

    for name, constructor in methods().items():
        adapter = constructor(rank=rank)
        halves = jp.partition(_attached(program, adapter))
        minimum = program.minimum(low_rank_pairs(adapter, rank))

        def adapted_loss(trainable, frozen, ids):
            adapted = jp.combine(trainable, frozen)
            return jp.adapt(program.loss)(adapted, ids) + jp.penalty(adapted)

        yield _row(program, name, "adapt", adapted_loss, (*halves, ids), minimum)

        def merged_loss(trainable, frozen, ids):
            adapted = jp.combine(trainable, frozen)
            return program.loss(jp.merge(adapted), ids) + jp.penalty(adapted)

        if merge:
            yield _row(program, name, "merge", merged_loss, (*halves, ids), minimum)


def _embedding_path(params: Any) -> str:
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    return next(p for p in paths if "word_embeddings" in p or "embed'" in p)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("program", "method", "way", "GFLOP", "/ minimum", "temporaries", "kernels")
    cells = [
        (
            r.program,
            r.method,
            r.way,
            f"{r.flops / 1e9:.3f}",
            f"{r.ratio:.3f}",
            f"{r.temporary_bytes / 2**20:.1f} MiB",
            str(r.kernel_temporaries),
        )
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    line = lambda row: "  ".join(
        c.ljust(w) for c, w in zip(row, widths, strict=True)
    ).rstrip()
    return "\n".join(map(line, (head, tuple("-" * w for w in widths), *cells)))


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns 1 if a ratio is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    size = (args.width, 4 * args.width, args.layers, args.batch, args.length)
    rows = []
    for make in (encoder, decoder):
        rows += measure(make(*size), args.rank)
    print(table(rows))
    if args.json:
        record = {"jax": jax.__version__, "rows": [dataclasses.asdict(r) for r in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    above = [r for r in rows if r.way == "adapt" and r.ratio > LIMIT]
    for r in above:
        print(f"above {LIMIT}: {r.program}, {r.method}: {r.ratio:.4f}")
    return int(bool(above))


if __name__ == "__main__":
    raise SystemExit(main())
