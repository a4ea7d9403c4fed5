"""One decoder with four methods, its loss and gradient on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft import models, training

SIZES = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
# Each at places of its own, so that one program has them all.
METHODS = {
    "lora": ["q_proj", "k_proj", "embed_tokens", "lm_head"],
    "kasa": ["v_proj", "gate_proj"],
    "bora": ["o_proj", "up_proj"],
    "mosld": ["down_proj"],
}
ROWS, TOKENS = 8, 8


def make(*, methods=METHODS, **changes):
    """A model, its plain parameters, and the tree with every trained leaf moved."""
    model = models.from_config(
        SIZES | changes, head="causal_lm", scan_layers=True, remat="full"
    )
    params = models.init(model, jax.random.key(0))
    adapted, options = params, {"mosld": {"experts": 2}}
    for number, (name, targets) in enumerate(methods.items()):
        method = getattr(jp, name)(rank=2, **options.get(name, {}))
        key = jax.random.key(number)
        adapted = jp.attach(adapted, method, targets, key=key, axes=model.axes)
    trainable, frozen = jp.partition(adapted)
    leaves, tree = jax.tree.flatten(trainable)
    random = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype)
    trainable = jax.tree.unflatten(tree, [move(x) for x in leaves])
    return model, params, jp.combine(trainable, frozen)


def rows_of(vocabulary=SIZES["vocab_size"]):
    """A batch of padded rows, each of two texts."""
    random = np.random.default_rng(0)
    ids = random.integers(1, vocabulary, (ROWS, TOKENS)).astype(np.int32)
    mask = (np.arange(TOKENS) < random.integers(4, TOKENS + 1, (ROWS, 1))).astype(
        np.int32
    )
    learnt = mask * (random.random((ROWS, TOKENS)) < 0.7)
    start = random.integers(1, 5, (ROWS, 1)).astype(np.int32)
    places = np.arange(TOKENS, dtype=np.int32) + 0 * start
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "segment_ids": (places >= start).astype(np.int32),
        "positions": np.where(places >= start, places - start, places),
        "targets": np.roll(ids, -1, 1),
        "target_weights": learnt.astype(np.float32),
        "label": learnt.sum(1).astype(np.int32),
    }


def gradient_on(mesh, model, params, adapted, rows):
    """``(loss, norm, gradients by path, program)``; ``rows`` are this process' own."""
    specs = training.param_specs(params, mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    forward, loss = training.objective(model, mesh=mesh)

    def loss_fn(trainable, frozen, batch, keys):
        del keys
        outputs, _ = forward(jp.combine(trainable, frozen), batch, None)
        return *loss(outputs, batch), 0.0

    gradient = training.loss_and_gradient(loss_fn, jp.penalty, mesh=mesh)
    optimizer = training.adamw(trainable, total_steps=9, learning_rate=0.1)
    key = jax.random.key(3)
    state = training.init_state(trainable, optimizer, key=key, mesh=mesh)
    given = state, frozen, training.put_batch(rows, mesh)
    step = jax.jit(gradient, out_shardings=training.replicated(mesh))
    compiled = step.lower(*given).compile()
    losses, grads = compiled(*given)
    flat = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(grads)
    }
    found = float(losses["loss"]), float(losses["grad_norm"])
    return *found, flat, compiled.as_text()
