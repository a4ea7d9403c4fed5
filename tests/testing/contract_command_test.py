"""``python -m jaxpeft.testing``: what it refuses, and what it needs.

That it runs the suite is seen in ``tests/interop/own_method_test.py``.
"""

import subprocess
import sys

import pytest

from jaxpeft.testing import _named
from jaxpeft.testing._command import main


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["lora"], "its name, got 'lora'; write python -m jaxpeft.testing my_package:"),
        (["jaxpeft.adapters:"], "its name, got 'jaxpeft.adapters:'"),
        (["jaxpeft.adapters:loar"], "has no 'loar'; its methods: ['lora', "),
        (["jaxpeft.no_room:lora"], "there is no module 'jaxpeft.no_room' where Python"),
        (["no_such_package.x:lora"], "there is no module 'no_such_package' where"),
        (["jaxpeft.tree:merge"], "decorate the function that returns the Adapter with"),
        (["jaxpeft.tree:DEFAULT"], "is not the constructor of a method, but str"),
        (["jaxpeft.adapters:lora", "--option", "rank"], "write --option rank=2"),
        (["jaxpeft.adapters:lora", "--option", "rnak=2"], "lora has no option 'rnak'"),
        ([], "the following arguments are required: PACKAGE:METHOD"),
    ],
)
def test_what_cannot_be_tested_is_said(arguments, said, capsys):
    try:
        status = main(arguments)
    except SystemExit as ended:  # argparse's
        status = ended.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_module_that_lacks_another_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "needs_more.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["needs_more:mine"]) == 2
    told = capsys.readouterr().err
    assert "'needs_more' imports 'no_such_package', which is not installed" in told


def test_options_are_literals_or_texts():
    lora = _named.load("jaxpeft.adapters:lora")
    given = ["rank=2", "dropout=0.5", "init=gaussian", "alpha=None"]
    expected = {"rank": 2, "dropout": 0.5, "init": "gaussian", "alpha": None}
    assert _named.read_options(lora, given) == expected


def test_pytest_is_needed_by_the_command_alone():
    code = """
import sys
sys.modules["pytest"] = None  # as if it were not installed
import jaxpeft.testing
from jaxpeft.testing._command import main
sys.exit(main(["jaxpeft.adapters:lora"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "`pytest`: pip install 'jaxpeft[testing]'" in done.stderr, done.stderr
