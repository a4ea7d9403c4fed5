"""Matmul FLOPs and temporary memory of a train step, over the theoretical minimum.

    python -m benchmarks.flops
    python -m benchmarks.flops --json benchmarks/results/flops.json

Compiles (does not run) the train step, loss and gradients, of a scanned encoder and
decoder with an adapter at every linear, for every method of ``jaxpeft.adapters`` that
sits on kernels. Printed beside each other:

- ``frozen``: no adapter, forward and the gradient of every layer's input;
- ``adapt``: the adapted step through ``jaxpeft.adapt``;
- ``merge``: the same step with ``jaxpeft.merge`` inside, for comparison.

Methods without scales are held to 1.02 of the minimum under full rematerialisation.
The gradient of an output scale needs the output again: methods with one are
held to 1.03 without rematerialisation or with those outputs kept (``unscaled``), and
to 1.08 under full rematerialisation.

Mixtures of N experts of rank r are held to 1.05 of the FLOPs and 1.1 of the temporaries
of one LoRA of rank N r at the same sites (``--mixtures``; their ratios are over it):

    python -m benchmarks.flops --mixtures

FLOPs are counted in the optimised HLO with loops multiplied out (``hlo.py``) and
divided by the minimum (``programs.py``). Temporaries are XLA's for this machine, and so
are copies (copies and transposes of whole arrays, loops multiplied out) and the bytes
that ``cost_analysis`` says are accessed, where the body of a loop counts once.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from benchmarks.hlo import copies, made_of_shape, matmul_flops
from benchmarks.programs import Parts, Program, decoder, encoder, parts_of

REMATS = ("full", "unscaled", "none")


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step.

    Attributes:
        program: the model.
        remat: what a layer keeps for its backward pass, see ``Program``.
        method: the adapter's name, or ``"-"``.
        way: ``"frozen"``, ``"adapt"`` or ``"merge"``.
        flops: matmul FLOPs of a step.
        ratio: over the minimum.
        temporary_bytes: of XLA's buffers for this device.
        copies: copies and transposes that a step runs, see ``hlo.copies``.
        accessed_bytes: of ``cost_analysis``; the body of a loop counts once.
        kernel_temporaries: arrays of a kernel's full shape that are computed.
        limit: what the ratio is held to, or ``None``.
    """

    program: str
    remat: str
    method: str
    way: str
    flops: float
    ratio: float
    temporary_bytes: int
    copies: int
    accessed_bytes: float
    kernel_temporaries: int
    limit: float | None


@functools.cache  # it asks each for its shapes, and nothing of it is for one program
def methods() -> dict[str, Parts]:
    """The methods of ``jaxpeft.adapters`` that sit on kernels, by name; no mixtures."""
    found = {}
    for name in sorted(n for n in dir(jp.adapters) if not n.startswith("_")):
        constructor = getattr(jp.adapters, name)
        if callable(constructor) and not _has_experts(constructor()):
            parts = parts_of(constructor(), rank=2)
            if parts is not None:
                found[name] = parts
    return found


def _has_experts(adapter: jp.tree.Adapter) -> bool:
    return bool(jp.tree.structure(adapter, adapter.where.rank).experts)


def limit(parts: Parts, remat: str) -> float:
    """What a method's ratio is held to."""
    if parts.scaled:
        return 1.08 if remat == "full" else 1.03
    return 1.02


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _attached(program: Program, adapter: jp.tree.Adapter) -> Any:
    def attach(params, key):
        names = [w.name for w in program.linears]
        adapted = jp.attach(params, adapter, names, key=key, axes=program.axes)
        if program.head and adapter.where.leaf == "kernel":
            adapted = jp.attach(adapted, jp.full(), list(program.head), key=key)
        return adapted

    return jax.eval_shape(attach, program.params, jax.random.key(0))


def _row(
    program: Program, method: str, way: str, loss, args, minimum: float, limit=None
) -> Row:
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    text = compiled.as_text()
    shapes = []
    for w in program.linears:
        shapes += [(w.d_in, w.d_out), (program.layers, w.d_in, w.d_out)]
    flops = matmul_flops(text)
    return Row(
        program=program.name,
        remat=program.remat,
        method=method,
        way=way,
        flops=flops,
        ratio=flops / minimum,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        copies=copies(text),
        accessed_bytes=compiled.cost_analysis()["bytes accessed"],
        kernel_temporaries=len(made_of_shape(text, shapes)),
        limit=limit,
    )


