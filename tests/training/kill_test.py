"""Kill -9 a real process at random moments: the weights are those of no kill."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("kill_program.py")
KILLS = 3


def start(folder):
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    with open(folder / "stderr.txt", "a") as errors:
        return subprocess.Popen(
            [sys.executable, PROGRAM, folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )


def finish(process, folder):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (folder / "stderr.txt").read_text()
    return [line for line in out.splitlines() if line.startswith("step")]


@pytest.mark.slow
def test_kill_and_resume_is_bit_exact(tmp_path):
    reference = start(tmp_path / "whole")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # shown when the test fails
    rng = random.Random(seed)
    done, last = [], 0
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        stop = rng.randint(last + 1, min(last + 10, 36))
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1]) >= stop:
                break
        time.sleep(rng.uniform(0.0, 0.15))  # a save takes about 0.1 s
        process.kill()
        process.communicate()
        done.append(process.returncode)
        names = [p.name for p in (tmp_path / "killed/checkpoints").glob("*")]
        print(stop, names)
        last = max([int(name) for name in names if name.isdigit()], default=0)
    assert done == [-9] * KILLS, (tmp_path / "killed/stderr.txt").read_text()
    resumed = finish(start(tmp_path / "killed"), tmp_path / "killed")
    whole = finish(reference, tmp_path / "whole")
    assert len(whole) == 40 and len(resumed) < 40
    assert whole[-len(resumed) :] == resumed
    with (
        np.load(tmp_path / "whole/final.npz") as expected,
        np.load(tmp_path / "killed/final.npz") as found,
    ):
        assert sorted(found) == sorted(expected) and len(found) > 10
        for name in expected:
            assert found[name].tobytes() == expected[name].tobytes(), name
