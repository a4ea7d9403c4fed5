"""docs/pods.md: its blocks run, its commands are read, its table is the results'."""

import json
import pathlib
import re
import shlex
import subprocess

import pytest
from pages_toolbox import blocks, run_blocks

from benchmarks import estimates_table
from jaxpeft import runs
from jaxpeft.cli._main import parser

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pods.md"
TEXT = PAGE.read_text()
SHELL = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)


def test_the_table_is_that_of_the_results():
    rows = json.loads(estimates_table.RESULTS.read_text())["rows"]
    said = "python -m benchmarks.estimates_table writes it anew"
    assert estimates_table.with_table(TEXT, rows) == TEXT, said
    assert all(row["case"].replace("/", ", ") in TEXT for row in rows)


def test_rows_of_the_table():
    row = {"case": "8b/lora/v5e:4x4", "mesh": {"data": 1, "fsdp": 8, "tensor": 2}}
    row |= dict(base=1.07e9, adapters=6e7, optimizer=1.2e8, temporaries=None)
    row |= dict(peak=3.8e9, memory=2**34, fits=False)
    row |= dict(step_seconds=0.5705, tokens_per_second_per_device=3589.9)
    *_, line = estimates_table.table([row]).splitlines()
    cells = "8b, lora, v5e:4x4 | fsdp 8 x tensor 2 | 1.07 | 0.18 | - | 3.80"
    assert line == f"| {cells} | 17.18: does not fit | 0.57 | 3,590 |"
    page = "before\n<!-- estimates: how -->\nold\n<!-- end -->\nafter"
    made = estimates_table.with_table(page, [row])
    assert line in made and "old" not in made and made.endswith("end -->\nafter")
    assert estimates_table.with_table(made, [row]) == made
    with pytest.raises(ValueError, match="`page` has no <!-- estimates"):
        estimates_table.with_table("nothing", [row])


def test_python_blocks_run(tmp_path, monkeypatch):
    scope = run_blocks(PAGE, tmp_path, monkeypatch)
    assert len(blocks(TEXT, "python")) == 2 and scope["config"].mesh.fsdp == 8
    assert scope["state"] == {"next_index": 1} and (scope["host"]["x"] == 0).all()


@pytest.mark.parametrize("block", SHELL)
def test_shell_blocks_are_shell(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_our_commands_can_be_read(monkeypatch):
    """Those of train.py, wherever they stand, and those of jaxpeft."""
    monkeypatch.chdir(ROOT)
    text = "\n".join(SHELL).replace("\\\n", " ")
    ours = re.findall(r"^jaxpeft (.*)$", text, re.MULTILINE)
    for command in ours:
        given, others = parser().parse_known_args(shlex.split(command))
        assert given.command == "estimate"
        fields = [each.removeprefix("--config.") for each in others]
        runs.check_fields(runs.load_config(given.config, fields))
    trained = re.findall(r"\btrain\.py ([^\"\n]*)", text)
    for command in trained:
        read = runs.parse_command(shlex.split(command), "configs/quickstart.py")
        runs.check_fields(read.config)
        sizes = read.config.mesh.fsdp * read.config.mesh.tensor
        assert read.config.batch_size % sizes == 0
    assert len(ours) == 3 and len(trained) == 9
    launched = re.findall(r"python -m jaxpeft\.launch (.*)", text)
    assert [shlex.split(each)[:2] for each in launched] == [["-n", "2"]]


def test_what_it_names_is_there():
    for path in re.findall(r"`?((?:configs|colab|benchmarks)/[\w.]+\.\w+)", TEXT):
        assert (ROOT / path).exists(), path
    named = re.findall(r"config\.((?:input|log|mesh)\.\w+)", TEXT)
    for field in named:
        assert field in runs.FIELDS or field.startswith("mesh."), field
    assert "docs/pods.md" in (ROOT / "README.md").read_text()
