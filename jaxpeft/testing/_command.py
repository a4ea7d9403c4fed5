"""``python -m jaxpeft.testing my_package:my_method``: the suite, for one method."""

import os
from collections.abc import Sequence
from pathlib import Path

from jaxpeft.console import Parser, ended, optional
from jaxpeft.testing import _named
from jaxpeft.testing._settings import use_strict_settings

PROGRAM = "python -m jaxpeft.testing"
SUITE = ("_contract.py", "_edges.py", "_beside.py")

DESCRIPTION = """\
Runs the contract suite for one method of any package: what every method must do, at its
start, in training, in stacks and on several devices, in files, beside another method on
one kernel. Imports the module, and takes the constructor that is decorated with
@jaxpeft.tree.method. Whatever else is written goes to pytest.
"""
EPILOG = """\
The suite's kernels are 16 and 24 wide: a constructor's rank, experts and domains are
chosen small where it has them, and all else is its default.

examples:
  python -m jaxpeft.testing my_package:my_method
  python -m jaxpeft.testing my_package.file:my_method --option rank=2 -x -k merge
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite.

    Args:
        arguments: of the command line.

    Returns:
        The exit status: pytest's, or 2 where the method cannot be tested.
    """
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("method", metavar="PACKAGE:METHOD")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the constructor; may be given again for another",
    )
    asked, rest = parser.parse_known_args(arguments)

    def check() -> None:
        use_strict_settings()  # before the module may compute something
        with optional("Contract tests"):
            import pytest  # noqa: F401
        _named.read_options(_named.load(asked.method), asked.option)

    status = ended(PROGRAM, check, traceback=asked.traceback)
    return status or _run(asked.method, asked.option, rest)


def _run(method: str, options: Sequence[str], rest: Sequence[str]) -> int:
    with optional("Contract tests"):
        import pytest
    here = Path(__file__).parent
    return int(
        pytest.main(
            [
                # Whatever project stands around it, its settings are not the suite's.
                *("-c", os.devnull, "--rootdir", str(here), "--noconftest"),
                *("-o", f"cache_dir={Path.cwd() / '.pytest_cache'}"),
                # What came with this module is loaded before pytest can rewrite it.
                *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
                *("-p", "jaxpeft.testing._plugin", "--contract-method", method),
                *(f"--contract-option={option}" for option in options),
                *rest,
                *(str(here / name) for name in SUITE),
            ]
        )
    )
