"""The documentation builds without a warning."""

import subprocess
import sys

from pages_toolbox import ROOT


def test_it_builds(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "docs",
        str(tmp_path / "made"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "made/api/adapters/kasa.html").read_text(encoding="utf-8")
    assert "Notation" in made and "lora_A.weight" in made
