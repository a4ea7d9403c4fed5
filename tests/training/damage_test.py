"""Damage to each file of the newest checkpoint: another is used, and that is said."""

import json
import random
import shutil
import warnings

import jax
import numpy as np
import pytest

from jaxpeft import training
from jaxpeft.training import CheckpointError, _sealed

# What is left of reads that Orbax breaks off is let go of at any later moment.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
MESH = training.make_mesh(devices=jax.devices()[:1])
OPTIONS = dict(config={"seed": 0}, metric="accuracy", mode="max")
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Reads that broke off end here, and not in the test after."""
    yield
    _sealed._let_go(30.0)


def state_of(step):
    """Some values that fit in Orbax's checked nodes, and some that do not."""
    rng = np.random.default_rng(step)
    put = lambda x: jax.device_put(x, training.replicated(MESH))
    small = put(rng.normal(size=8).astype(np.float32))
    large = put(rng.normal(size=(60, 50)).astype(np.float32))
    number = lambda n: put(np.int32(n))
    trainable = {"small": small, "large": large}
    return training.TrainState(trainable, {}, number(step), put(KEY), number(-1))


FRESH = state_of(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Checkpoints 2 (the best), 3 and 4; 1 has been deleted."""
    folder = tmp_path_factory.mktemp("good")
    with training.Checkpointer(folder, **OPTIONS) as checkpoints:
        for step, score in zip((1, 2, 3, 4), (0.4, 0.9, 0.5, 0.6), strict=True):
            checkpoints.save(
                state_of(step), {}, data_state=[step], scores={"accuracy": score}
            )
    return folder


def restored(folder, step="last", state=FRESH, **changed):
    """What comes back of a folder, and the warnings' texts."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with training.Checkpointer(folder, **{**OPTIONS, **changed}) as checkpoints:
            found = checkpoints.restore(state, {}, step=step)
    for name, value in state_of(found.step).trainable.items():
        np.testing.assert_array_equal(found.state.trainable[name], value)
    assert found.data_state == [found.step] and int(found.state.step) == found.step
    return found, [str(w.message) for w in told if w.category is UserWarning]


def flipped(content, seed):
    place = random.Random(seed).randrange(len(content))
    change = bytes([content[place] ^ 16])
    return content[:place] + change + content[place + 1 :]


KINDS = {
    "cut in half": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "flipped": lambda content: flipped(content, 0),
    "deleted": lambda content: None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_the_newest(good, tmp_path, kind):
    """Exactly what was saved comes back, or the one before it, said aloud."""
    files = [p.relative_to(good) for p in (good / "4").rglob("*") if p.is_file()]
    older = 0
    for number, file in enumerate(sorted(files)):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        content = KINDS[kind]((good / file).read_bytes())
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        found, told = restored(folder)
        assert (found.step, len(told)) in {(4, 0), (3, 1)}, file
        if told:
            assert "checkpoint 4 in " in told[0] and "Checkpoint 3 is used" in told[0]
            assert (folder / "damaged-4").is_dir() and not (folder / "4").exists()
            older += 1
    assert older >= 3  # control: the damage is real


def test_a_bit_anywhere_in_the_values(good, tmp_path):
    """Most of them lie where no checksum of Orbax's is."""
    (file,) = [
        p for p in (good / "4").rglob("*") if p.is_file() and p.stat().st_size > 10_000
    ]
    content, steps = file.read_bytes(), set()
    for seed in range(12):
        folder = tmp_path / str(seed)
        shutil.copytree(good, folder)
        (folder / file.relative_to(good)).write_bytes(flipped(content, seed))
        found, told = restored(folder)
        assert len(told) == (found.step == 3)
        steps.add(found.step)
    assert 3 in steps


def test_folders(good, tmp_path):
    def trial(name, change, step="last"):
        shutil.copytree(good, tmp_path / name)
        change(tmp_path / name)
        return restored(tmp_path / name, step)

    found, told = trial("no state", lambda d: shutil.rmtree(d / "4/state"))
    assert found.step == 3 and len(told) == 1
    found, (told,) = trial("empty", lambda d: (d / "7").mkdir())
    assert found.step == 4 and "checkpoint 7 in " in told
    found, (told,) = trial("other", lambda d: (d / "4").rename(d / "10"))
    assert found.step == 3 and "is of step 4, its folder of 10" in told
    # The best one is told of, whatever is asked for; a rest of a deletion is not.
    lost = lambda d: (d / "2/meta/metadata").write_text("{")
    for step in ("last", "best"):
        found, (told,) = trial(f"best {step}", lost, step)
        assert found.step == 4 and "checkpoint 2 in " in told
    found, told = trial("rest", lambda d: (d / "1").mkdir())
    assert (found.step, told) == (4, [])


def test_a_run_goes_on_over_a_damaged_checkpoint(good, tmp_path):
    """Its step is saved anew; what was damaged is kept, however often it happens."""
    folder = tmp_path / "run"
    shutil.copytree(good, folder)
    for name in ("damaged-4", "damaged-4-2"):
        (folder / "4/meta/metadata").unlink()
        # Not pytest.warns: it would hand on what Orbax's broken-off reads leave behind.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with training.Checkpointer(folder, **OPTIONS) as checkpoints:
                assert checkpoints.latest == 4
                assert checkpoints.restore(FRESH, {}).step == 3
                assert checkpoints.latest == 3
                score = {"accuracy": 0.6}
                assert checkpoints.save(state_of(4), {}, data_state=[4], scores=score)
        kept = f"is kept as '{folder / name}'"
        assert any(kept in str(w.message) for w in told)
        found, told = restored(folder)
        assert (found.step, told) == (4, []) and (folder / name).is_dir()


def test_none_is_whole(good, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(good, folder)
    for step in "234":
        (folder / step / "meta/metadata").write_text("{")
    before = sorted(folder.rglob("*"))
    said = r"(?s)is whole:\n  4: .*\n  3: .*\n  2: .*cannot be read.*Put a copy"
    with pytest.raises(CheckpointError, match=said):
        restored(folder)
    with pytest.raises(CheckpointError, match=r"`step` 3: no such .*\n  3: "):
        restored(folder, 3)
    assert sorted(folder.rglob("*")) == before  # nothing is touched


def test_what_is_another_run_s_is_refused_and_not_stepped_over(good):
    with pytest.raises(CheckpointError, match="config field seed: 0, now 1"):
        restored(good, config={"seed": 1})
    wider = FRESH._replace(trainable={**FRESH.trainable, "more": FRESH.step})
    with pytest.raises(CheckpointError, match="leaf trainable/more: absent, now"):
        restored(good, state=wider)
    assert sorted(p.name for p in good.iterdir()) == ["2", "3", "4"]


def test_nothing_is_saved_before_the_last_one(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    with training.Checkpointer(tmp_path / "run", **OPTIONS) as checkpoints:
        with pytest.raises(CheckpointError, match="of step 1, and .* step 4: restore"):
            checkpoints.save(state_of(1), {}, scores={"accuracy": 0.1})


def test_a_checkpoint_from_before_they_were_sealed_is_read(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    for folder in (tmp_path / "run").iterdir():
        found = json.loads((folder / "meta/metadata").read_text())["meta"]
        (folder / "metrics").mkdir()
        (folder / "metrics/metrics").write_text(json.dumps(found.pop("scores")))
        for name in ("values", "step", "kept"):
            found.pop(name)
        (folder / "meta/metadata").write_text(json.dumps(found))
    for step, number in (("last", 4), ("best", 2)):
        found, told = restored(tmp_path / "run", step)
        assert (found.step, told) == (number, [])
    assert found.scores == {"accuracy": 0.9}
