"""``jaxpeft COMMAND ...``: what it understands, and how it ends."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.cli import (
    _compare,
    _configs,
    _convert,
    _describe,
    _dimension,
    _estimate,
    _generate,
    _merge,
    _predict,
    _ranks,
    _train,
)
from jaxpeft.console import Parser, ended, keep_compiled

COMMANDS = (
    *(_train, _configs, _describe, _merge, *_convert.DIRECTIONS),
    *(_generate, _predict, _ranks, _dimension, _estimate, _compare),
)

EPILOG = """\
An adapter is a folder: jaxpeft's own (adapter.json) or HF PEFT's (adapter_config.json).
A base is a folder with config.json and safetensors, a packaged model ("minilm"), or a
name on the Hugging Face hub. Nothing is ever overwritten.

An adapter names its base, which --base need not say then; a run of train.py is as good
as the adapter in it.

example:
  jaxpeft export runs/quickstart --out quickstart-peft
"""


def parser() -> argparse.ArgumentParser:
    """The parser, with one sub-parser for each command."""
    top = Parser(
        prog="jaxpeft",
        description="Adapters of jaxpeft and of HF PEFT: look, merge, convert, run.",
        epilog=EPILOG,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"example:\n  {command.EXAMPLE}",
            default=argparse.SUPPRESS,  # or it would undo one before the command
        )
        command.arguments(one)
        if command is not _train:
            one.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; ``None``: those of the program.

    Returns:
        0; 2 where what was given cannot be done (one message on standard error, with a
        traceback after ``--traceback`` alone); 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == [_train.NAME]:  # train.py reads its arguments itself
        return _train.forward(arguments[1:])
    top = parser()
    given, others = top.parse_known_args(arguments)
    fields = [item for item in others if item.startswith("--config.")]
    if others and (fields != others or "overrides" not in given):
        top.error(f"unrecognized arguments: {' '.join(others)}")
    if fields:
        given.overrides = [item.removeprefix("--config.") for item in fields]

    def run() -> None:
        kept = keep_compiled()
        if kept.failed:
            print(f"jaxpeft: {kept.said}", file=sys.stderr)
        given.run(given)

    return ended(
        "jaxpeft",
        run,
        traceback=given.traceback,
        reword=lambda text: _in_flags(text, vars(given)),
    )


# Errors of the library name its arguments, and show calls of it; here they are flags.
_FLAGS = {
    "check_base=False": "--any-base",
    "untie=True": "--untie",
    "ignore=['target_modules']": "--ignore target_modules",
    "--workdir=PATH": "--out DIR",
    "`workdir`": "--out",
    "overflow='drop_demos'": "--overflow drop_demos",
    "label_tokens='none'": "--label-tokens none",
    "label_tokens='bare'": "--label-tokens bare",
    "`estimators`": "--estimator",
    "`ranks.before.": "`--option ",
    "`ranks.before`": "--method",
    "form='portable'": "the form portable",
    "form='native'": "the form native",
    "form='auto'": "the form peft",
    "`prompts`": "PROMPT",
    "`folder` ": "",
}


def _in_flags(text: str, given: Mapping[str, Any]) -> str:
    """A message of the library in the words of a command line."""
    flags = {f"`{name}`": f"--{name.replace('_', '-')}" for name in given}
    model = "--base" if "base" in given else "--model"
    for argument, flag in (flags | _FLAGS | {"`folder_or_name`": model}).items():
        text = text.replace(argument, flag)
    return text
