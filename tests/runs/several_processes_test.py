"""Runs that are told to stop, or lose one of two processes: from the outside."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kill_toolbox import curve

ROOT = Path(__file__).parents[2]
# train.py, of which one process sends itself a signal once so many updates are done.
SIGNALS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import jax
import train
from jaxpeft import runs
advance, done = runs.Progress.advance, []
def advance_and_signal(self):
    advance(self)
    done.append(1)
    if (len(done), jax.process_index()) == ({step}, {who}):
        for _ in range(2):  # a scheduler may say it twice
            os.kill(os.getpid(), signal.{name})
runs.Progress.advance = advance_and_signal
if __name__ == "__main__":
    sys.exit(train.main())
"""
# train.py, of which one process sends itself SIGTERM in the evaluation after step 2.
# All evaluate slowly: the others hear of it a moment later.
EVALUATES = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import jax
import train
from jaxpeft import runs
from jaxpeft.runs import _inputs
plain, count = _inputs.run_split, []
def run_split(*arguments, advance, **options):
    count.append(0)
    def slowly(rows):
        count[-1] += 1
        if len(count) == 2 and count[-1] == 1 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3 * (len(count) == 2))
        advance(rows)
    return plain(*arguments, advance=slowly, **options)
_inputs.run_split = run_split
if __name__ == "__main__":
    sys.exit(train.main())
"""
FEW = "--config.targets=('query',)"  # compiles faster
LONG = (FEW, "--config.train_for=400 steps", "--config.evaluate_every=400 steps")
SHORT = (FEW, "--config.evaluate_every=12 steps", "--config.save_every=4 steps")


def program(folder, name, *, step, who=0):
    file = folder / f"{name}_{who}.py"
    file.write_text(SIGNALS.format(root=str(ROOT), name=name, step=step, who=who))
    return str(file)


def saved(folder):
    names = [p.name for p in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


@pytest.mark.slow
def test_sigterm_stops_all_at_one_step(start, all_of, tmp_path):
    """In a long run: the other one hears of it some steps later."""
    folder = tmp_path / "run"
    long = (f"--workdir={folder}", *LONG)
    launched = ("-m", "jaxpeft.launch", "-n", "2")
    first = program(tmp_path, "SIGTERM", step=5, who=1)
    (done,) = all_of([start(*long, script=(*launched, first))])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+), which", done.stderr)
    assert 5 <= int(step) < 400 and saved(folder)[-1] == int(step)
    assert not (folder / "adapter").exists()
    # One process goes on where two have stopped, and is stopped in its turn.
    again = program(tmp_path, "SIGTERM", step=3)
    (done,) = all_of([start(*long, script=(again,))])
    assert done.returncode == 0 and f"Resuming after step {step}." in done.stdout
    last = int(step) + 3
    assert f"stopped by SIGTERM after step {last}, which is saved" in done.stderr
    assert saved(folder)[-1] == last
    assert [s for s, _ in curve(folder, "train", "loss")] == list(range(1, last + 1))


@pytest.mark.slow
def test_sigterm_breaks_off_the_evaluation_of_all(start, all_of, tmp_path):
    folder, file = tmp_path / "run", tmp_path / "evaluates.py"
    file.write_text(EVALUATES.format(root=str(ROOT)))
    few = ("--config.train_for=4 steps", "--config.evaluate_every=2 steps", FEW)
    given = (f"--workdir={folder}", *few, "--config.eval_batch_size=4")
    launched = ("-m", "jaxpeft.launch", "-n", "2", str(file))
    (done,) = all_of([start(*given, script=launched)])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "stopped by SIGTERM after step 2, which is saved" in done.stderr
    assert saved(folder)[-1] == 2
    assert [s for s, _ in curve(folder, "eval", "accuracy")] == [0]


@pytest.mark.slow
def test_sigkill_of_the_first_of_two_ends_the_other(start, all_of, tmp_path):
    """With one line: C++ prints a stack, but nobody sees it."""
    file = program(tmp_path, "SIGKILL", step=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
    given = (f"--workdir={tmp_path / 'run'}", *SHORT, *place)
    both = [start(*given, f"--process-id={i}", script=(file,)) for i in range(2)]
    both[0].wait(timeout=200)
    done = all_of(both, timeout=60)
    assert done[0].returncode == -signal.SIGKILL
    other = done[1]
    assert other.returncode not in (0, None)
    last = other.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: another process of this run has stopped")
    assert other.stderr.count("error:") == 1 and "***" not in other.stderr
    assert "Traceback" not in other.stderr and " @ 0x" not in other.stderr
    assert saved(tmp_path / "run") in ([], [4])  # whole, or not there


def test_flags_of_one_of_several(capsys):
    import train

    for flags, said in (
        (["--coordinator=a:1"], "`--processes` is missing: write --coordinator=HOST"),
        (["--processes=2", "--process-id=0"], "`--coordinator` is missing"),
        (["--coordinator=a", "--processes=2", "--process-id=0"], "is no HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process-id=2"], "must be 0 to 1"),
        (["--coordinator=a:1", "--processes=0", "--process-id=0"], "at least 1"),
    ):
        assert train.main(flags) == 2
        assert said in capsys.readouterr().err


def test_no_cluster_is_said(tmp_path):
    """In a process of its own: one that has computed can join no other."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TPU", "SLURM"))}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--distributed", f"--workdir={tmp_path}"],
        env=clean | {"PYTHONPATH": str(ROOT), "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "`--distributed` found no cluster to be part of" in done.stderr
    assert "python -m jaxpeft.launch -n 2 train.py" in done.stderr
    assert "Traceback" not in done.stderr
