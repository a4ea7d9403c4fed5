"""train.py from the outside: the command line, a kill, a NaN, and what is left."""

import json
import random
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from kill_toolbox import DIES, adapter_of, assert_same_run, curve

from jaxpeft import runs

ROOT = Path(__file__).parents[2]

# One of two processes that train together.
TOGETHER = """
import sys
import jax
jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id={index})
sys.path.insert(0, {root!r})
import train
train.main()
"""


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run that was never stopped: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = command(f"--workdir={folder}")
    return folder, done.stdout


@pytest.mark.slow
def test_a_run_leaves_everything_behind(finished):
    folder, printed = finished
    report = json.loads((folder / "report.json").read_text())
    results = report["results"]
    assert results["after"]["accuracy"] > results["before"]["accuracy"] + 0.1
    assert results["steps"] == 12 and 0 < results["trainable"] < results["total"]
    assert report["config"]["adapter"]["rank"] == 4 and "jax" in report["versions"]
    assert [s for s, _ in curve(folder, "train", "loss")] == list(range(1, 13))
    assert [s for s, _ in curve(folder, "eval", "accuracy")] == [0, 6, 12]
    assert all(0 <= share <= 1 for _, share in curve(folder, "speed", "input_wait"))
    assert 0 <= results["input_wait"] <= 1
    assert "compiled programs are kept in " in "".join(printed.splitlines()[:4])
    assert "kasa" in (folder / "sites.txt").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((folder / "tensorboard").iterdir()) and any(
        (folder / "checkpoints").iterdir()
    )
    assert re.search(r"step 6/12  loss \S+  lr .* accuracy .* left", printed)
    assert "saved and read onto a fresh base, scores the same" in printed
    score = f"{results['after']['accuracy']:.4f}"
    assert re.search(rf"accuracy after +│ {score} at the best step", printed)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(command, finished, tmp_path):
    command(f"--workdir={tmp_path / 'again'}")
    assert_same_run(tmp_path / "again", finished[0])


@pytest.mark.slow
def test_kill_and_resume_is_as_if_nothing_had_been(command, finished, tmp_path):
    step = random.randrange(1, 12)
    print(f"killed after step {step}")
    script = ("-c", DIES.format(step=step, folder="") + "import train; train.main()")
    died = command(f"--workdir={tmp_path / 'run'}", script=script, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "run/adapter").exists()
    resumed = command(f"--workdir={tmp_path / 'run'}")
    # A checkpoint is saved every two steps; the one being written may be lost.
    assert step < 5 or "Resuming after step" in resumed.stdout
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(command, finished):
    folder, _ = finished
    before = adapter_of(folder)
    printed = command(f"--workdir={folder}").stdout
    assert "This run is complete" in printed and "accuracy after" in printed
    for name, array in adapter_of(folder).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(command, finished, tmp_path):
    folder = tmp_path / "run"
    rate = "--config.optimizer.learning_rate=1e38"
    others = ("--config.save_every=1 step", "--config.seed=1")
    done = command(f"--workdir={folder}", rate, *others, check=False)
    (stopped,) = runs.read_metrics(folder, "stopped")
    step = stopped["step"]
    assert done.returncode == 3 and f"not finite at step {step};" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"The last good checkpoint is kept, step {step - 1}." in done.stderr
    assert (folder / "checkpoints" / str(step - 1)).is_dir()
    assert not (folder / "report.json").exists()
    # A control for the tests above: another seed, other numbers.
    first = [curve(f, "train", "loss")[0] for f in (folder, finished[0])]
    assert first[0] != first[1]


@pytest.mark.slow
def test_a_folder_of_another_config_is_refused(command, finished):
    done = command(f"--workdir={finished[0]}", "--config.adapter.rank=2", check=False)
    assert done.returncode == 2 and "adapter.rank: 4, now 2" in done.stderr
    assert "Traceback" not in done.stderr
    done = command(f"--workdir={finished[0]}", "--config.adapter.rnak=2", check=False)
    assert done.returncode == 2 and "nearest: ['adapter.rank'" in done.stderr


def test_a_folder_in_use_is_refused(tiny_config, tmp_path):
    import train

    with runs.open_workdir(tmp_path / "run", tiny_config()):
        with pytest.raises(runs.WorkdirError, match="in use by another living run"):
            train.run(tiny_config(), tmp_path / "run")


@pytest.mark.slow
def test_two_processes_are_one_run(start, all_of, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = lambda i: TOGETHER.format(port=port, index=i, root=str(ROOT))
    folder = f"--workdir={tmp_path / 'run'}"
    steps = "--config.train_for=4 steps", "--config.evaluate_every=2 steps"
    done = all_of([start(folder, *steps, script=("-c", text(i))) for i in range(2)])
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "accuracy after" in done[0].stdout and "accuracy" not in done[1].stdout
    results = json.loads((tmp_path / "run/report.json").read_text())
    assert results["versions"]["processes"] == "2"
    assert results["versions"]["devices"].startswith("4 x")
    assert [s for s, _ in curve(tmp_path / "run", "train", "loss")] == [1, 2, 3, 4]
