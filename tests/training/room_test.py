"""A disk that is full, or becomes read-only, while a run is saved on it."""

import errno
import gc
import re
import subprocess

import jax
import numpy as np
import pytest

from jaxpeft import training

MESH = training.make_mesh(devices=jax.devices()[:1])
OPTIONS = dict(config={"seed": 0}, metric="accuracy", mode="max")


def state_of(step, rows):
    put = lambda x: jax.device_put(x, training.replicated(MESH))
    number = lambda n: put(np.int32(n))
    values = np.random.default_rng(step).normal(size=(rows, 256)).astype(np.float32)
    key = put(jax.random.key(0))
    return training.TrainState(
        {"kernel": put(values)}, {}, number(step), key, number(-1)
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB, and a function that makes it read-only."""
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may mount no file system: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def save_until_it_fails(folder, do=lambda step: None):
    with training.Checkpointer(folder, **OPTIONS) as checkpoints:
        for step in range(1, 9):
            do(step)
            scores = {"accuracy": step / 10}
            checkpoints.save(state_of(step, 200), {}, scores=scores)
            checkpoints.wait()


# Orbax breaks its other writes off; what is left of them is let go of at any moment.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_in_numbers(small_disk):
    """Each takes 0.2 MB: two fit, and the third before the first is gone does not."""
    folder = small_disk / "run"
    with pytest.raises(training.NoRoomError) as caught:
        save_until_it_fails(folder)
    said = str(caught.value)
    assert f"'{folder}' has no room left: " in said
    numbers = r"([.\d]+) MB are free, a .* takes ([.\d]+) MB: ([.\d]+) MB are missing"
    free, takes, missing = map(float, re.search(numbers, said).groups())
    assert 0 < free <= takes < 0.5 and abs(takes - free - missing) < 0.11
    assert "checkpoints [1, 2] are whole" in said
    with training.Checkpointer(folder, **OPTIONS) as checkpoints:
        found = checkpoints.restore(state_of(0, 200), {})
    expected = state_of(2, 200).trainable["kernel"]
    np.testing.assert_array_equal(found.state.trainable["kernel"], expected)
    del caught
    gc.collect()


def test_a_disk_that_becomes_read_only(small_disk):
    folder = small_disk / "run"
    change = lambda step: read_only(small_disk) if step == 2 else None
    with pytest.raises(
        training.NoRoomError, match=r"is read-only now.*\[1\] are whole"
    ):
        save_until_it_fails(folder, change)


def test_what_is_written_beside_the_checkpoints(tmp_path, monkeypatch):
    """Of a quota the file system knows nothing."""
    with training.Checkpointer(tmp_path, **OPTIONS) as checkpoints:
        checkpoints.save(state_of(3, 2), {}, scores={"accuracy": 0.5})
        checkpoints.wait()
        said = r"has no room left: .*MB: a quota or a limit is reached.*\[3\] are whole"
        with pytest.raises(training.NoRoomError, match=said):
            with checkpoints.told_of_room():
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
        with pytest.raises(FileNotFoundError):  # another fault passes as it is
            with checkpoints.told_of_room():
                open(tmp_path / "none")
