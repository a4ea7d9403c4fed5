"""A run can be restored from a folder of any name, or never begins in it."""

import jax
import ml_collections
import numpy as np
import pytest

from jaxpeft import runs, training

REFUSED = "*?[\\"
PRINTABLE = [chr(i) for i in range(32, 127) if chr(i) != "/"]
NAMES = [
    *(f"a{character}b" for character in PRINTABLE if character not in REFUSED),
    *(" before", "after ", "two  spaces ", "%41%2F%00", "a?b#c".replace("?", "%3F")),
    *(
        "überall",
        "日本語",
        "e\u0301",
        "😀",
        "-dash",
        "--config=x",
        "new\nline",
        "tab\t",
    ),
    *(
        "file:",
        "gs:x",
        "s3:",
        "hf:",
        "as3:",
        "http:",
        "s3:bucket",
        "${HOME}",
        "{a,b}",
        "~user",
        "a~",
        "n" * 250,
    ),
]


@pytest.fixture(scope="module")
def tree():
    return {"a": jax.numpy.arange(3.0)}


def state_of(tree, mesh, key):
    """A state so small that a folder takes a moment."""
    where = training.replicated(mesh)
    put = lambda x: jax.device_put(x, where)
    number = lambda n: put(np.int32(n))
    return training.TrainState(
        jax.tree.map(put, tree), {}, number(3), put(key), number(-1)
    )


def saved_and_restored(folder, tree):
    mesh = training.make_mesh(devices=jax.devices()[:1])
    state = state_of(tree, mesh, jax.random.key(0))
    with training.Checkpointer(folder, config={"seed": 0}) as checkpoints:
        checkpoints.save(state, {}, data_state=[1], extra="x")
    empty = state_of({"a": np.zeros(3, np.float32)}, mesh, jax.random.key(0))
    with training.Checkpointer(folder, config={"seed": 0}) as checkpoints:
        assert checkpoints.latest == 3
        return checkpoints.restore(empty, {})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_in_a_folder_is_restored_from_it(name, tmp_path, tree):
    found = saved_and_restored(tmp_path / name, tree)
    np.testing.assert_array_equal(found.state.trainable["a"], [0.0, 1.0, 2.0])
    assert found.extra == "x" and found.data_state == [1]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("character", REFUSED)
def test_a_pattern_for_a_name_is_refused_at_the_start(character, above, tmp_path):
    folder = tmp_path / f"a{character}b" / ("run" if above else "")
    for refused in (
        lambda: training.Checkpointer(folder, config={}),
        lambda: runs.check_workdir(folder, ml_collections.ConfigDict()),
        lambda: runs.open_workdir(folder, ml_collections.ConfigDict()).__enter__(),
    ):
        with pytest.raises(runs.WorkdirError, match="not be found again") as error:
            refused()
        assert repr(character) in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["gs:", "logs:", "logs:/run", "/gs/bucket/run", "/hf/run", "gs://bucket"]
)
def test_what_is_taken_for_a_bucket_is_refused_at_the_start(name, tmp_path):
    with pytest.raises(runs.WorkdirError, match="`folder`"):
        training.Checkpointer(name if "://" in name else tmp_path / name, config={})
    assert not any(tmp_path.iterdir())


def test_a_path_that_is_too_long_is_refused(tmp_path):
    folder = tmp_path.joinpath(*["n" * 250] * 14)
    with pytest.raises(runs.WorkdirError, match="a path of 3[0-9]{3} bytes"):
        runs.check_workdir(folder, ml_collections.ConfigDict())
    assert not any(tmp_path.iterdir())


def test_relative_paths_and_the_home_folder(tmp_path, tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    saved_and_restored("here/run", tree)
    saved_and_restored("../" + tmp_path.name + "/there", tree)
    saved_and_restored("~/run", tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "home", "there"]
    assert (tmp_path / "home/run/3").is_dir()
