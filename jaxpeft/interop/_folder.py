"""Writing a folder: it appears whole, or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import jax


def check_free(folder: Path) -> None:
    """Raises unless a folder is new or empty; nobody's files are deleted here."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(
            f"`folder` {str(folder)!r} exists and is not empty; choose another."
        )


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a folder beside its place, then moves it there.

    With several processes the first one writes; all must call this.

    Args:
        folder: a new or empty folder.
        write: ``(folder) -> None``.
    """
    if jax.process_index() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        new.mkdir()
        try:
            write(new)
            if folder.is_dir():
                folder.rmdir()
            os.replace(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxpeft.write {folder.name}")
