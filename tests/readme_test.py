"""The README's code runs, and what it promises is there."""

import pathlib
import re
import shlex

import pytest

import jaxpeft as jp

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "trainable" in capsys.readouterr().out
    assert scope["big"]["w"].shape == (32, 4096, 14336)


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:configs|tests|colab)/[\w./]+)`", TEXT)
)
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_every_adapter_has_a_row():
    for name in (n for n in dir(jp.adapters) if not n.startswith("_")):
        if callable(getattr(jp.adapters, name)) and hasattr(jp, name):
            assert f"`jp.{name}`" in TEXT, name


def test_ci_runs_the_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r'\[dev\]" && (.*)', TEXT)
    assert ci.rstrip().endswith("\n" + command)


def test_public_names_have_docstrings():
    for name in (n for n in dir(jp) if not n.startswith("_")):
        thing = getattr(jp, name)
        if callable(thing) and thing.__module__.startswith("jaxpeft"):
            assert thing.__doc__, name


def test_commands_can_be_read():
    from jaxpeft.cli._main import parser

    commands = re.findall(r"^jaxpeft (.*)$", TEXT, re.MULTILINE)
    assert {parser().parse_args(c.split()).command for c in commands} >= {"merge"}


def test_what_commands_name_is_there():
    """Tasks, models and methods of the README's commands, in blocks and in lines."""
    from jaxpeft import data, models
    from jaxpeft.cli._main import parser
    from jaxpeft.study._tiny import TINY

    commands = re.findall(r"(?:^|`)jaxpeft ([a-z]+ [^`\n]+)", TEXT, re.MULTILINE)
    seen = set()
    for command in commands:
        given = vars(parser().parse_args(shlex.split(command)))
        if (task := given.get("task")) and not data.is_file_name(task):
            name = task.partition("/")[0].removeprefix("prompted")
            assert hasattr(data.tasks, name), command
            seen.add("task")
        for model in filter(None, (given.get("model"), given.get("base"))):
            own = model in models.packaged or model == TINY
            assert own or "/" in model, command  # or a folder of the reader's
            seen.add("model")
    assert seen == {"task", "model"} and any("--model tiny" in c for c in commands)
