"""Ranks that training decides: in the step, in the state, in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import allocate, training

TOTAL = 6


@pytest.fixture
def make_adaptive(make_run):
    def make(**options):
        allocation = allocate.importance(2, total_steps=TOTAL, final_steps=2)
        return make_run(jp.adalora(rank=4), allocation=allocation, **options)

    return make


def advance(run, state, make_batch, start, stop):
    counts = []
    for seed in range(start, stop):
        state, _ = run.step(state, run.frozen, run.put(make_batch(seed=seed)))
        flat = jp.tree.flat(state.trainable)
        counts += [sum(int(jnp.sum(x != 0)) for n, x in flat.items() if n[-2:] == "/e")]
    return state, counts


def test_the_step_prunes_to_the_budget(make_adaptive, make_batch):
    run = make_adaptive()
    held = {n.partition("/")[2] for n in jp.tree.flat(run.state.allocation)}
    assert "query/kernel/a" in held
    assert not any("classifier" in name for name in held)  # nothing for the head
    _, counts = advance(run, run.state, make_batch, 0, TOTAL)
    assert counts == allocate.budgets(8, 4, total_steps=TOTAL, final_steps=2)[1:]
    assert counts[-3:] == [4, 4, 4]


def test_the_step_scores_the_gradient_it_takes(
    make_run, make_batch, plain_descent, numpy_leaves
):
    """Updated leaves times the same step's clipped gradient, penalty included."""
    run = make_run(
        jp.adalora(rank=4, gamma=3.0),
        allocation=allocate.importance(2, total_steps=TOTAL, initial_steps=4),
        optimizer=plain_descent,
        clip_norm=0.1,
    )
    before = jp.tree.flat(jax.tree.map(jnp.copy, run.state.trainable))
    state, metrics = run.step(run.state, run.frozen, run.put(make_batch()))
    assert float(metrics["grad_norm"]) > 0.2
    after = jp.tree.flat(state.trainable)
    seen = jp.tree.flat(state.allocation.sensitivity)
    for name, mean in seen.items():
        gradient = np.asarray(before[name]) - np.asarray(after[name])
        expected = 0.15 * np.abs(np.asarray(after[name]) * gradient)
        np.testing.assert_allclose(mean, expected, rtol=1e-3, atol=1e-9)
        assert np.any(np.asarray(mean) != 0), name


def test_eight_devices_prune_as_one(make_adaptive, make_batch, numpy_leaves):
    one, many = make_adaptive(), make_adaptive(mesh=(2, 2, 2))
    where = jp.tree.flat(many.state.allocation.sensitivity)
    trained = jp.tree.flat(many.state.trainable)
    assert all(x.sharding == trained[name].sharding for name, x in where.items())
    assert any(not x.sharding.is_fully_replicated for x in where.values())
    states = [advance(run, run.state, make_batch, 0, TOTAL)[0] for run in (one, many)]
    kept = [numpy_leaves(state.allocation.keep) for state in states]
    assert all(np.array_equal(kept[0][n], kept[1][n]) for n in kept[0])


def test_a_resumed_run_prunes_as_if_it_had_not_stopped(
    tmp_path, make_adaptive, make_batch, numpy_leaves
):
    run, config = make_adaptive(), {"seed": 0}
    state, _ = advance(run, run.state, make_batch, 0, 3)
    with training.Checkpointer(tmp_path, config=config) as checkpoints:
        checkpoints.save(state, run.frozen)
    expected, _ = advance(run, state, make_batch, 3, TOTAL)
    again = make_adaptive()
    with training.Checkpointer(tmp_path, config=config) as checkpoints:
        restored = checkpoints.restore(again.state, again.frozen).state
    got, _ = advance(again, restored, make_batch, 3, TOTAL)
    got, expected = numpy_leaves(got), numpy_leaves(expected)
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in got)
    assert any("sensitivity" in name for name in got)


def test_a_step_that_is_not_finite_leaves_the_scores(
    make_adaptive, make_batch, numpy_leaves
):
    run = make_adaptive()
    state, _ = advance(run, run.state, make_batch, 0, 2)
    before = numpy_leaves(state.allocation)
    bad = make_batch(weight=np.zeros(16, np.float32))  # 0 / 0
    state, _ = run.step(state, run.frozen, run.put(bad))
    after = numpy_leaves(state.allocation)
    assert int(state.bad_step) == 3
    assert all(np.array_equal(after[name], before[name]) for name in after)


