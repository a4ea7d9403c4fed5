"""A language model's forward and loss, on a mesh, against logits held whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
import train
from jaxpeft import models, training

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}


def adapted_model(tied, targets):
    config = {**LLAMA, "tie_word_embeddings": tied}
    model = models.from_config(config, head="causal_lm")
    params = models.init(model, jax.random.key(0))
    adapted = jp.attach(params, jp.lora(rank=2), targets=targets, key=jax.random.key(1))
    trainable, frozen = jp.partition(adapted)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return model, jax.tree.unflatten(tree, moved), frozen


def texts(count=16, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 11, count)
    return [(random.integers(1, 64, n), random.integers(1, n)) for n in lengths]


def rows_of(texts, length=12):
    """One text a row: the prompt's tokens are not learnt."""
    names = ("input_ids", "attention_mask", "targets", "target_weights")
    batch = {name: np.zeros((len(texts), length), np.int32) for name in names}
    batch["target_weights"] = batch["target_weights"].astype(np.float32)
    for row, (ids, prompt) in enumerate(texts):
        n = len(ids)
        batch["input_ids"][row, :n], batch["attention_mask"][row, :n] = ids, 1
        batch["targets"][row, : n - 1] = ids[1:]
        batch["target_weights"][row, prompt - 1 : n - 1] = 1
    return batch | {"label": batch["target_weights"].sum(1).astype(np.int32)}


