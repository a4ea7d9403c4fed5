"""A train step of jaxpeft on its own models, on the CPU."""

import functools

import numpy as np

from benchmarks.peers.worker import serve


def build(settings):
    """The step; the weights are the folder's."""
    import jax
    import optax

    import jaxpeft as jp
    from jaxpeft import models

    head = {"encoder": "classification", "decoder": "causal_lm"}[settings["kind"]]
    model, params = models.load(
        settings["folder"], head=head, scan_layers=settings["scan"]
    )
    if settings["method"] == "frozen":
        return _frozen_step(model, params, settings)
    adapter = jp.tree.find_method(settings["method"])(rank=settings["rank"])
    targets, key = settings["targets"]["ours"], jax.random.key(0)
    adapted = jp.attach(params, adapter, targets, key=key, axes=model.axes)
    trainable, frozen = jp.partition(adapted)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    state = optimizer.init(trainable)
    loss_of = _loss(jp.adapt(model.apply), settings)

    def loss_fn(trainable, frozen):
        return loss_of(jp.combine(trainable, frozen))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trainable, state, frozen):
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    def step():
        nonlocal trainable, state
        trainable, state, loss = train_step(trainable, state, frozen)
        return float(loss)

    return step


def _loss(forward, settings):
    import jax.numpy as jnp
    import optax

    batch = np.load(settings["batch"])
    ids, labels = jnp.asarray(batch["ids"]), jnp.asarray(batch["labels"])

    def loss(params):
        logits, targets = forward({"params": params}, ids), labels
        if settings["kind"] == "decoder":
            logits, targets = logits[:, :-1], labels[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses)

    return loss


def _frozen_step(model, params, settings):
    """The model without an adapter: forward, and the gradient of each layer's input.

    A factor on the tokens' table is what is differentiated, as in ``flops.py``.
    """
    import jax
    import jax.numpy as jnp

    loss_of = _loss(model.apply, settings)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    if sum(map(_is_table, paths)) != 1:
        raise ValueError(f"one table of tokens is wanted among {paths}")
    scaled = lambda gain, path, x: x * gain if _is_table(path) else x

    def of_gain(gain, params):
        return loss_of(
            jax.tree_util.tree_map_with_path(
                lambda path, x: scaled(gain, jax.tree_util.keystr(path), x), params
            )
        )

    step = jax.jit(jax.value_and_grad(of_gain))
    gain = jnp.float32(1)
    return lambda: float(jax.block_until_ready(step(gain, params))[0])


def _is_table(path):
    return "word_embeddings" in path or "embed'" in path or "embed_tokens" in path


if __name__ == "__main__":
    serve(build)
