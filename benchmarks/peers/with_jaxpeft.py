"""A train step of jaxpeft on its own models, on the CPU."""

import functools

import numpy as np

from benchmarks.peers.worker import serve


def build(settings):
    """The step; the weights are the folder's."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxpeft as jp
    from jaxpeft import models

    head = {"encoder": "classification", "decoder": "causal_lm"}[settings["kind"]]
    model, params = models.load(
        settings["folder"], head=head, scan_layers=settings["scan"]
    )
    adapter = getattr(jp, settings["method"])(rank=settings["rank"])
    targets, key = settings["targets"]["ours"], jax.random.key(0)
    adapted = jp.attach(params, adapter, targets, key=key, axes=model.axes)
    trainable, frozen = jp.partition(adapted)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)
    state = optimizer.init(trainable)
    batch = np.load(settings["batch"])
    ids, labels = jnp.asarray(batch["ids"]), jnp.asarray(batch["labels"])
    forward = jp.adapt(model.apply)

    def loss_fn(trainable, frozen):
        logits = forward({"params": jp.combine(trainable, frozen)}, ids)
        targets = labels
        if settings["kind"] == "decoder":
            logits, targets = logits[:, :-1], labels[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses)

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


if __name__ == "__main__":
    serve(build)
