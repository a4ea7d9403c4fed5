"""A decoder's LoRA train step beside the same step written by hand in plain JAX.

    python -m benchmarks.by_hand
    python -m benchmarks.by_hand --json benchmarks/results/by_hand.json

A Llama of 6 layers, 384 wide, LoRA on every linear, AdamW: our model through
``jaxpeft.adapt`` beside ``written_by_hand``, a function of arrays that knows no
library. Both take the same parameters and must give the same losses over three steps.
FLOPs of matmuls and temporaries are counted by the compiler; times are taken in
turns, and their ratio's median, least and greatest over the turns are printed.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from benchmarks.hlo import matmul_flops
from jaxpeft import models

THETA, EPSILON = 1e4, 1e-6


@dataclasses.dataclass(frozen=True)
class Size:
    """One model and batch."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    groups: int = 3
    hidden: int = 1536
    vocabulary: int = 2048
    batch: int = 16
    length: int = 64
    rank: int = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; ratios are ours over the step by hand.

    Attributes:
        layers: ``"scanned"`` or ``"unrolled"``.
        gflop: of the matmuls of a step (10^9), ours then by hand.
        flops: their ratio.
        temporary_mb: temporaries (10^6 bytes), ours then by hand.
        temporaries: their ratio.
        step_ms: median milliseconds of a step, ours then by hand.
        time: median, least and greatest ratio over the turns.
    """

    layers: str
    gflop: tuple[float, float]
    flops: float
    temporary_mb: tuple[float, float]
    temporaries: float
    step_ms: tuple[float, float]
    time: tuple[float, float, float]


def written_by_hand(
    size: Size, scan: bool, *, attention: str | None = None, remat: bool = False
) -> Any:
    """Returns ``loss(trainable, frozen, ids)`` on flat dictionaries of arrays.

    ``attention`` is the implementation of ``jax.nn.dot_product_attention``; with
    ``remat`` the backward pass computes each layer again.
    """
    h = size.width // size.heads

    def norm(x, scale):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + EPSILON)
        return y.astype(x.dtype) * scale

    def turn(x, cosines, sines):
        first, second = jnp.split(x, 2, axis=-1)
        parts = first * cosines - second * sines, second * cosines + first * sines
        return jnp.concatenate(parts, axis=-1)

    def block(x, layer, angles):
        def linear(x, name):
            part = {leaf: layer[f"{name}/kernel/{leaf}"] for leaf in ("base", "a", "b")}
            scale = layer[f"{name}/kernel/scale"]
            a, b = part["a"].astype(x.dtype), (scale * part["b"]).astype(x.dtype)
            return x @ part["base"] + (x @ a) @ b

        y = norm(x, layer["input_layernorm/scale"])
        q, k, v = (linear(y, f"self_attn/{n}_proj") for n in "qkv")
        q, k, v = (t.reshape(*x.shape[:2], -1, h) for t in (q, k, v))
        q, k = turn(q, *angles), turn(k, *angles)
        y = jax.nn.dot_product_attention(
            *(q, k, v), is_causal=True, implementation=attention
        )
        x = x + linear(y.reshape(x.shape), "self_attn/o_proj")
        y = norm(x, layer["post_attention_layernorm/scale"])
        y = jax.nn.silu(linear(y, "mlp/gate_proj")) * linear(y, "mlp/up_proj")
        return x + linear(y, "mlp/down_proj")

    def loss(trainable, frozen, ids):
        leaves = trainable | frozen
        x = jnp.take(frozen["embed_tokens/embedding"], ids, axis=0)
        rates = THETA ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
        angles = jnp.arange(size.length, dtype=jnp.float32)[:, None, None] * rates
        angles = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        cut = lambda start: {
            name.removeprefix(start): leaf
            for name, leaf in leaves.items()
            if name.startswith(start)
        }
        if scan:
            step = lambda x, layer: (block(x, layer, angles), None)
            step = jax.checkpoint(step, prevent_cse=False) if remat else step
            x, _ = jax.lax.scan(step, x, cut("layers/layer/"))
        else:
            for i in range(size.layers):
                x = block(x, cut(f"layers/layer_{i}/"), angles)
        logits = norm(x, frozen["norm/scale"]) @ frozen["lm_head/kernel"]
        return next_token_loss(logits.astype(jnp.float32), ids)

    return loss


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy of every token but the first."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return jnp.mean(losses)


def build(size: Size, scan: bool) -> tuple[list[Any], list[tuple], jax.Array]:
    """Returns both steps, what each starts from, and the batch."""
    config = {
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "intermediate_size": size.hidden,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
    }
    model = models.from_config(config, head="causal_lm", scan_layers=scan)
    params = models.init(model, jax.random.key(0))
    adapted = jp.attach(
        params,
        jp.lora(rank=size.rank),
        ".*(self_attn|mlp)/.*",
        key=jax.random.key(1),
        axes=model.axes,
    )
    trainable, frozen = jp.partition(adapted)
    trainable = jax.tree.map(lambda x: x + 0.01, trainable)  # b is 0 at the start
    forward = jp.adapt(model.apply)

    def ours(trainable, frozen, ids):
        logits = forward({"params": jp.combine(trainable, frozen)}, ids)
        return next_token_loss(logits, ids)

    optimizer = optax.adamw(1e-3, weight_decay=0.0)

    def step_of(loss):
        def step(trainable, state, frozen, ids):
            value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
            updates, state = optimizer.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        return jax.jit(step, donate_argnums=(0, 1))

    trees = [(trainable, frozen), (jp.tree.flat(trainable), jp.tree.flat(frozen))]
    # Copies: what a step is given is donated.
    trees = [(jax.tree.map(jnp.copy, t), f) for t, f in trees]
    starts = [(t, optimizer.init(t), f) for t, f in trees]
    shape = (size.batch, size.length)
    ids = np.random.default_rng(0).integers(0, size.vocabulary, shape, dtype=np.int32)
    steps = [step_of(ours), step_of(written_by_hand(size, scan))]
    return steps, starts, jnp.asarray(ids)


def compare(size: Size, scan: bool, turns: int) -> Row:
    """Counts both steps, then runs them in turns.

    Raises:
        RuntimeError: the losses of the first three steps differ: it is not the same.
    """
    steps, states, ids = build(size, scan)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        compiled = [
            step.lower(*state, ids).compile()
            for step, state in zip(steps, states, strict=True)
        ]

    def run(i: int) -> float:
        trainable, moments, frozen = states[i]
        trainable, moments, loss = compiled[i](trainable, moments, frozen, ids)
        states[i] = trainable, moments, frozen
        return float(loss)

    losses = np.array([[run(i) for i in (0, 1)] for _ in range(3)])
    if not np.allclose(losses[:, 0], losses[:, 1], rtol=1e-5):
        raise RuntimeError(f"the losses differ: {losses.tolist()}; not the same step")
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        for i in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            run(i)
            seconds[i].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    gflop = [matmul_flops(c.as_text()) / 1e9 for c in compiled]
    mb = [c.memory_analysis().temp_size_in_bytes / 1e6 for c in compiled]
    ms = [round(1e3 * statistics.median(s), 1) for s in seconds]
    return Row(
        layers="scanned" if scan else "unrolled",
        gflop=(round(gflop[0], 3), round(gflop[1], 3)),
        flops=gflop[0] / gflop[1],
        temporary_mb=(round(mb[0], 2), round(mb[1], 2)),
        temporaries=mb[0] / mb[1],
        step_ms=(ms[0], ms[1]),
        time=(statistics.median(ratios), ratios[0], ratios[-1]),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("layers", "GFLOP", "temporaries, MB", "time ratio (range)")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|"]
    for r in rows:
        middle, low, high = r.time
        lines.append(
            f"| {r.layers} | {r.gflop[0]:.3f} / {r.gflop[1]:.3f} ({r.flops:.4f}) | "
            f"{r.temporary_mb[0]:.1f} / {r.temporary_mb[1]:.1f} ({r.temporaries:.3f}) |"
            f" {middle:.3f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    rows = [compare(Size(), scan, args.turns) for scan in (True, False)]
    print(table(rows))
    if args.json:
        record = {
            "versions": {p: metadata.version(p) for p in ("jax", "optax")},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "size": dataclasses.asdict(Size()),
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
