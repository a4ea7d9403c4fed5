"""Starting several processes of one program on this machine, and ending them."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxpeft.console import INTERRUPTED, Parser

GRACE = 10  # seconds in which the others end by themselves, before they are killed


def start(command: Sequence[str], processes: int) -> list[subprocess.Popen]:
    """Starts a Python program so many times, told how they find each other.

    Each is given ``--coordinator``, ``--processes`` and ``--process-id``. GPUs of the
    machine are dealt out to them.

    Args:
        command: the program and its arguments.
        processes: how many.

    Returns:
        the processes, in the order of their numbers.

    Raises:
        ValueError: GPUs cannot be dealt out evenly.

    Example:
        >>> [process.wait() for process in start(["-c", "pass"], 1)]
        [0]
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gpus = _gpus()
    if gpus % processes:
        raise ValueError(
            f"`-n` {processes} does not divide the {gpus} GPUs that are visible; "
            "write a divisor, or set CUDA_VISIBLE_DEVICES"
        )
    each, started = gpus // processes, []
    for index in range(processes):
        own = ",".join(str(index * each + i) for i in range(each))
        place = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
        started.append(
            subprocess.Popen(
                [sys.executable, *command, *place, f"--process-id={index}"],
                env=os.environ | ({"JAX_LOCAL_DEVICE_IDS": own} if own else {}),
            )
        )
    return started


def _gpus() -> int:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([x for x in visible.split(",") if x.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _wait(started: Sequence[subprocess.Popen]) -> int | None:
    """Waits for all; once one has failed, the others have ``GRACE`` seconds left.

    Returns:
        the number of the first that failed, if one did.
    """
    first, until = None, None
    try:
        while any(process.poll() is None for process in started):
            failed = [i for i, process in enumerate(started) if process.poll()]
            if failed and until is None:
                first, until = failed[0], time.monotonic() + GRACE
            if until is not None and time.monotonic() > until:
                break
            time.sleep(0.05)
        failed = [i for i, process in enumerate(started) if process.poll()]
        return first if first is not None else next(iter(failed), None)
    except KeyboardInterrupt:  # the terminal has told all of them
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(p.poll() is None for p in started):
            time.sleep(0.05)
        raise
    finally:
        for process in started:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, starts the processes and waits for them.

    SIGTERM is passed on to all of them. When one fails the others are ended.

    Args:
        argv: the arguments; None: those of the program.

    Returns:
        the exit status: 0, or that of the first that failed (128 and the signal's
        number, if one ended it).
    """
    parser = Parser(
        prog="python -m jaxpeft.launch",
        description="Starts a program as several processes on this machine.",
        epilog="example: python -m jaxpeft.launch -n 2 train.py --workdir runs/two",
    )
    parser.add_argument(
        "-n", "--processes", type=int, required=True, help="how many processes"
    )
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, help="a Python file, and its arguments"
    )
    given = parser.parse_args(argv)
    if given.processes < 1:
        parser.error(f"argument -n: got {given.processes}; give 1 or more")
    if not given.program or not Path(given.program[0]).is_file():
        parser.error(f"no file {' '.join(given.program[:1])!r} to start")
    started: list[subprocess.Popen] = []
    told: list[int] = []

    def tell(*_):
        told.append(1)
        for process in started:
            process.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        started += start(given.program, given.processes)
        if told:  # while they were being started
            tell()
        first = _wait(started)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if first is None:
        return 0
    status = started[first].returncode
    if status < 0:  # it could not say anything itself
        name = signal.Signals(-status).name
        print(f"{parser.prog}: process {first} was ended by {name}", file=sys.stderr)
    return 128 - status if status < 0 else status
