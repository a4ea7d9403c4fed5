"""Two processes of four devices each are one process of eight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("processes_program.py")


def run(folder, steps, processes):
    """Runs the program in so many processes at once; returns what each printed."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.replace("count=8", f"count={8 // processes}"),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": os.pathsep.join(map(str, (PROGRAM.parents[2], PROGRAM.parent))),
    }
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, folder, str(steps), str(i), str(processes)]
            + [str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    results = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, results, strict=True):
        assert process.returncode == 0, err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    (one,) = run(tmp_path / "one", 5, 1)
    first, second = run(tmp_path / "two", 3, 2)
    assert first == second  # every process sees every row and every number
    np.testing.assert_allclose(first["losses"], one["losses"][:3], rtol=1e-5)
    assert len(first["rows"]) == 16
    # What two processes saved, one goes on from.
    (resumed,) = run(tmp_path / "two", 5, 1)
    assert resumed["got"] == {"next": 3}
    np.testing.assert_allclose(resumed["losses"], one["losses"][3:], rtol=1e-5)
    np.testing.assert_allclose(resumed["weights"], one["weights"], atol=1e-4)
    np.testing.assert_allclose(resumed["rows"], one["rows"], atol=1e-4)
    assert resumed["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)
    assert len(set(one["losses"])) == 5
    # A decoder whose vocabulary and tokens are cut, too.
    wanted, found = (np.load(tmp_path / n / "decoder.npz") for n in ("one", "two"))
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=1e-6)
    for path in wanted.files:
        off = np.linalg.norm(found[path] - wanted[path])
        assert off <= 1e-5 * np.linalg.norm(wanted[path]), path
    assert len(wanted.files) > 20