def measure(
    program: Program,
    rank: int,
    names: Sequence[str] | None = None,
    merge: Sequence[str] = (),
) -> Iterator[Row]:
    """Compiles every way of running one program.

    Args:
        program: what to measure.
        rank: of the adapters.
        names: the methods; ``None`` means all of ``methods()``.
        merge: those whose merging in the step is compiled, too.

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

    for name, parts in methods().items():
        if names is not None and name not in names:
            continue
        adapter = _made(name, rank)
        halves = jp.partition(_attached(program, adapter))
        minimum = program.minimum(parts_of(adapter, rank))

        def adapted_loss(trainable, frozen, ids):
            adapted = jp.combine(trainable, frozen)
            return jp.adapt(program.loss)(adapted, ids) + jp.penalty(adapted)

        args, most = (*halves, ids), limit(parts, program.remat)
        yield _row(program, name, "adapt", adapted_loss, args, minimum, most)

        def merged_loss(trainable, frozen, ids):
            adapted = jp.combine(trainable, frozen)
            return program.loss(jp.merge(adapted), ids) + jp.penalty(adapted)

        if name in merge:
            yield _row(program, name, "merge", merged_loss, args, minimum)


def mixtures(
    program: Program, rank: int, experts: int, names: Sequence[str] | None = None
) -> Iterator[Row]:
    """Compiles a step of every mixture, and of one LoRA of their width.

    Args:
        program: what to measure.
        rank: of each expert.
        experts: their number, a universal one included.
        names: the methods; ``None`` means all mixtures.

    Yields:
        A ``Row`` each, the LoRA's first; ratios and limits are over it, and
        ``kernel_temporaries`` counts arrays with a place for each expert and output.
    """
    ids = jax.ShapeDtypeStruct((program.batch, program.length), jnp.int32)
    rows, alone = (program.batch, program.length), program.batch * program.length
    shapes = [
        (*lead, experts, w.d_out) for w in program.linears for lead in (rows, (alone,))
    ]
    one = None
    found = mixture_methods(rank, experts)
    found = [a for a in found if names is None or a.name in names]
    for adapter in (jp.lora(rank * experts), *found):

        def loss(trainable, frozen, ids):
            return jp.adapt(program.loss)(jp.combine(trainable, frozen), ids)

        halves = jp.partition(_attached(program, adapter))
        step = jax.jit(jax.value_and_grad(loss)).lower(*halves, ids).compile()
        flops = matmul_flops(step.as_text())
        one = one or flops
        yield Row(
            program=program.name,
            remat=program.remat,
            method=adapter.name,
            way="adapt",
            flops=flops,
            ratio=flops / one,
            temporary_bytes=step.memory_analysis().temp_size_in_bytes,
            copies=copies(step.as_text()),
            accessed_bytes=step.cost_analysis()["bytes accessed"],
            kernel_temporaries=len(made_of_shape(step.as_text(), shapes)),
            limit=1.05,
        )


def mixture_methods(rank: int, experts: int) -> Iterator[jp.tree.Adapter]:
    """Every method with experts, at one number of experts of one rank."""
    names = tuple(f"domain_{i}" for i in range(experts - 1))
    sizes = {"experts": experts, "domains": names, "rank_universal": rank}
    for name in sorted(n for n in dir(jp.adapters) if not n.startswith("_")):
        constructor = getattr(jp.adapters, name)
        if callable(constructor) and _has_experts(constructor()):
            options = dict(constructor().options)
            fitting = {n: v for n, v in sizes.items() if n in options}
            yield constructor(**(options | fitting | {"rank": rank, "dropout": 0.0}))


def _made(name: str, rank: int) -> jp.tree.Adapter:
    """A method at its defaults but for the rank, if it has one."""
    constructor = jp.tree.find_method(name)
    return constructor() if constructor().where.rank is None else constructor(rank=rank)


def _embedding_path(params: Any) -> str:
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    return next(p for p in paths if "word_embeddings" in p or "embed'" in p)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("program", "remat", "method", "way")
    head += (
        "GFLOP",
        "/ minimum",
        "limit",
        "temporaries",
        "copies",
        "accessed",
        "kernels",
    )
    cells = [
        (
            r.program,
            r.remat,
            r.method,
            r.way,
            f"{r.flops / 1e9:.3f}",
            f"{r.ratio:.3f}",
            "" if r.limit is None else f"{r.limit:.2f}",
            f"{r.temporary_bytes / 2**20:.1f} MiB",
            str(r.copies),
            f"{r.accessed_bytes / 2**20:.1f} MiB",
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
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--mixtures", action="store_true", help="mixtures alone")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    # A feed-forward of 4 widths in BERT, of 8/3 and three matrices in Llama.
    hidden = {encoder: 4 * args.width, decoder: 8 * args.width // 3}
    size = (args.layers, args.batch, args.length)
    rows = []
    for make, remat in itertools.product(hidden, REMATS):
        program = make(args.width, hidden[make], *size, remat=remat)
        if args.mixtures:
            if remat != "unscaled":
                rows += mixtures(program, args.rank, experts=8)
            continue
        names = [
            name
            for name, parts in methods().items()
            if remat != "unscaled" or parts.scaled
        ]
        rows += measure(program, args.rank, names, names if remat == "full" else ())
    print(table(rows))
    if args.json:
        record = {"jax": jax.__version__, "rows": [dataclasses.asdict(r) for r in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    above = [r for r in rows if r.limit is not None and r.ratio > r.limit]
    for r in above:
        print(f"above {r.limit}: {r.program}, {r.remat}, {r.method}: {r.ratio:.4f}")
    return int(bool(above))


if __name__ == "__main__":
    raise SystemExit(main())