# --- decided on the host


@pytest.fixture
def make_chosen(make_run):
    def make(**options):
        allocation = allocate.ggm(
            *(3, 1), total_steps=30, initial_steps=1, collect_steps=4
        )
        return allocation, make_run(jp.pc(rank=4), allocation=allocation, **options)

    return make


def trained(allocation, run, state, make_batch, start, stop):
    """Steps ``start + 1`` to ``stop`` as ``train.py`` takes them."""
    chosen = None
    for seed in range(start, stop):
        state, metrics = run.step(state, run.frozen, run.put(make_batch(seed=seed)))
        if seed + 1 == allocation.settled:
            state, chosen = training.decide(allocation, state, run.frozen)
    return state, chosen, float(metrics["loss"])


def test_after_the_choice_the_others_do_not_move(make_chosen, make_batch, numpy_leaves):
    allocation, run = make_chosen()
    state, chosen, _ = trained(allocation, run, run.state, make_batch, 0, 5)
    before = jp.tree.flat(jax.tree.map(np.array, state.trainable))
    keep = {path: np.asarray(x)[0] for path, x in state.allocation.keep.items()}
    state, _, _ = trained(allocation, run, state, make_batch, 5, 25)  # with decay
    after = jp.tree.flat(jax.tree.map(np.array, state.trainable))
    assert sum(chosen.ranks().values()) == 3
    for path, kept in keep.items():
        assert chosen[path].components == tuple(np.flatnonzero(kept))
        a, b = (after[f"{path}/{n}"] == before[f"{path}/{n}"] for n in "ab")
        assert np.all(a[:, ~kept]) and np.all(b[~kept])
        assert not np.any(a[:, kept].all(0)) and not np.any(b[kept].all(1))
    assert not np.any(
        after["classifier/kernel/value"] == before["classifier/kernel/value"]
    )
    assert run.step._cache_size() == 1  # masks are arguments


def test_the_loss_falls_through_all_phases(make_chosen, make_batch):
    allocation, run = make_chosen()
    state, losses = run.state, []
    for step in range(1, 21):
        state, metrics = run.step(state, run.frozen, run.put(make_batch()))
        if step == allocation.settled:
            state, _ = training.decide(allocation, state, run.frozen)
        losses.append(float(metrics["loss"]))
    assert losses[5] < losses[4] < losses[0] and losses[-1] < 0.7 * losses[5]


def test_a_resumed_run_chooses_the_same(
    tmp_path, make_chosen, make_batch, numpy_leaves
):
    allocation, run = make_chosen()
    state, _, _ = trained(allocation, run, run.state, make_batch, 0, 3)
    with training.Checkpointer(tmp_path, config={"seed": 0}) as checkpoints:
        checkpoints.save(state, run.frozen)
    expected, chosen, _ = trained(allocation, run, state, make_batch, 3, 7)
    allocation, again = make_chosen()
    with training.Checkpointer(tmp_path, config={"seed": 0}) as checkpoints:
        restored = checkpoints.restore(again.state, again.frozen).state
    got, same, _ = trained(allocation, again, restored, make_batch, 3, 7)
    got, expected = numpy_leaves(got), numpy_leaves(expected)
    assert same == chosen
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_eight_devices_choose_as_one(make_chosen, make_batch):
    found = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        allocation, run = make_chosen(mesh=mesh)
        before = [(x.sharding, x.ndim) for x in jax.tree.leaves(run.state)]
        state, chosen, _ = trained(allocation, run, run.state, make_batch, 0, 6)
        for x, (where, ndim) in zip(jax.tree.leaves(state), before, strict=True):
            assert x.sharding.is_equivalent_to(where, ndim)
        found.append((np.asarray(state.allocation.samples), chosen))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=2e-3)
    assert found[0][1] == found[1][1]


def test_a_choice_at_the_wrong_time(make_chosen):
    allocation, run = make_chosen()
    with pytest.raises(ValueError, match="decides after update 5, .* of update 0"):
        training.decide(allocation, run.state, run.frozen)
    with pytest.raises(ValueError, match="nothing to decide"):
        training.decide(allocate.importance(2, total_steps=4), run.state, run.frozen)
