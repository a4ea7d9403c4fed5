import json
import os
import signal
import subprocess
import sys

import ml_collections
import pytest

from jaxpeft import runs


def config(**fields):
    return ml_collections.ConfigDict({"seed": 0, "adapter": {"rank": 8}} | fields)


def test_a_new_folder_keeps_its_config_and_reopens(tmp_path):
    for _ in range(2):
        with runs.open_workdir(tmp_path / "a/run", config()) as folder:
            assert json.loads((folder / "config.json").read_text())["seed"] == 0


def test_another_config_is_refused_field_by_field(tmp_path):
    with runs.open_workdir(tmp_path / "run", config()):
        pass
    other = config(adapter={"rank": 16}, extra=1)
    with pytest.raises(
        runs.WorkdirError, match="rank: 8, now 16\n  extra: absent, now"
    ):
        with runs.open_workdir(tmp_path / "run", other):
            pass


def test_a_run_of_an_older_version_is_said_to_be_one(tmp_path):
    with runs.open_workdir(tmp_path / "run", config()):
        pass
    newer = config(tokenizer={"pad_token": None, "eos_token": None}, adapter={"b": 1})
    with pytest.raises(runs.WorkdirError) as caught:
        runs.check_workdir(tmp_path / "run", newer)
    said = str(caught.value).splitlines()[-1]
    assert (
        "older jaxpeft, without tokenizer.pad_token, tokenizer.eos_token, and" in said
    )
    assert "put its values back" not in said
    with pytest.raises(runs.WorkdirError, match="put its values back"):
        runs.check_workdir(tmp_path / "run", config(seed=1, adapter={"b": 1}))


def test_what_may_differ_is_written_anew(tmp_path):
    with runs.open_workdir(tmp_path / "run", config()):
        pass
    with runs.open_workdir(tmp_path / "run", config(seed=1), free=["seed"]) as folder:
        assert json.loads((folder / "config.json").read_text())["seed"] == 1


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(
        runs.WorkdirError, match="holds no run .thesis.tex.; give a new"
    ):
        with runs.open_workdir(tmp_path, config()):
            pass
    with pytest.raises(runs.WorkdirError, match="is a file"):
        with runs.open_workdir(tmp_path / "thesis.tex", config()):
            pass
    with pytest.raises(runs.WorkdirError, match="is a URL"):
        with runs.open_workdir("gs://bucket/run", config()):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_run_at_a_time(tmp_path):
    with runs.open_workdir(tmp_path / "run", config()):
        with pytest.raises(
            runs.WorkdirError, match=f"in use .*{os.getpid()}.*--workdir"
        ):
            with runs.open_workdir(tmp_path / "run", config()):
                pass
    with runs.open_workdir(tmp_path / "run", config()):
        pass


HOLD = """
import sys, time, ml_collections
from jaxpeft import runs
config = ml_collections.ConfigDict({"seed": 0, "adapter": {"rank": 8}})
with runs.open_workdir(sys.argv[1], config):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(runs.WorkdirError, match=f"in use .*{process.pid}"):
                with runs.open_workdir(tmp_path / "run", config()):
                    pass
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with runs.open_workdir(tmp_path / "run", config()):
        pass
