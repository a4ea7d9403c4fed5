"""SIGKILL at random moments: the weights at the end are those of a run without.

    python -m benchmarks.kills
    python -m benchmarks.kills --kills 20 --json benchmarks/results/kills.json

``tests/training/kill_program.py`` trains a small network for 40 steps, saves after each
and resumes from what it finds. It is killed at a moment that is drawn from the seconds
that a start and all its steps take, so also while it starts and while it saves, and is
started again; one that comes to its end before all kills are done begins anew. At the
end every array of weights and moments has the bits of the run that was never killed.
"""

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PROGRAM = Path(__file__).parents[1] / "tests/training/kill_program.py"


def start(folder: Path) -> subprocess.Popen:
    """Starts the program on two devices of the CPU."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, PROGRAM, folder],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "stderr.txt", "a"),
    )


def finish(folder: Path) -> dict[str, bytes]:
    """Runs the program to its end; returns the bytes of each array."""
    process = start(folder)
    if process.wait():
        raise SystemExit((folder / "stderr.txt").read_text())
    with np.load(folder / "final.npz") as found:
        return {name: found[name].tobytes() for name in found}


def killed(folder: Path, seconds: float) -> dict[str, object] | None:
    """Starts the program and kills it after so long; None: it had ended before."""
    process = start(folder)
    try:
        process.wait(timeout=seconds)
        return None
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    names = [p.name for p in (folder / "checkpoints").glob("*")]
    steps = sorted(int(name) for name in names if name.isdigit())
    return {
        "after_seconds": round(seconds, 2),
        "checkpoints": steps,
        "while_saving": any("tmp" in name for name in names),
    }


def main() -> None:
    """Kills, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    rng, kills, runs = random.Random(given.seed), [], 1
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place) / "whole", Path(place) / "killed"
        since = time.monotonic()
        expected = finish(whole)
        takes = time.monotonic() - since
        while len(kills) < given.kills:
            kill = killed(folder, rng.uniform(0.2, 1.0) * takes)
            if kill is None:
                shutil.rmtree(folder)
                runs += 1
            else:
                kills.append(kill)
                print(kill, flush=True)
        found = finish(folder)
    same = found.keys() == expected.keys() and all(
        found[name] == expected[name] for name in expected
    )
    report = {
        "command": f"python -m benchmarks.kills --kills {given.kills} "
        f"--seed {given.seed}",
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "orbax-checkpoint")
        },
        "kills": kills,
        "killed_while_saving": sum(kill["while_saving"] for kill in kills),
        "runs": runs,
        "arrays": len(expected),
        "bit_equal": same,
    }
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "kills"}, indent=1))
    if not same:
        raise SystemExit("the weights differ from those of the run that was not killed")


if __name__ == "__main__":
    main()
