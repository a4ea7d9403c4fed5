"""The command line of a run."""

import contextlib
import logging
import re
import sys
import traceback as tracebacks
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

from jaxpeft import launch
from jaxpeft.console import Parser, ended
from jaxpeft.runs._config import load_config
from jaxpeft.runs._stop import Stopped, stops_at_sigterm
from jaxpeft.training import WorkdirError, as_folder


class Command(NamedTuple):
    """What a command line asked for.

    Attributes:
        config: the locked config, overrides applied.
        workdir: the run's folder.
        distributed: whether this is one of several processes.
        place: ``(coordinator, processes, process id)`` of it; None: to be found.
        traceback: whether a refusal shows where it was raised.
        dry_run: whether the step is compiled and told of, and nothing is run.
        target: the machine that it is then compiled for; None: this one.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    distributed: bool
    place: tuple[str | None, int | None, int | None]
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
        help="one of several processes, found on TPU pods, under SLURM and MPI",
    )
    parser.add_argument("--coordinator", help="elsewhere: HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process-id", type=int, help="which one this is, from 0")
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
    place = (given.coordinator, given.processes, given.process_id)
    several = given.distributed or any(x is not None for x in place)
    if several and given.dry_run:
        parser.error(
            "--dry-run compiles for all devices in one process; leave out "
            "what makes it one of several"
        )
    return Command(
        config,
        Path(folder),
        several,
        place,
        given.traceback,
        given.dry_run,
        given.target,
    )


def obey(
    command: Command, run: Callable[[ml_collections.ConfigDict, Path], object]
) -> int:
    """Joins the other processes, where there are any, and runs; returns the status.

    Args:
        command: what was asked for.
        run: ``(config, workdir)``, what to do.

    Returns:
        as of ``ended``; 0 also where SIGTERM stopped the run, and ``launch.LOST`` (4)
        where another process has gone. One of several that has failed ends the program
        here.
    """
    if not command.traceback:
        # Orbax writes down with a stack what it raises later, and each signal.
        said = lambda record: record.levelno >= logging.ERROR and not record.exc_info
        logging.getLogger("absl").addFilter(said)

    def start() -> None:
        with contextlib.ExitStack() as stack:
            if command.distributed:
                launch.join(*command.place, quiet=not command.traceback)
            else:
                stack.enter_context(stops_at_sigterm())
            run(command.config, command.workdir)

    try:
        status = ended(
            "train.py",
            start,
            traceback=command.traceback,
            interrupted="stopped; the same command goes on after the last checkpoint",
        )
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(f"train.py: {stopped}", file=sys.stderr)
        status = 0
    except launch.LostError as error:
        if command.traceback:
            tracebacks.print_exception(error)
        print(f"train.py: error: {error}", file=sys.stderr)
        status = launch.LOST
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        tracebacks.print_exc()  # a fault of the program
        status = 1
    return launch.leave(status)
