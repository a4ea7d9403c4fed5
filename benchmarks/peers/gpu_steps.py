"""Steps on one device for ``benchmarks.gpu_table``: ours, by hand, and HF PEFT's.

Each function takes a row, the model's config, the tokens of a step, the rank and how to
run it, and returns ``(step, facts)``: ``step()`` takes one and waits for it.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
import train
from benchmarks import by_hand
from jaxpeft import data, models, runs, training

ROOT = Path(__file__).parents[2]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def our_step(row: Any, model: dict, tokens: int, rank: int, way: tuple):
    """A step of ``train.py``."""
    config, built, adapted = _adapted(row, model, tokens, rank, way)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    key = jax.random.key(0)
    made = train.make_step(config, built, adapted, key, mesh=mesh, total_steps=1000)
    step, state, frozen = made[-1], made[1], made[2]
    shapes = data.outline(config.data).batch(1, tokens)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
    batch |= _ids(model, tokens)
    batch = training.put_batch(batch, mesh)
    held = [state]
    del state, made, adapted

    def one() -> None:
        with jax.numpy_dtype_promotion("standard"):  # as train.py has it
            held[0], metrics = step(held[0], frozen, batch)
        jax.block_until_ready(metrics)

    return one, _facts(jp.count(jp.combine(held[0].trainable, frozen)), way)


def hand_step(row: Any, model: dict, tokens: int, rank: int, way: tuple):
    """The same step by hand, without clipping: plain JAX that knows no library."""
    config, _, adapted = _adapted(row, model, tokens, rank, way)
    size = by_hand.Size(
        width=model["hidden_size"],
        layers=model["num_hidden_layers"],
        heads=model["num_attention_heads"],
        groups=model["num_key_value_heads"],
        hidden=model["intermediate_size"],
        vocabulary=model["vocab_size"],
        batch=1,
        length=tokens,
        rank=rank,
    )
    attention, remat = way
    loss = by_hand.written_by_hand(
        size, scan=True, attention=attention, remat=remat is not None
    )
    counts = jp.count(adapted)
    trainable, frozen = map(jp.tree.flat, jp.partition(adapted))
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    held = [trainable, optimizer.init(trainable)]
    ids = jnp.asarray(_ids(model, tokens)["input_ids"])

    def update(trainable, state, frozen, ids):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    step = jax.jit(update, donate_argnums=(0, 1))
    del trainable, adapted

    def one() -> None:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            held[0], held[1], value = step(*held, frozen, ids)
        jax.block_until_ready(value)

    return one, _facts(counts, way)


def peft_step(row: Any, model: dict, tokens: int, rank: int, remat: str | None):
    """HF PEFT's step on PyTorch; a line instead where PyTorch sees no GPU.

    The toy runs on the CPU, too, so that this code is tested.
    """
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        return f"not installed: {error.name}"
    gpu = torch.cuda.is_available()
    if not gpu and model["hidden_size"] > 64:
        return "PyTorch sees no GPU"
    device = "cuda" if gpu else "cpu"
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**model), dtype=getattr(torch, model["dtype"])
        )
    config = peft.LoraConfig(
        r=rank, target_modules=list(LINEARS), use_dora=row.method == "dora"
    )
    adapted = peft.get_peft_model(base, config).train()
    if remat:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    ids = torch.as_tensor(_ids(model, tokens)["input_ids"], device=device).long()
    own = sum(p.numel() for p in trained)
    every = sum(p.numel() for p in adapted.parameters())

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()

    facts = _facts((own, every), ("sdpa", remat))
    if gpu:
        facts["device"] = torch.cuda.get_device_name()
        facts["peak"] = torch.cuda.max_memory_allocated
    return one, facts


def _adapted(row: Any, model: dict, tokens: int, rank: int, way: tuple):
    """A config, its model, and its adapted tree with random leaves."""
    attention, remat = way
    changes = {
        "data.pack": False,
        "model.dtype": model["dtype"],
        "model.param_dtype": model["dtype"],
        "model.remat": remat,
        "model.attention": attention,
        "max_length": tokens,
        "lengths": (tokens,),
        "batch_size": 1,
        "adapter": {"name": row.method, "rank": rank},
        **dict(row.changes),
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model))
        config = runs.load_config(ROOT / "configs/smollm2_sums.py:method=lora")
        config = config.copy_and_resolve_references().unlock()
        for name, value in {**changes, "model.name": folder}.items():
            *parents, last = name.split(".")
            holder = config[parents[0]] if parents else config
            with holder.ignore_type():
                holder[last] = value
        config.lock()
        built = runs.outline(config, head="causal_lm", num_labels=None)
    params = models.abstract(built)

    def attach(params, keys):
        if row.quantise:
            params = jp.quantise(params, row.quantise, axes=built.axes)
        return train.attach_all(config, built, params, keys)

    shapes = jax.eval_shape(attach, params, jax.random.split(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    numbers = np.arange(1, len(leaves) + 1, dtype=np.uint32)
    made = [_random(x.shape, x.dtype, n) for x, n in zip(leaves, numbers, strict=True)]
    return config, built, jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random(shape: tuple[int, ...], dtype: Any, number: Any) -> jax.Array:
    """Numbers around 0, made in one pass that holds nothing but them."""
    mixed = jnp.full(shape, number, jnp.uint32)
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        mixed = (mixed ^ along) * jnp.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> jnp.uint32(15))
    if jnp.issubdtype(dtype, jnp.floating):
        even = mixed.astype(jnp.float32) / jnp.float32(2**32)
        return ((even - jnp.float32(0.5)) * jnp.float32(0.1)).astype(dtype)
    return (mixed & jnp.uint32(7)).astype(dtype)


def _ids(model: dict, tokens: int) -> dict[str, np.ndarray]:
    shape = (1, tokens)
    ids = np.random.default_rng(0).integers(1, model["vocab_size"], shape, np.int32)
    return {"input_ids": ids, "targets": np.roll(ids, -1, axis=1)}


def _facts(counts: tuple[int, int], way: tuple) -> dict[str, Any]:
    """Parameters of the base, and the device that JAX has."""
    device = jax.devices()[0]
    chip = training.chip_of(device)
    stats = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "parameters": counts[1] - counts[0],
        "trained": counts[0],
        "attention": way[0],
        "remat": way[1],
        "device": device.device_kind,
        "flops": chip.flops if chip else None,
        "peak": stats,
    }
