"""``jaxpeft train``: the package's train.py, for those who have no clone of it."""

import argparse
from collections.abc import Sequence

NAME = "train"
SUMMARY = "fine-tune a model as a config says (train.py)"
DESCRIPTION = """\
Runs the train.py that comes with the package; all arguments are its own, which
`jaxpeft train --help` shows. --config takes a file, or a name of `jaxpeft configs`.
"""
EXAMPLE = 'jaxpeft train --config quickstart --config.adapter="bora(rank=16)"'


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds none: what stands behind the command is for train.py."""


def forward(arguments: Sequence[str]) -> int:
    """Runs train.py with the arguments; returns its exit status."""
    from jaxpeft import runs

    return runs.load_program(runs.shipped_folder() / "train.py").main(arguments)
