"""The train step: what it computes, how it is cut up, and what it never does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import training


def steps(run, batches, **options):
    """Runs the step over batches; returns the last state and the losses."""
    state, losses = run.state, []
    for batch in batches:
        state, metrics = run.step(state, run.frozen, run.put(batch, **options))
        losses.append(float(metrics["total"]))
    return state, np.array(losses)


def close(actual, desired, rtol, atol=0.0):
    assert actual.keys() == desired.keys()
    for name in desired:
        np.testing.assert_allclose(
            actual[name], desired[name], rtol=rtol, atol=atol, err_msg=name
        )


def test_a_step_is_the_gradient_of_task_loss_and_penalty(
    make_run, make_batch, plain_descent, numpy_leaves
):
    adapter = jp.kasa(rank=2, beta=0.3, gamma=0.2)
    run = make_run(adapter, optimizer=plain_descent)
    batch = make_batch(weight=np.linspace(0.0, 2.0, 16, dtype=np.float32))

    def reference(trainable):
        adapted = jp.combine(trainable, run.frozen)
        logits = run.model.apply(
            {"params": jp.merge(adapted)}, batch["input_ids"], batch["attention_mask"]
        )
        chosen = jax.nn.log_softmax(logits)[jnp.arange(16), batch["label"]]
        weight = jnp.asarray(batch["weight"])
        return -jnp.sum(chosen * weight) / jnp.sum(weight) + jp.penalty(adapted)

    value, grads = jax.value_and_grad(reference)(run.state.trainable)
    before = numpy_leaves(run.state.trainable)
    penalty = float(jp.penalty(jp.combine(run.state.trainable, run.frozen)))
    state, metrics = run.step(run.state, run.frozen, run.put(batch))
    after = numpy_leaves(state.trainable)
    moved = {n: before[n] - after[n] for n in after}
    # Measured 2e-7: the merged kernel rounds differently.
    close(moved, numpy_leaves(grads), rtol=1e-4, atol=1e-6)
    assert float(metrics["total"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["penalty"]) == pytest.approx(penalty, rel=1e-6) and penalty > 0
    assert float(metrics["weight"]) == pytest.approx(16.0)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in numpy_leaves(grads).values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_regression_takes_the_squared_error(make_run, make_batch, plain_descent):
    first = lambda outputs, batch: training.squared_error(outputs[:, :1], batch)
    run = make_run(jp.lora(rank=2), optimizer=plain_descent, loss=first)
    batch = make_batch(label=np.linspace(-1, 1, 16, dtype=np.float32))
    adapted = jp.combine(run.state.trainable, run.frozen)
    outputs, seen = run.forward(adapted, jax.tree.map(jnp.asarray, batch), None)
    assert seen == {}  # no routers
    expected = np.mean(np.square(np.asarray(outputs)[:, 0] - batch["label"]))
    _, metrics = run.step(run.state, run.frozen, run.put(batch))
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_big_batch(
    make_run, make_batch, plain_descent, numpy_leaves, accumulate
):
    # Unequal weights: a mean of the micro-batches' means would be off.
    weight = np.array([0.0, 0.0, 0.0, 3.0] * 2 + [1.0] * 8, np.float32)
    batch = make_batch(weight=weight)
    whole = make_run(optimizer=plain_descent)
    parts = make_run(optimizer=plain_descent, accumulate=accumulate)
    state, losses = steps(whole, [batch])
    state_parts, losses_parts = steps(parts, [batch], accumulate=accumulate)
    np.testing.assert_allclose(losses_parts, losses, rtol=1e-6)  # measured 1e-7
    desired = numpy_leaves(state.trainable)
    close(numpy_leaves(state_parts.trainable), desired, rtol=1e-5, atol=1e-7)
    # Control: the weights matter.
    _, unweighted = steps(
        make_run(optimizer=plain_descent), [make_batch(weight=np.ones(16, np.float32))]
    )
    assert abs(unweighted[0] - losses[0]) > 1e-2


def test_padding_rows_are_as_if_they_were_not_there(
    make_run, make_batch, plain_descent, numpy_leaves
):
    batch = make_batch(rows=16)
    ten = {name: column[:10] for name, column in batch.items()}
    padded = make_run(optimizer=plain_descent)
    alone = make_run(optimizer=plain_descent)
    state, losses = steps(padded, [{**batch, "valid": np.arange(16) < 10}])
    state_alone, losses_alone = steps(alone, [ten])
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-6)
    desired = numpy_leaves(state_alone.trainable)
    close(numpy_leaves(state.trainable), desired, rtol=1e-5, atol=1e-7)


def test_rows_of_one_class(make_run, make_batch, plain_descent):
    run = make_run(optimizer=plain_descent, clip_norm=1.0)
    one = make_batch(label=np.zeros(16, np.int32))
    _, losses = steps(run, [one] * 5)
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_clipping_bounds_the_global_norm(
    make_run, make_batch, plain_descent, numpy_leaves
):
    run = make_run(optimizer=plain_descent, clip_norm=0.01)
    free = make_run(optimizer=plain_descent, clip_norm=1e6)
    before = numpy_leaves(run.state.trainable)
    moved = {}
    for name, each in {"clipped": run, "free": free}.items():
        state, metrics = each.step(each.state, each.frozen, each.put(make_batch()))
        after = numpy_leaves(state.trainable)
        moved[name] = np.concatenate([(before[n] - after[n]).ravel() for n in after])
        assert float(metrics["grad_norm"]) > 0.01  # before clipping
    assert np.linalg.norm(moved["clipped"]) == pytest.approx(0.01, rel=1e-3)
    direction = {n: v / np.linalg.norm(v) for n, v in moved.items()}
    np.testing.assert_allclose(direction["clipped"], direction["free"], atol=1e-4)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_are_one(make_run, make_batch, numpy_leaves, mesh):
    batches = [make_batch(seed=i) for i in range(4)]
    one = make_run(clip_norm=1.0)
    many = make_run(mesh=mesh, clip_norm=1.0)
    state, losses = steps(one, batches)
    state_many, losses_many = steps(many, batches)
    np.testing.assert_allclose(losses_many, losses, rtol=1e-5)  # measured 4e-7
    # AdamW divides by the root of a squared gradient: where that is near zero,
    # rounding decides; the leaves moved by about 4e-2. Measured 3e-5.
    desired = numpy_leaves(state.trainable)
    close(numpy_leaves(state_many.trainable), desired, rtol=0, atol=3e-4)
    assert losses[-1] != losses[0]


def test_accumulation_and_sharding_together(make_run, make_batch, numpy_leaves):
    batches = [make_batch(seed=i) for i in range(3)]
    state, losses = steps(make_run(), batches)
    many = make_run(mesh=(2, 2, 2), accumulate=2)
    state_many, losses_many = steps(many, batches, accumulate=2)
    np.testing.assert_allclose(losses_many, losses, rtol=1e-5)
    desired = numpy_leaves(state.trainable)
    close(numpy_leaves(state_many.trainable), desired, rtol=0, atol=3e-4)


def test_micro_batches_stay_on_their_devices(make_run, make_batch):
    run = make_run(mesh=(8, 1, 1), accumulate=2)
    batch = run.put(make_batch(), accumulate=2)
    text = run.step.lower(run.state, run.frozen, batch).compile().as_text()
    assert "all-reduce" in text  # control: collectives are found by their names
    assert "all-to-all" not in text and "collective-permute" not in text
    integers = [
        line for line in text.splitlines() if re.search(r"= s32\[\d+,6\]", line)
    ]
    assert integers  # the tokens
    assert not any("all-gather" in line for line in integers)


def test_a_bucket_length_is_traced_once(make_run, make_batch):
    traced = []

    def loss(outputs, batch):
        traced.append(batch["input_ids"].shape)
        return training.cross_entropy(outputs, batch)

    run = make_run(loss=loss)
    batches = [make_batch(length=n, seed=i) for i, n in enumerate([6, 9, 6, 9, 6, 6])]
    _, losses = steps(run, batches)
    assert traced == [(16, 6), (16, 9)]
    assert len(set(losses)) == 6


def test_the_state_is_donated_and_the_base_is_not(make_run, make_batch):
    run = make_run()
    state, _ = run.step(run.state, run.frozen, run.put(make_batch()))
    assert all(x.is_deleted() for x in jax.tree.leaves(run.state.trainable))
    assert not any(x.is_deleted() for x in jax.tree.leaves(run.frozen))
    # A leaf trained whole starts as the base's own buffer; it must not be given away.
    base = jp.detach(jp.combine(state.trainable, run.frozen))
    assert np.all(np.isfinite(base["classifier"]["kernel"]))


def test_adapters_stay_float32_over_a_bfloat16_base(make_run, make_batch, numpy_leaves):
    run = make_run(dtype=jnp.bfloat16)
    before = numpy_leaves(run.state.trainable)
    assert {x.dtype.name for x in before.values()} == {"float32"}
    assert run.frozen["query"]["kernel"].base.dtype == jnp.bfloat16
    state, losses = steps(run, [make_batch(seed=i) for i in range(3)])
    after = numpy_leaves(state.trainable)
    assert {x.dtype.name for x in after.values()} == {"float32"}
    for name in after:
        assert np.any(after[name] != before[name]), f"{name} never moved"
    assert np.all(np.isfinite(losses))


def test_dropout_differs_by_step_and_repeats_by_seed(make_run, make_batch):
    batch = make_batch()
    still = training.Optimizer(sgd_of_zero(), {})
    for options in (
        {"adapter": jp.lora(rank=2, init="gaussian", dropout=0.5)},
        {"adapter": jp.lora(rank=2), "dropout": 0.5},
    ):
        first, again = (make_run(optimizer=still, **options) for _ in range(2))
        # b starts at 0, so adapter dropout shows in the gradient, not in the loss.
        norms = [gradient_norms(run, batch) for run in (first, again)]
        assert norms[0] == norms[1]
        assert len(set(norms[0])) == 3, options
    plain = gradient_norms(make_run(jp.lora(rank=2), optimizer=still), batch)
    assert len(set(plain)) == 1  # control: without dropout nothing differs


def sgd_of_zero():
    import optax

    return optax.sgd(0.0)


def gradient_norms(run, batch):
    state, norms = run.state, []
    for _ in range(3):
        state, metrics = run.step(state, run.frozen, run.put(batch))
        norms.append(float(metrics["grad_norm"]))
    return norms


def test_a_loss_that_is_not_finite_changes_nothing(make_run, make_batch, numpy_leaves):
    run = make_run()
    good, bad = make_batch(), make_batch(weight=np.full(16, np.inf, np.float32))
    state, _ = steps(run, [good, good])
    before = numpy_leaves(state)
    training.check_finite(state)
    state, metrics = run.step(state, run.frozen, run.put(bad))
    assert not np.isfinite(float(metrics["total"]))
    state, metrics = run.step(state, run.frozen, run.put(good))
    assert np.isfinite(float(metrics["total"]))
    with pytest.raises(training.NonFiniteError, match="not finite at step 3;") as error:
        training.check_finite(state)
    assert error.value.step == 3
    after = numpy_leaves(state)
    assert after.pop(".bad_step") == 3 and before.pop(".bad_step") == -1
    for name in before:
        assert np.array_equal(before[name], after[name]), name


def test_an_update_that_overflows_a_leaf_is_not_applied(
    make_run, make_batch, numpy_leaves
):
    """Loss and gradient are finite, and so would the next loss be: 0 * inf is masked.

    One of many leaves will do.
    """
    import optax

    huge = optax.chain(optax.scale(3e38), optax.scale(-3e38))
    run = make_run(optimizer=training.Optimizer(huge, {}))
    before = numpy_leaves(run.state)
    state, metrics = run.step(run.state, run.frozen, run.put(make_batch()))
    assert all(np.isfinite(float(metrics[n])) for n in ("total", "grad_norm"))
    with pytest.raises(training.NonFiniteError, match="updated leaves.* at step 1;"):
        training.check_finite(state)
    after = numpy_leaves(state)
    assert after.pop(".bad_step") == 1 and before.pop(".bad_step") == -1
    for name in before:
        assert np.array_equal(before[name], after[name]), name


def test_the_message_says_what_is_kept():
    error = training.NonFiniteError(4)
    assert "kept" not in str(error)
    assert "checkpoint is kept, step 2." in str(error.keeping(2))
    assert "No checkpoint had been saved" in str(error.keeping(None))
    assert error.keeping(0).step == 4 and "step 0." in str(error.keeping(0))


def test_a_batch_of_padding_alone_is_not_a_silent_zero(make_run, make_batch):
    run = make_run(jp.kasa(rank=2, beta=0.3))
    penalty = float(jp.penalty(jp.combine(run.state.trainable, run.frozen)))
    nothing = run.put(make_batch(weight=np.zeros(16, np.float32)))
    state, metrics = run.step(run.state, run.frozen, nothing)
    assert float(metrics["loss"]) == 0 and np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["total"]) == pytest.approx(penalty) and int(state.step) == 0
    with pytest.raises(training.NonFiniteError, match="weights are all 0"):
        training.check_finite(state)


@pytest.mark.parametrize("adapter", [jp.lora(rank=2), jp.kasa(rank=2)])
def test_no_temporary_of_a_kernels_shape(make_run, make_batch, adapter):
    run = make_run(adapter)
    batch = run.put(make_batch(rows=8, length=5))
    text = run.step.lower(run.state, run.frozen, batch).compile().as_text()
    made = re.findall(r"= \(?f32\[(?:16,32|32,16)\]\S* (\S+?)\(", text)
    # The kernel of up_proj itself is there; nothing of its shape is computed.
    assert "parameter" in made
    assert set(made) <= {"parameter", "bitcast", "copy", "transpose"}, made


def test_bad_arguments_are_named(make_run, make_batch):
    with pytest.raises(ValueError, match="`accumulate` must be at least 1, got 0"):
        make_run(accumulate=0)
    with pytest.raises(ValueError, match="`clip_norm` must be positive"):
        make_run(clip_norm=0.0)
    run = make_run(accumulate=3)
    with pytest.raises(ValueError, match="16 rows cannot be cut into accumulate=3"):
        run.step(run.state, run.frozen, run.put(make_batch()))
    run = make_run()
    batch = make_batch(label=np.zeros(16, np.float32))
    with pytest.raises(ValueError, match="training.squared_error"):
        run.step(run.state, run.frozen, run.put(batch))
    with pytest.raises(ValueError, match="one prediction a row"):
        run = make_run(loss=training.squared_error)
        run.step(run.state, run.frozen, run.put(batch))


def test_a_state_needs_leaves_on_the_mesh_and_a_typed_key(make_run, keys):
    run = make_run()
    trainable = jax.device_put(run.state.trainable, jax.devices()[1])
    with pytest.raises(ValueError, match="training.place"):
        training.init_state(trainable, run.optimizer, key=next(keys), mesh=run.mesh)
    with pytest.raises(TypeError, match="jax.random.key"):
        training.init_state(
            run.state.trainable, run.optimizer, key=jnp.zeros(2), mesh=run.mesh
        )
