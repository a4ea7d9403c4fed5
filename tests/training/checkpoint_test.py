"""Checkpoints: whole, refused where they do not fit, and never the base."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import training
from jaxpeft.tree import AdaptedKernel

CONFIG = {"adapter": {"name": "kasa", "rank": 2}, "seed": 0, "mesh": (1, 1, 1)}


is_node = lambda x: isinstance(x, AdaptedKernel)


def advance(run, state, make_batch, start, stop):
    for seed in range(start, stop):
        batch = run.put(make_batch(seed=seed))
        state, _ = run.step(state, run.frozen, batch)
    return state


def same(actual, desired):
    assert actual.keys() == desired.keys()
    for name in desired:
        assert np.array_equal(actual[name], desired[name]), name


def test_a_resumed_run_is_the_run_that_never_stopped(
    tmp_path, make_run, make_batch, numpy_leaves
):
    run = make_run(jp.kasa(rank=2, dropout=0.2), dropout=0.1)
    state = advance(run, run.state, make_batch, 0, 3)
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        assert checkpoints.latest is None and checkpoints.best is None
        saved = numpy_leaves(state)
        data, extra = {"next": 3}, {"history": [0.5]}
        assert checkpoints.save(state, run.frozen, data_state=data, extra=extra)
        # The very next step takes the saved buffers over, before they are on disk.
        state = advance(run, state, make_batch, 3, 6)
    expected = numpy_leaves(state)
    again = make_run(jp.kasa(rank=2, dropout=0.2), dropout=0.1)
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        assert checkpoints.latest == 3
        restored = checkpoints.restore(again.state, again.frozen)
    assert restored.step == 3
    assert (restored.data_state, restored.extra) == (data, extra)
    same(numpy_leaves(restored.state), saved)
    same(numpy_leaves(restored.frozen), numpy_leaves(run.frozen))
    state = advance(again, restored.state, make_batch, 3, 6)
    same(numpy_leaves(state), expected)


def test_fixed_leaves_come_from_the_checkpoint_and_the_base_does_not(
    tmp_path, make_run, numpy_leaves
):
    run = make_run()
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(run.state, run.frozen)
        checkpoints.wait()
        names = checkpoints._manager.item_metadata(0)["state"]
        held = {n for n in names if n.startswith("fixed/")}
        nodes = filter(is_node, jax.tree.leaves(run.frozen, is_leaf=is_node))
        own = {f"fixed/{x.site.path}/{n}" for x in nodes for n in x.frozen}
        assert held == own and "fixed/query/kernel/scale" in held
        assert {n.split("/")[0] for n in names} == {
            "fixed",
            "trainable",
            "opt_state",
            "step",
            "key",
        }
        assert not any(n.endswith(("/base", "embed/embedding")) for n in names)
        # What an SVD on another machine might have made of them:
        flip = lambda x: x.replace(frozen=jax.tree.map(jnp.negative, x.frozen))
        other = jax.tree.map(
            lambda x: flip(x) if is_node(x) else x, run.frozen, is_leaf=is_node
        )
        restored = checkpoints.restore(run.state, other)
    same(numpy_leaves(restored.frozen), numpy_leaves(run.frozen))


def test_another_mesh_reads_the_same_numbers(
    tmp_path, make_run, make_batch, numpy_leaves
):
    one, many = make_run(), make_run(mesh=(2, 2, 2))
    state = advance(one, one.state, make_batch, 0, 2)
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state, one.frozen)
    with training.Checkpointer(
        tmp_path, config={**CONFIG, "mesh": (2, 2, 2)}, free=["mesh"]
    ) as checkpoints:
        restored = checkpoints.restore(many.state, many.frozen)
    same(numpy_leaves(restored.state), numpy_leaves(state))
    where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
    assert where(restored.state) == where(many.state)
    assert where(restored.frozen) == where(many.frozen)
    advance(many, restored.state, make_batch, 2, 3)


@jax.jit
def moved(tree):
    """Other numbers for every entry: factors that start at 0 are all alike."""
    drawn = lambda x: x + jax.random.normal(jax.random.key(7), x.shape, x.dtype)
    return jax.tree.map(drawn, tree)


def test_from_mesh_to_mesh_to_mesh(tmp_path, make_run, numpy_leaves):
    """Bit for bit, each leaf where the next mesh has it."""
    expected, found = None, None
    for number, mesh in enumerate([(8, 1, 1), (1, 1, 1), (2, 2, 2), (1, 4, 2)]):
        run = make_run(jp.lora(rank=2), mesh=mesh)
        options = dict(config={**CONFIG, "mesh": mesh}, free=["mesh"])
        if number == 0:
            found = run.state._replace(trainable=moved(run.state.trainable))
            expected = numpy_leaves(found)
        else:
            with training.Checkpointer(tmp_path / str(number - 1), **options) as before:
                found = before.restore(run.state, run.frozen).state
            same(numpy_leaves(found), expected)
            where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
            assert where(found) == where(run.state)
        with training.Checkpointer(tmp_path / str(number), **options) as checkpoints:
            checkpoints.save(found, run.frozen)


def test_scores_may_come_later(tmp_path, make_run, make_batch):
    """All at once, and sealed anew."""
    run = make_run()
    options = dict(config=CONFIG, metric="accuracy", mode="max")
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        state = advance(run, run.state, make_batch, 1, 2)
        checkpoints.save(state, run.frozen, scores={"accuracy": 0.3})
        state = advance(run, state, make_batch, 2, 3)
        checkpoints.save(state, run.frozen, extra={"due": True})
        assert checkpoints.best == 1
        checkpoints.complete(2, extra={"due": False}, scores={"accuracy": 0.9})
        assert checkpoints.best == 2
        with pytest.raises(training.CheckpointError, match="`step` 7: no such checkpo"):
            checkpoints.complete(7, extra=None, scores=None)
    assert not list((tmp_path / "2/meta").glob("*.new"))
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        found = checkpoints.restore(state, run.frozen, step="best")
    assert (found.step, found.scores) == (2, {"accuracy": 0.9})
    assert found.extra == {"due": False}
    both = map(jax.tree.leaves, (state.trainable, found.state.trainable))
    for old, new in zip(*both, strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_last_and_the_best_are_kept(tmp_path, make_run, make_batch):
    run = make_run()
    options = dict(config=CONFIG, metric="accuracy", mode="max")
    scores = {1: 0.3, 2: 0.9, 3: 0.9, 4: 0.2, 5: float("nan")}
    state = run.state
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        for step, score in scores.items():
            state = advance(run, state, make_batch, step, step + 1)
            checkpoints.save(state, run.frozen, scores={"accuracy": score})
        checkpoints.wait()
        assert (checkpoints.best, checkpoints.latest) == (3, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4", "5"]
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        assert (checkpoints.best, checkpoints.latest) == (3, 5)
        best = checkpoints.restore(state, run.frozen, step="best")
        assert (best.step, best.scores) == (3, {"accuracy": 0.9})
        assert checkpoints.restore(state, run.frozen).step == 5
        with pytest.raises(training.CheckpointError, match=r"there are \[3, 4, 5\]"):
            checkpoints.restore(state, run.frozen, step=2)
        # A step is saved once; the same again is no new information.
        assert not checkpoints.save(state, run.frozen)
        with pytest.raises(ValueError, match="step 5 is already saved"):
            checkpoints.save(state, run.frozen, scores={"accuracy": 1.0})
        with pytest.raises(ValueError, match="lack 'accuracy'"):
            checkpoints.save(state, run.frozen, scores={"f1": 1.0})


def test_a_smaller_score_can_be_the_better_one(tmp_path, make_run, make_batch):
    run = make_run()
    options = dict(config=CONFIG, metric="loss", mode="min")
    state = run.state
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        for step, loss in {1: 0.3, 2: 0.1, 3: 0.2}.items():
            state = advance(run, state, make_batch, step, step + 1)
            checkpoints.save(state, run.frozen, scores={"loss": loss})
        checkpoints.wait()
        assert (checkpoints.best, checkpoints.latest) == (2, 3)
    with pytest.raises(ValueError, match="`mode` must be 'max' or 'min'"):
        training.Checkpointer(tmp_path, config=CONFIG, mode="low")


def test_another_run_is_refused_and_every_difference_is_listed(tmp_path, make_run):
    run = make_run()
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(run.state, run.frozen)
    other = {"adapter": {"name": "kasa", "rank": 3}, "seed": 1, "mesh": (1, 1, 1)}
    with training.Checkpointer(tmp_path, config=other) as checkpoints:
        with pytest.raises(
            training.CheckpointError,
            match=r"(?s)adapter.rank: 2, now 3.*seed: 0, now 1",
        ):
            checkpoints.restore(run.state, run.frozen)
    with training.Checkpointer(tmp_path, config=other, free=["seed"]) as checkpoints:
        with pytest.raises(training.CheckpointError) as error:
            checkpoints.restore(run.state, run.frozen)
        assert "adapter.rank" in str(error.value) and "seed" not in str(error.value)
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        wider = make_run(jp.kasa(rank=3))
        with pytest.raises(
            training.CheckpointError,
            match=r"kernel/b: float32\[2, 16\], now float32\[3, 16\]",
        ):
            checkpoints.restore(wider.state, wider.frozen)
        lora = make_run(jp.lora(rank=2))
        with pytest.raises(
            training.CheckpointError, match=r"kernel/\w+: float32\[2\], now absent"
        ):
            checkpoints.restore(lora.state, lora.frozen)


def test_another_base_is_refused(tmp_path, make_run):
    run = make_run()
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(run.state, run.frozen)
    embedding = run.frozen["embed"]["embedding"]
    swapped = embedding.at[0].set(embedding[1]).at[1].set(embedding[0])
    one_bit = embedding.at[3, 5].multiply(1 + 2**-23)
    for changed in (swapped, one_bit):
        frozen = {**run.frozen, "embed": {"embedding": changed}}
        with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
            with pytest.raises(
                training.CheckpointError, match="base leaf embed/embedding: "
            ):
                checkpoints.restore(run.state, frozen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_the_checksum_is_of_bits_and_does_not_depend_on_the_mesh(dtype):
    from jaxpeft.training._sealed import checksum

    values = np.random.default_rng(0).normal(size=(8, 16)) * 9
    x = jnp.asarray(values).astype(dtype)
    mesh = training.make_mesh(2, 2, 2)
    spec = jax.sharding.PartitionSpec("fsdp", "tensor")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert int(checksum(x)) == int(checksum(spread))
    assert int(checksum(x)) != int(checksum(-x))
    assert int(checksum(x)) != int(checksum(x[::-1]))


def test_left_overs_of_a_killed_save_do_no_harm(tmp_path, make_run, make_batch):
    run = make_run()
    options = dict(config=CONFIG, metric="accuracy", mode="max")
    state = advance(run, run.state, make_batch, 0, 1)
    with training.Checkpointer(tmp_path, **options) as checkpoints:
        checkpoints.save(state, run.frozen, scores={"accuracy": 0.5})
        state = advance(run, state, make_batch, 1, 2)
        checkpoints.save(state, run.frozen, scores={"accuracy": 0.6})
    # Killed while writing step 7: a temporary folder with part of the files.
    half = tmp_path / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "2", half)
    for file in [p for p in half.rglob("*") if p.is_file()][::2]:
        file.unlink()
    # Killed while deleting step 0: a folder without part of its files.
    for gone in ("_CHECKPOINT_METADATA", "state", "meta"):
        shutil.copytree(tmp_path / "2", tmp_path / "0")
        victim = tmp_path / "0" / gone
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        with training.Checkpointer(tmp_path, **options) as checkpoints:
            assert checkpoints.latest == 2
            restored = checkpoints.restore(run.state, run.frozen)
            assert restored.step == 2
            after = advance(run, restored.state, make_batch, 2, 3)
            checkpoints.save(after, run.frozen, scores={"accuracy": 0.4})
            checkpoints.wait()
            assert checkpoints.latest == 3
        shutil.rmtree(tmp_path / "3")
        shutil.rmtree(tmp_path / "0", ignore_errors=True)
    assert not half.exists()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path, make_run, make_batch):
    run = make_run()
    state = advance(run, run.state, make_batch, 0, 2)
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(state, run.frozen)
        bad = make_batch(weight=np.full(16, np.nan, np.float32))
        state, _ = run.step(state, run.frozen, run.put(bad))
        with pytest.raises(training.NonFiniteError, match="at step 3"):
            checkpoints.save(state, run.frozen)
        checkpoints.wait()
        assert checkpoints.latest == 2


def test_an_empty_folder_says_so(tmp_path, make_run):
    run = make_run()
    with training.Checkpointer(tmp_path, config=CONFIG) as checkpoints:
        with pytest.raises(training.CheckpointError, match="there are none"):
            checkpoints.restore(run.state, run.frozen)
        with pytest.raises(training.CheckpointError, match="'best': there is no such"):
            checkpoints.restore(run.state, run.frozen, step="best")
