"""What adapters cost outside of the step: tracing, compiling, importing.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --json overhead.json

- Tracing: a model of 32 unrolled layers with seven linears each, LoRA on all of them;
  seconds to trace and lower the gradient step through ``jaxpeft.adapt``, less the
  same for the model with its low-rank terms written by hand. Held to 1 s.
- Compiling: the scanned decoder of ``programs.py`` at 2, 8 and 32 layers; the time
  should not depend on the number.
- Importing: ``import jaxpeft`` after ``import jax, flax, optax``. Held to 0.5 s.

Tracing and compiling are in seconds of processor time, so that a busy machine shows
little; each figure is the least of several in one run. Ratios travel better than
seconds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from benchmarks.programs import decoder

TRACING_LIMIT, IMPORT_LIMIT = 1.0, 0.5
LINEARS = {
    "q": (64, 64),
    "k": (64, 64),
    "v": (64, 64),
    "o": (64, 64),
    "gate": (64, 160),
    "up": (64, 160),
    "down": (160, 64),
}


def _least(times: int, measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(times))


def _unrolled(layers: int) -> tuple[Callable, Any]:
    """A fresh function (nothing is cached for it) of unrolled blocks, and shapes.

    A kernel may be a pair beside it, ``(w, a, b)``, as one would write by hand.
    """

    def linear(x, kernel):
        if not isinstance(kernel, tuple):
            return x @ kernel
        w, a, b = kernel
        return x @ w + (x @ a) @ b

    def loss(params, x):
        for i in range(layers):
            p = params[f"layer_{i}"]
            use = lambda x, name: linear(x, p[name]["kernel"])  # noqa: B023
            q, k, v = (use(x, n) for n in "qkv")
            x = x + use(jax.nn.softmax(q @ k.T) @ v, "o")
            y = jax.nn.silu(use(x, "gate")) * use(x, "up")
            x = x + use(y, "down")
        return jnp.mean(x**2)

    kernel = lambda shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    layer = {name: kernel(shape) for name, shape in LINEARS.items()}
    return loss, {f"layer_{i}": layer for i in range(layers)}


def _seconds(of: Callable, *shapes: Any) -> float:
    start = time.process_time()
    jax.jit(jax.grad(of)).lower(*shapes)
    return time.process_time() - start


def tracing(layers: int = 32, repeats: int = 3) -> dict[str, float]:
    """Seconds to trace and lower a gradient step, in three ways.

    Args:
        layers: unrolled layers, seven linears each.
        repeats: the least of so many is returned.

    Returns:
        ``frozen`` (no adapters, the input's gradient), ``by hand`` (low-rank terms in
        the model), ``adapt``; ``overhead`` is adapt less by hand, ``ratio`` adapt
        over by hand.
    """
    x, rank = jax.ShapeDtypeStruct((16, 64), jnp.float32), 4

    def frozen() -> float:
        loss, params = _unrolled(layers)
        return _seconds(lambda x, p: loss(p, x), x, params)

    def by_hand() -> float:
        loss, params = _unrolled(layers)

        def pair(w):
            shapes = (w.shape[0], rank), (rank, w.shape[1])
            return tuple(jax.ShapeDtypeStruct(s, w.dtype) for s in shapes)

        pairs = jax.tree.map(pair, params)

        def of(pairs, params, x):
            return loss(jax.tree.map(lambda w, p: (w, *p), params, pairs), x)

        return _seconds(of, pairs, params, x)

    def adapt() -> float:
        loss, params = _unrolled(layers)
        adapter, names = jp.lora(rank=rank), list(LINEARS)
        attach = lambda p, k: jp.attach(p, adapter, names, key=k)
        halves = jp.partition(jax.eval_shape(attach, params, jax.random.key(0)))
        of = lambda t, f, x: jp.adapt(loss)(jp.combine(t, f), x)
        return _seconds(of, *halves, x)

    ways = {"frozen": frozen, "by hand": by_hand, "adapt": adapt}
    figures = {name: _least(repeats, way) for name, way in ways.items()}
    return {
        "layers": layers,
        **figures,
        "overhead": figures["adapt"] - figures["by hand"],
        "ratio": figures["adapt"] / figures["by hand"],
    }


def compiling(
    layers: tuple[int, ...] = (2, 8, 32), repeats: int = 2
) -> dict[int, float]:
    """Seconds (of all threads) to compile a scanned step, by number of layers."""

    def one(n: int) -> float:
        program = decoder(64, 160, n, batch=2, length=16, vocabulary=128)
        names = [w.name for w in program.linears]
        attach = lambda p, k: jp.attach(
            p, jp.lora(rank=4), names, key=k, axes=program.axes
        )
        halves = jp.partition(jax.eval_shape(attach, program.params, jax.random.key(0)))
        of = lambda t, f, ids: jp.adapt(program.loss)(jp.combine(t, f), ids)
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        lowered = jax.jit(jax.grad(of)).lower(*halves, ids)
        start = time.process_time()
        lowered.compile()
        return time.process_time() - start

    return {n: _least(repeats, lambda: one(n)) for n in layers}  # noqa: B023


def importing(repeats: int = 3) -> dict[str, float]:
    """Seconds that ``import jaxpeft`` adds to importing jax, flax and optax."""
    code = (
        "import time; a = time.perf_counter(); import jax, flax, optax; "
        "b = time.perf_counter(); import jaxpeft; "
        "print(b - a, time.perf_counter() - b)"
    )

    def once() -> tuple[float, float]:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        base, own = run.stdout.split()[-2:]
        return float(base), float(own)

    runs = [once() for _ in range(repeats)]
    base, own = min(r[0] for r in runs), min(r[1] for r in runs)
    return {"jax, flax, optax": base, "jaxpeft": own, "ratio": own / base}


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line; returns 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    traced = tracing()
    print(
        f"tracing, {traced['layers']} unrolled layers: {traced['frozen']:.2f} s "
        f"frozen, {traced['by hand']:.2f} s with low-rank terms by hand, "
        f"{traced['adapt']:.2f} s adapted: + {traced['overhead']:.2f} s "
        f"({traced['ratio']:.2f} times)"
    )
    compiled = compiling()
    first = min(compiled)
    print(
        "compiling, scanned layers: "
        + ", ".join(
            f"{n}: {t:.2f} s ({t / compiled[first]:.2f})" for n, t in compiled.items()
        )
    )
    imported = importing()
    print(
        f"importing: {imported['jax, flax, optax']:.2f} s jax, flax and optax, "
        f"+ {imported['jaxpeft']:.2f} s jaxpeft ({imported['ratio']:.2f})"
    )
    if args.json:
        record = {
            "jax": jax.__version__,
            "tracing": traced,
            "compiling": compiled,
            "importing": imported,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(traced["overhead"] > TRACING_LIMIT or imported["jaxpeft"] > IMPORT_LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
