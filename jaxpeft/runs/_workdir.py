"""The folder of a run: one process at a time, one config for good."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from jaxpeft.runs._fields import FIELDS
from jaxpeft.training import (
    WorkdirError,
    as_folder,
    config_differences,
    config_from_json,
    config_to_json,
)

CONFIG_FILE = "config.json"
FRESH_FILE = "config.json.new"
LOCK_FILE = ".lock"


@contextlib.contextmanager
def open_workdir(
    path: str | Path, config: ml_collections.ConfigDict, *, free: Sequence[str] = ()
) -> Iterator[Path]:
    """Makes or reopens the folder of a run and holds it for as long as the context.

    A folder that holds a run of the same config is reopened, so that the same command
    resumes it; a run that fails before it has written anything leaves the folder as it
    found it. The lock is the operating system's (flock on ``.lock`` inside the
    folder): it goes with the process that holds it, even when that is killed, so
    nothing has to be cleaned up after a crash. With several processes, the first one
    decides for all; they must see the same folder.

    Args:
        path: a local (or mounted) folder; made with its parents if it does not exist.
        config: the run's config; written to ``config.json``.
        free: fields and sections of the config that may differ from those of the run
            in the folder, such as ``"mesh"``.

    Yields:
        the folder as an absolute path.

    Raises:
        WorkdirError: a URL instead of a folder; a folder with other things in it; a
            run of another config (the differing fields are listed); another living
            process holds the folder.
    """
    folder = as_folder(path)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    fresh = not (folder / CONFIG_FILE).exists()
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                _check_content(folder, config, free)
                stack.enter_context(_locked(folder))
                _check_content(folder, config, free)  # another may just have written
                _write_config(folder, config)
            except (WorkdirError, OSError) as raised:
                error = raised
        _agree(error, folder)
        try:
            yield folder
        except BaseException:
            if fresh and jax.process_index() == 0:
                _let_go(folder, made)
            raise


def check_workdir(
    path: str | Path, config: ml_collections.ConfigDict, *, free: Sequence[str] = ()
) -> None:
    """Raises where ``open_workdir`` would; makes and writes nothing.

    Args:
        path: as of ``open_workdir``.
        config: the run's config.
        free: as of ``open_workdir``.

    Raises:
        WorkdirError: as of ``open_workdir``.
        OSError: the folder cannot be read, or is one that cannot be written.
    """
    folder, error = as_folder(path), None
    if jax.process_index() == 0:
        try:
            _check_content(folder, config, free)
            _check_free(folder)
            _check_place(folder)
        except (WorkdirError, OSError) as raised:
            error = raised
    _agree(error, folder)


def _check_free(folder: Path) -> None:
    """Raises if a living process holds the folder."""
    if (folder / LOCK_FILE).exists():
        with open(folder / LOCK_FILE, "rb") as file:
            _hold(file.fileno(), folder, fcntl.LOCK_SH)


def _check_place(folder: Path) -> None:
    """Raises if the folder, or the one it would be made in, cannot be written."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise WorkdirError(
            f"`workdir` {str(folder)!r} would lie in {str(there)!r}, a file."
        )
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, "cannot write into", str(there))


def _hold(file: int, folder: Path, how: int) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        # The holder may not have written who it is yet.
        holder = os.read(file, 4096).decode() or "unknown"
        raise WorkdirError(
            f"`workdir` {str(folder)!r} is in use by another living run: {holder}. "
            f"Wait for it, stop it, or give another folder: --workdir=PATH."
        ) from None


def _let_go(folder: Path, made: Sequence[Path]) -> None:
    """Takes a new run's config and lock away, and the folders that were made for it."""
    own = {CONFIG_FILE, LOCK_FILE, FRESH_FILE}
    if any(p.name not in own for p in folder.iterdir()):
        return
    for name in own:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else is using it by now
        for each in made:
            each.rmdir()


def _agree(error: Exception | None, folder: Path) -> None:
    """Raises ``error`` on the first process, and says so on all others."""
    failed = error is not None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if error is not None:
        raise error
    if failed:
        raise WorkdirError(
            f"`workdir` {str(folder)!r} was refused by process 0; its message says why."
        )


def _check_content(
    folder: Path, config: ml_collections.ConfigDict, free: Sequence[str]
) -> None:
    if folder.exists() and not folder.is_dir():
        raise WorkdirError(f"`workdir` {str(folder)!r} is a file; give a folder.")
    held = folder / CONFIG_FILE
    if not held.exists():
        others = {file.name for file in folder.glob("*")} - {LOCK_FILE, FRESH_FILE}
        if others:
            raise WorkdirError(
                f"`workdir` {str(folder)!r} is not empty and holds no run "
                f"({', '.join(sorted(others)[:5])}); give a new folder: --workdir=PATH."
            )
        return
    before = config_from_json(held.read_text())
    differences = config_differences(before, config, free=free)
    if differences:
        listed = "\n  ".join(differences)
        new = [n for n in FIELDS if _has(config, n) and not _has(before, n)]
        raise WorkdirError(
            f"`workdir` {str(folder)!r} holds a run of another config:\n  {listed}\n"
            f"To start this one, give another folder (--workdir=PATH) or delete that "
            "one; "
            + (
                f"that one is of an older jaxpeft, without {', '.join(new)}, and only "
                "that version resumes it."
                if new
                else "to resume that one, put its values back."
            )
        )


def _has(config: ml_collections.ConfigDict, field: str) -> bool:
    section, _, name = field.partition(".")
    return section in config and (not name or name in config[section])


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _hold(file, folder, fcntl.LOCK_EX)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "argv": sys.argv}
        os.ftruncate(file, 0)
        os.write(file, json.dumps(holder).encode())
        yield
    finally:
        os.close(file)  # drops the lock


def _write_config(folder: Path, config: ml_collections.ConfigDict) -> None:
    fresh = folder / FRESH_FILE
    fresh.write_text(config_to_json(config))
    fresh.replace(folder / CONFIG_FILE)  # whole or not at all
