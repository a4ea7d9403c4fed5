"""What the README promises is there; its code runs in pages_test.py."""

import pytest
from pages_toolbox import ROOT, text_of

import jaxpeft as jp

TEXT = text_of(ROOT / "README.md")


def test_every_adapter_has_a_row():
    for name in (n for n in dir(jp.adapters) if not n.startswith("_")):
        if callable(getattr(jp.adapters, name)) and hasattr(jp, name):
            assert f"`jp.{name}`" in TEXT, name


def test_ci_runs_the_test_command():
    ci = (ROOT / ".ci" / "run").read_text()
    (line,) = [line for line in TEXT.splitlines() if '[dev]" && ' in line]
    command = line.partition('[dev]" && ')[2]
    assert ci.rstrip().endswith("\n" + command)


def test_public_names_have_docstrings():
    for name in (n for n in dir(jp) if not n.startswith("_")):
        thing = getattr(jp, name)
        if callable(thing) and thing.__module__.startswith("jaxpeft"):
            assert thing.__doc__, name


@pytest.mark.parametrize("page", ["start", "methods", "your_data", "pods", "figures"])
def test_the_documentation_is_linked(page):
    assert f"(docs/{page}.md)" in TEXT
