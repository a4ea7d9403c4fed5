"""Evaluation: all rows, once, in order, whatever the padding and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import training


def evaluator(run, loss=training.cross_entropy):
    return training.eval_step(run.forward, loss, run.state, run.frozen, mesh=run.mesh)


def accuracy(outputs, labels):
    return {"accuracy": np.mean(outputs.argmax(-1) == labels)}


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_every_row_is_predicted_once_and_padding_is_dropped(make_run, make_batch, mesh):
    run = make_run(mesh=mesh, dropout=0.5)  # dropout is off here
    batches = [
        make_batch(rows=16, length=6, seed=0),
        make_batch(rows=5, length=6, seed=1),  # padded by `rows`
        {**make_batch(rows=16, length=9, seed=2), "valid": np.arange(16) % 3 > 0},
    ]
    seen = []
    found = training.run_split(
        evaluator(run),
        run.state.trainable,
        run.frozen,
        iter(batches),
        mesh=run.mesh,
        rows=16,
        advance=seen.append,
    )
    merged = jp.merge(jp.combine(run.state.trainable, run.frozen))
    outputs, labels = [], []
    for batch in batches:
        logits = run.model.apply(
            {"params": merged}, batch["input_ids"], batch["attention_mask"]
        )
        keep = batch.get("valid", np.ones(len(batch["label"]), bool))
        outputs.append(np.asarray(logits)[keep])
        labels.append(batch["label"][keep])
    outputs, labels = np.concatenate(outputs), np.concatenate(labels)
    assert seen == [16, 5, 10]
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-4, atol=1e-5)
    chosen = np.asarray(jax.nn.log_softmax(outputs))[np.arange(31), labels]
    assert found.loss == pytest.approx(-chosen.mean(), rel=1e-5)


def test_a_score_sees_all_rows_at_once(make_run, make_batch):
    run = make_run()
    calls = []

    def score(outputs, labels):
        calls.append(outputs.shape)
        return accuracy(outputs, labels)

    options = dict(mesh=run.mesh, rows=16, score=score)
    batches = [make_batch(seed=i) for i in range(3)]
    step = evaluator(run)
    scores = training.evaluate(
        step, run.state.trainable, run.frozen, batches, **options
    )
    assert calls == [(48, 3)]
    assert sorted(scores) == ["accuracy", "loss"]
    assert {type(v) for v in scores.values()} == {float}
    # Nothing was donated, and nothing is random: once more is the same.
    again = training.evaluate(step, run.state.trainable, run.frozen, batches, **options)
    assert again == scores


def test_a_bucket_length_is_traced_once(make_run, make_batch):
    traced = []

    def loss(outputs, batch):
        traced.append(batch["input_ids"].shape)
        return training.cross_entropy(outputs, batch)

    run = make_run()
    step = evaluator(run, loss)
    batches = [make_batch(length=n, rows=r) for n, r in [(6, 16), (9, 4), (6, 3)]]
    for _ in range(2):
        training.run_split(
            step, run.state.trainable, run.frozen, batches, mesh=run.mesh, rows=16
        )
    assert traced == [(16, 6), (16, 9)]


def test_what_cannot_be_scored_is_refused(make_run, make_batch):
    run = make_run()
    options = dict(mesh=run.mesh, rows=16)
    trees = (evaluator(run), run.state.trainable, run.frozen)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        training.run_split(*trees, [], **options)
    empty = make_batch(valid=np.zeros(16, bool))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        training.run_split(*trees, [empty], **options)
    with pytest.raises(ValueError, match="must not return 'loss'"):
        training.evaluate(
            *trees, [make_batch()], score=lambda *_: {"loss": 0.0}, **options
        )


def test_rows_of_no_weight_may_have_any_loss(make_run, make_batch, numpy_leaves):
    """Neither a step nor an evaluation sees the losses of rows that do not count."""

    def loss(outputs, batch):
        values, weights = training.cross_entropy(outputs, batch)
        return jnp.where(weights > 0, values, batch["other"]), weights

    run = make_run(loss=loss)
    weight = np.float32(np.arange(16) % 4 > 0)
    found = []
    for bad in (0.0, np.nan, np.inf):
        other = np.full(16, bad, np.float32)
        batch = run.put(make_batch(weight=weight, other=other))
        state = jax.tree.map(jnp.copy, run.state)  # a step donates its own
        state, metrics = run.step(state, run.frozen, batch)
        sums = evaluator(run, loss)(run.state.trainable, run.frozen, batch)[3:5]
        found.append(numpy_leaves((state, metrics, sums)))
    good, *others = found
    assert np.isfinite(good["[1]['loss']"]) and good["[1]['grad_norm']"] > 0
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, good)
