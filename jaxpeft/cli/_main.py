"""``jaxpeft COMMAND ...``: what it understands, and how it ends."""

import argparse
from collections.abc import Sequence

from jaxpeft.cli import (
    _convert,
    _describe,
    _dimension,
    _generate,
    _merge,
    _predict,
    _ranks,
)
from jaxpeft.cli._console import note

COMMANDS = (
    *(_describe, _merge, *_convert.DIRECTIONS),
    *(_generate, _predict, _ranks, _dimension),
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
    top = argparse.ArgumentParser(
        prog="jaxpeft",
        description="Adapters of jaxpeft and of HF PEFT: look, merge, convert, run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        one = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(one)
        one.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; ``None``: those of the program.

    Returns:
        0; 2 where what was given cannot be done (one message on standard error, no
        traceback); 130 after Ctrl-C.
    """
    given = parser().parse_args(argv)
    try:
        given.run(given)
    except ImportError as error:
        note(f"jaxpeft: error: {error}. Write: pip install 'jaxpeft[train]'")
    except (ValueError, OSError, RuntimeError) as error:
        note(f"jaxpeft: error: {_in_flags(str(error))}")
    except KeyboardInterrupt:
        note("jaxpeft: stopped; nothing was written")
        return 130
    else:
        return 0
    return 2


# Errors of the library name its arguments; here they are flags.
_FLAGS = {
    "`max_new_tokens`": "--max-new-tokens",
    "`temperature`": "--temperature",
    "`top_k`": "--top-k",
    "`top_p`": "--top-p",
    "check_base=False": "--any-base",
    "untie=True": "--untie",
    "ignore=['target_modules']": "--ignore target_modules",
    "`budget`": "--budget",
    "--workdir=PATH": "--out DIR",
    "`workdir`": "--out",
    "`shots`": "--shots",
    "`demos`": "--demos",
    "`overflow`": "--overflow",
    "overflow='drop_demos'": "--overflow drop_demos",
    "`label_tokens`": "--label-tokens",
    "label_tokens='none'": "--label-tokens none",
    "label_tokens='bare'": "--label-tokens bare",
    "`max_length`": "--max-length",
    "`batch_size`": "--batch-size",
    "`estimators`": "--estimator",
    "`template`": "--template",
    "`words`": "--words",
    "`final`": "--final",
    "`layer`": "--layer",
    "`rank`": "--rank",
    "`allocation.": "`--option ",
    "`allocation`": "--method",
    "form='portable'": "the form portable",
    "form='native'": "the form native",
    "form='auto'": "the form peft",
}


def _in_flags(text: str) -> str:
    for argument, flag in _FLAGS.items():
        text = text.replace(argument, flag)
    return text
