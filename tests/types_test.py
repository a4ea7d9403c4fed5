"""A type checker passes on the tree and on the transform."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def check(*paths, cwd=ROOT):
    command = [sys.executable, "-m", "ty", "check", "--output-format", "concise"]
    command += ["--python", sys.executable, *map(str, paths)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_tree_and_transform_are_well_typed():
    done = check("jaxpeft/tree", "jaxpeft/transform")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_type_is_seen(tmp_path):
    """Control."""
    file = tmp_path / "wrong.py"
    file.write_text("def f(x: int) -> str:\n    return x\n")
    done = check(file, cwd=tmp_path)
    assert done.returncode == 1 and "-return" in done.stdout
