"""Being one of several processes: found, and ended with the others."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax

from jaxpeft.launch._quiet import GONE, quieten

LOST = 4  # the exit status of a process whose run has lost another one
SILENT = 30  # seconds without a sign of life, after which a process counts as dead
# What collectives and the coordination service say when another process has gone.
_GONE = re.compile(
    r"Gloo \w+ failed|Connection (closed|reset) by peer|heartbeat timeout|"
    r"coordination service|CoordinationService|NCCL.*(remote|peer)",
    re.IGNORECASE,
)


class LostError(Exception):
    """Another process of the run has stopped."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    program: str = "train.py",
    quiet: bool = True,
) -> None:
    """Makes this process one of several; the first thing that a program does.

    When one of them dies, all others end within a minute, with one line each.

    Args:
        coordinator: ``HOST:PORT`` of process 0, where the others reach it; a free
            port. With none of the three, they are found as
            ``jax.distributed.initialize`` finds them: on TPU pods, under SLURM, Open
            MPI and Kubernetes.
        processes: how many there are.
        process_id: which one this is, from 0.
        program: who says that another process has stopped.
        quiet: whether what XLA writes of that on standard error, a stack of C++
            calls, is left out.

    Raises:
        ValueError: only some of the three are given, one does not fit, or there is no
            cluster to be found.
        RuntimeError: the others were not reached.

    Example:
        >>> join("localhost:1234", processes=2)
        Traceback (most recent call last):
        ...
        ValueError: `--process-id` is missing: write --coordinator=HOST:PORT ...
    """
    given = {
        "--coordinator": coordinator,
        "--processes": processes,
        "--process-id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError(
            f"`{missing[0]}` is missing: write --coordinator=HOST:PORT "
            "--processes=N --process-id=I, all three, or none of them"
        )
    if not missing:
        _check(coordinator, processes, process_id)
    if quiet:
        quieten(program)
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, heartbeat_timeout_seconds=SILENT
        )
    except ValueError as error:
        if len(missing) < 3 or "defined" not in str(error):
            raise
        raise ValueError(
            "`--distributed` found no cluster to be part of (TPU pod, SLURM, Open MPI, "
            "Kubernetes). On one machine, write python -m jaxpeft.launch -n 2 "
            f"{program} ...; on several, --coordinator=HOST:PORT --processes=N "
            "--process-id=I on each"
        ) from None


def _check(coordinator: str, processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"`--coordinator` {coordinator!r} is no HOST:PORT; write the name of the "
            "first process's machine and a free port of it, node0:1234"
        )
    if processes < 1:
        raise ValueError(f"`--processes` {processes} must be at least 1")
    if not 0 <= process_id < processes:
        raise ValueError(
            f"`--process-id` {process_id} must be 0 to {processes - 1}, one of "
            f"{processes} processes"
        )


@contextlib.contextmanager
def lost() -> Iterator[None]:
    """Turns what an operation says when another process has gone into ``LostError``.

    Raises:
        LostError: as said; with one process everything passes.

    Example:
        >>> with lost():
        ...     total = jax.numpy.ones(3).sum()
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not jax.distributed.is_initialized() or not _GONE.search(str(error)):
            raise
        raise LostError(GONE) from error


def leave(status: int) -> int:
    """Ends one of several processes that has failed, without waiting for the others.

    At its end a process waits for all others, which may wait for this one.

    Args:
        status: the exit status.

    Returns:
        ``status``, where it is 0 or this process has not joined others.

    Example:
        >>> leave(2)
        2
    """
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
