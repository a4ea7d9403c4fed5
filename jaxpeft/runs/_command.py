"""The command line of a run."""

import re
import traceback as tracebacks
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections

from jaxpeft.console import Parser
from jaxpeft.runs._config import load_config
from jaxpeft.training import WorkdirError, as_folder


class Command(NamedTuple):
    """What a command line asked for.

    Attributes:
        config: the locked config, overrides applied.
        workdir: the run's folder.
        distributed: whether this is one of several processes.
        traceback: whether a refusal shows where it was raised.
        dry_run: whether the step is compiled and told of, and nothing is run.
        target: the machine that it is then compiled for; None: this one.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    distributed: bool
    traceback: bool
    dry_run: bool = False
    target: str | None = None


def parse_command(
    argv: Sequence[str] | None, default_config: str | Path, *, description: str = ""
) -> Command:
    """Reads ``--config``, ``--workdir``, ``--config.FIELD=VALUE`` and the like.

    An unknown argument ends the program with status 2 and one line.

    Args:
        argv: the arguments; None: those of the program.
        default_config: the config where none is given.
        description: shown by ``--help``.

    Returns:
        a :class:`Command`. Without ``--workdir`` the folder is ``runs/`` and the name
        of the config: ``runs/glue_kasa-task-rte`` for ``glue_kasa.py:task=rte``.
    """
    parser = Parser(
        prog="train.py",
        description=description,
        epilog="--config.FIELD=VALUE replaces one value of the config.",
    )
    parser.add_argument(
        "--config",
        default=str(default_config),
        help="a Python file with get_config(), as FILE or FILE:argument=value",
    )
    parser.add_argument(
        "--workdir", help="the run's folder (default: runs/NAME-OF-THE-CONFIG)"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, which jax.distributed.initialize() finds",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what a step needs (jaxpeft estimate); nothing is read or run",
    )
    parser.add_argument("--target", help="with --dry-run: for which machine, v5e:4x4")
    given, others = parser.parse_known_args(argv)
    if given.target and not given.dry_run:
        parser.error("--target is for --dry-run; write both")
    prefix = "--config."
    for item in others:
        if not item.startswith(prefix):
            parser.error(f"unknown argument {item!r}; write {prefix}FIELD=VALUE")
    name = Path(given.config).name.replace(".py", "", 1)
    folder = given.workdir or Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    try:
        as_folder(folder)  # objects while it is as it was written
        overrides = [item.removeprefix(prefix) for item in others]
        config = load_config(given.config, overrides)
    except (ValueError, WorkdirError) as error:
        if given.traceback:
            tracebacks.print_exception(error)
        parser.error(str(error).removesuffix("."))
    return Command(
        config,
        Path(folder),
        given.distributed,
        given.traceback,
        given.dry_run,
        given.target,
    )