def packed_of(texts):
    """Two texts a row."""
    single = rows_of(texts)
    lengths = single["attention_mask"].sum(1)
    columns = {n: single[n] for n in single if n != "label"}
    columns["positions"] = np.tile(np.arange(12, dtype=np.int32), (len(texts), 1))
    columns["segment_ids"] = single["attention_mask"] * (
        1 + np.arange(len(texts), dtype=np.int32)[:, None] % 2
    )
    batch = {}
    for name, column in columns.items():
        batch[name] = np.zeros((len(texts) // 2, 24), column.dtype)
        for row in range(len(texts) // 2):
            a, b = (column[2 * row + i][: lengths[2 * row + i]] for i in (0, 1))
            batch[name][row, : len(a) + len(b)] = np.concatenate([a, b])
    return batch | {"label": batch["target_weights"].sum(1).astype(np.int32)}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_it_is_the_loss_of_the_logits(tied):
    targets = ["q_proj", "down_proj", "embed_tokens" if tied else "lm_head"]
    model, trainable, frozen = adapted_model(tied, targets)
    mesh = training.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    forward = training.causal_forward(model, mesh=mesh)
    single, packed = rows_of(texts()), packed_of(texts())

    def plain(trainable, batch):
        params = jp.merge(jp.combine(trainable, frozen))
        logits = model.apply(
            {"params": params}, batch["input_ids"], batch["attention_mask"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        weights = batch["target_weights"]
        hits = jnp.where(jnp.argmax(logits, -1) == batch["targets"], weights, 0)
        value = jnp.sum(losses * weights) / jnp.sum(weights)
        return value, (jnp.sum(losses * weights, 1), jnp.sum(weights, 1), hits.sum(1))

    def ours(trainable, batch):
        outputs, _ = forward(jp.combine(trainable, frozen), batch, None)
        values, weights = training.causal_loss(outputs, batch)
        return jnp.sum(values * weights) / jnp.sum(weights), outputs

    def run(f, batch):
        return jax.jit(jax.value_and_grad(f, has_aux=True))(trainable, batch)

    (value, sums), grads = run(plain, single)
    outputs = {}
    for name, batch in {"single": single, "packed": packed}.items():
        placed = training.put_batch(batch, mesh)
        (found, outputs[name]), gradients = run(ours, placed)
        np.testing.assert_allclose(found, value, rtol=2e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradients,
            grads,
        )
    np.testing.assert_allclose(outputs["single"], np.stack(sums, 1), rtol=1e-5)
    pairs = np.asarray(outputs["single"]).reshape(-1, 2, 3).sum(1)
    np.testing.assert_allclose(outputs["packed"], pairs, rtol=1e-5)
    # Without segments a text sees the one before it.
    packed.pop("segment_ids")
    (found, _), _ = run(ours, training.put_batch(packed, mesh))
    assert abs(found - value) > 1e-3


def test_steps_and_evaluation():
    """Rows of weight 0 and micro-batches change nothing; the loss goes down."""
    model, trainable, frozen = adapted_model(False, ["v_proj", "down_proj"])
    mesh = training.make_mesh(data=2, devices=jax.devices()[:2])
    adapted = jp.combine(trainable, frozen)
    specs = training.param_specs(jp.detach(adapted), mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    optimizer = training.adamw(trainable, total_steps=8, learning_rate=0.05)
    forward, loss = training.objective(model, mesh=mesh)
    new_state = lambda: training.init_state(
        jax.tree.map(jnp.copy, trainable), optimizer, key=jax.random.key(0), mesh=mesh
    )
    rows = rows_of(texts())
    losses = {}
    for accumulate in (1, 2):
        state = new_state()
        update = train.make_update(
            forward, loss, optimizer, mesh=mesh, accumulate=accumulate
        )
        step = training.compile_step(update, state, frozen, mesh=mesh)
        losses[accumulate] = []
        for _ in range(4):
            batch = training.put_batch(rows, mesh, accumulate=accumulate)
            state, metrics = step(state, frozen, batch)
            losses[accumulate].append(float(metrics["loss"]))
        assert metrics["weight"] == rows["target_weights"].sum()
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-3)
    assert losses[1][-1] < 0.95 * losses[1][0]
    evaluate = training.eval_step(forward, loss, state, frozen, mesh=mesh)
    found = training.run_split(
        evaluate, state.trainable, frozen, [rows, rows_of(texts(4))], mesh=mesh, rows=16
    )
    assert found.outputs.shape == (20, 3)
    np.testing.assert_array_equal(found.outputs[:, 1], found.labels)
    total = found.outputs.sum(0)
    np.testing.assert_allclose(found.loss, total[0] / total[1], rtol=1e-6)


@pytest.mark.parametrize("padding", [False, True], ids=["masked", "padding"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_with_nothing_to_learn(padding, accumulate):
    """No token learnt, or no token at all: 0 and finite, and the run is told."""
    model, trainable, frozen = adapted_model(False, ["v_proj", "down_proj"])
    mesh = training.make_mesh(devices=jax.devices()[:1])
    adapted = jp.combine(trainable, frozen)
    specs = training.param_specs(jp.detach(adapted), mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    optimizer = training.adamw(trainable, total_steps=8, learning_rate=0.05)
    forward, loss = training.objective(model, mesh=mesh)
    state = training.init_state(
        jax.tree.map(jnp.copy, trainable), optimizer, key=jax.random.key(0), mesh=mesh
    )
    update = train.make_update(
        forward, loss, optimizer, mesh=mesh, accumulate=accumulate
    )
    step = training.compile_step(update, state, frozen, mesh=mesh)
    rows = rows_of(texts())
    nothing = {**rows, "target_weights": 0 * rows["target_weights"]}
    nothing["label"] = 0 * rows["label"]
    if padding:
        nothing = {name: 0 * column for name, column in nothing.items()}
    put = lambda rows: training.put_batch(rows, mesh, accumulate=accumulate)

    def total(trainable, batch):
        outputs, _ = forward(jp.combine(trainable, frozen), batch, None)
        values, weights = loss(outputs, batch)
        return jnp.sum(values * weights)

    value, grads = jax.value_and_grad(total)(trainable, put(nothing))
    assert value == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))
    # Control: it is not always so; and beside others such rows change nothing.
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows, nothing)
    alone, beside = (jax.value_and_grad(total)(trainable, put(b)) for b in (rows, both))
    assert alone[0] > 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        alone,
        beside,
    )
    state, metrics = step(state, frozen, put(nothing))
    assert {float(metrics[n]) for n in ("loss", "total", "grad_norm", "weight")} == {0}
    jax.tree.map(np.testing.assert_array_equal, state.trainable, trainable)
    with pytest.raises(training.NonFiniteError, match="weights are all 0"):
        training.check_finite(state)
    evaluate = training.eval_step(forward, loss, state, frozen, mesh=mesh)
    with pytest.raises(ValueError, match="nothing learnt in them"):
        training.run_split(
            evaluate, state.trainable, frozen, [nothing], mesh=mesh, rows=16
        )


def test_bad_input():
    model, trainable, frozen = adapted_model(False, ["v_proj"])
    mesh = training.make_mesh(devices=jax.devices()[:1])
    forward = training.causal_forward(model, mesh=mesh)
    batch = rows_of(texts(), length=25)
    with pytest.raises(ValueError, match="25 tokens; the model allows 24. Tokenise"):
        forward(jp.combine(trainable, frozen), batch, None)
    with pytest.raises(ValueError, match="head=None, which has no loss"):
        training.objective(model.clone(head=None), mesh=mesh)


class Marred:
    """A language model whose hidden states are ``bad`` wherever nothing is learnt."""

    def __init__(self, model, learnt, bad):
        self.model, self.learnt, self.bad = model, learnt, bad
        self.config, self.head = model.config, model.head

    def clone(self, head):
        return Marred(self.model.clone(head=head), self.learnt, self.bad)

    def apply(self, variables, *inputs, method=None, **options):
        if method is not None:
            return self.model.apply(variables, *inputs, method=method, **options)
        hidden = self.model.apply(variables, *inputs, **options)
        return jnp.where(self.learnt[:, :, None], hidden, self.bad)


def test_what_is_not_learnt_may_hold_anything():
    """Hidden states that are no numbers, and targets outside, change nothing there."""
    model, trainable, frozen = adapted_model(False, ["v_proj", "lm_head"])
    mesh = training.make_mesh(devices=jax.devices()[:1])
    rows = rows_of(texts(4)) | {"weight": np.ones(4, np.float32)}
    learnt = rows["target_weights"] > 0
    no_loss = np.int32(np.where(learnt, rows["targets"], 10**6))  # outside

    @jax.jit
    def run(trainable, batch, bad):
        forward = training.causal_forward(Marred(model, learnt, bad), mesh=mesh)

        def total(trainable):
            outputs, _ = forward(jp.combine(trainable, frozen), batch, None)
            values, weights = training.causal_loss(outputs, batch)
            return jnp.sum(values * weights), outputs

        return jax.value_and_grad(total, has_aux=True)(trainable)

    good, *others = (
        run(trainable, training.put_batch(rows | {"targets": targets}, mesh), bad)
        for targets in (rows["targets"], no_loss)
        for bad in (jnp.float32(0), jnp.float32(np.nan), jnp.float32(np.inf))
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(good))
    for found in others:  # of one program, so to the bit
        jax.tree.map(np.testing.assert_array_equal, found, good)
