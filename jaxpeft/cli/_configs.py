"""``jaxpeft configs``: what comes with the package, and what was measured with it."""

import argparse
import textwrap

NAME = "configs"
SUMMARY = "list the configs that come with the package, and what was measured with them"
DESCRIPTION = """\
Lists the configs that `jaxpeft train --config NAME` and the other commands take by
name: what each one is, where its file lies, and what was measured with it.
"""
EXAMPLE = "jaxpeft configs"
INDENTS = ("initial_indent", "subsequent_indent")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one whole")


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxpeft import runs

    found = {config.name: config for config in runs.shipped_configs()}
    if given.name is not None:
        if given.name not in found:
            near = runs.near_names(given.name, list(found)) or sorted(found)
            raise ValueError(f"NAME {given.name!r} is no config; nearest: {near}.")
        print(found[given.name].file.read_text(encoding="utf-8"), end="")
        return
    for config in found.values():
        print(f"{config.name}: {config.title}")
        if config.claim:
            print(textwrap.fill(config.claim, 88, **dict.fromkeys(INDENTS, "    ")))
    print(f"\n{runs.shipped_folder() / 'configs'}")
