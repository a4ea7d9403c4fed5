"""Processes that are started together and end together; what they say is tested."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxpeft import launch
from jaxpeft.launch import _quiet, _start

ROOT = Path(__file__).parents[2]


def file(tmp_path, text):
    (tmp_path / "program.py").write_text("import os, signal, sys, time\n" + text)
    return str(tmp_path / "program.py")


INDEX = "index = int(sys.argv[-1].removeprefix('--process-id='))\n"


def test_each_is_told_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = file(tmp_path, INDEX + "open(f'{index}', 'w').write(' '.join(sys.argv))")
    assert launch.main(["-n", "2", program, "-n", "7", "--traceback", "--help"]) == 0
    first, second = ((tmp_path / str(i)).read_text().split()[1:] for i in range(2))
    assert first[:4] == ["-n", "7", "--traceback", "--help"]  # these are the program's
    assert first[:-1] == second[:-1] and first[-2] == "--processes=2"
    assert first[-3].startswith("--coordinator=127.0.0.1:")
    assert [first[-1], second[-1]] == ["--process-id=0", "--process-id=1"]


def test_when_one_fails_the_others_are_ended(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(_start, "GRACE", 0.2)
    text = INDEX + "index or time.sleep(60)\nsys.exit(3)"
    since = time.monotonic()
    assert launch.main(["-n", "2", file(tmp_path, text)]) == 3
    text = INDEX + "index and time.sleep(60)\nos.kill(os.getpid(), signal.SIGKILL)"
    assert launch.main(["-n", "2", file(tmp_path, text)]) == 128 + 9
    assert time.monotonic() - since < 30
    said = "python -m jaxpeft.launch: process 0 was ended by SIGKILL\n"
    assert capfd.readouterr().err == said


def test_sigterm_reaches_all(tmp_path):
    text = """
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
os.write(1, b"up\\n")
while not told:
    time.sleep(0.01)
"""
    command = [sys.executable, "-m", "jaxpeft.launch", "-n", "2", file(tmp_path, text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0 and lines == ["up\n"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.py"], "the following arguments are required: -n/--processes"),
        (["-n", "0", "train.py"], "argument -n: got 0; give 1 or more"),
        (["-n", "2"], "no file '' to start"),
        (["-n", "2", "no.py", "x"], "no file 'no.py' to start"),
    ],
)
def test_a_mistake_ends_it_with_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        launch.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_gpus_are_dealt_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5,6")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    text = INDEX + "open(f'{index}', 'w').write(os.environ['JAX_LOCAL_DEVICE_IDS'])"
    assert launch.main(["-n", "2", file(tmp_path, text)]) == 0
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == ["0,1", "2,3"]
    with pytest.raises(SystemExit):
        launch.main(["-n", "3", file(tmp_path, text)])
    assert "`-n` 3 does not divide the 4 GPUs" in capsys.readouterr().err


def test_what_goes_through_the_filter():
    """Of C++'s text, what tells of a lost process alone is left out."""
    head = "E1130 13:32:46.410075   31418"
    text = f"""W1130 13:32:45.410075   31418 compile.cc:12] slow
{head} coordination_service.cc:1549] Use error polling:
1
{head} another.cc:7] kept
of two lines
{head} client.h:80] Terminating process because the JAX distributed service detected fatal errors.
*** Check failure stack trace: ***
    @     0x7f904f240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""  # noqa: E501
    command = [sys.executable, "-S", "-E", "-c", _quiet._FILTER, "one line"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.stderr.splitlines() == [
        "W1130 13:32:45.410075   31418 compile.cc:12] slow",
        f"{head} another.cc:7] kept",
        "of two lines",
        "one line",
    ]


def test_a_lost_process_is_told_from_other_faults(monkeypatch):
    from jax import distributed

    text = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
    for joined, said, expected in (
        (True, text, launch.LostError),
        (True, "shapes differ", ValueError),
        (False, text, ValueError),
    ):
        monkeypatch.setattr(distributed, "is_initialized", lambda j=joined: j)
        with pytest.raises(expected), launch.lost():
            raise ValueError(said)


# One of two processes, the last of which is no more after a moment.
TOGETHER = """
import logging, os, signal, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from jaxpeft import launch
from jaxpeft.launch import _join

_join.SILENT = 5
index, coordinator, computes = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "computes"
launch.join(coordinator, 2, index)
try:
    with launch.lost():
        for step in range(300):
            if step < 3 or computes:
                multihost_utils.process_allgather(np.ones(2))
            if (step, index) == (3, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)
    status = 0
except launch.LostError as error:
    print(f"train.py: error: {error}", file=sys.stderr)
    status = launch.LOST
sys.exit(launch.leave(status))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "status"), [("computes", launch.LOST), ("waits", -signal.SIGABRT)]
)
def test_a_process_ends_when_the_other_has_been_killed(tmp_path, does, status):
    """In Python where it computes with the other, and by the service where not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(index), place, does],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = both[0].communicate(timeout=60)[1]
    finally:
        for process in both:
            process.kill()
            process.wait()
            process.stderr.close()
    assert [process.returncode for process in both] == [status, -signal.SIGKILL]
    lines = [line for line in said.splitlines() if "error" in line]
    assert lines == [f"train.py: error: {_quiet.GONE}"]
    assert "Traceback" not in said and "***" not in said and "@ 0x" not in said
