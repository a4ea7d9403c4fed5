"""Writing a folder: it appears whole, or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax


def check_free(folder: Path) -> None:
    """Raises unless a folder is new or empty; nobody's files are deleted here."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(
            f"`folder` {str(folder)!r} exists and is not empty; choose another."
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """A folder beside its place, moved there at the end; removed after an error.

    Args:
        folder: a new or empty folder.

    Yields:
        Where to write, in the first process; ``None`` in the others, which must all
        come here too.
    """
    first = jax.process_index() == 0
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") if first else None
    try:
        if new is not None:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
        yield new
        if new is not None:
            if folder.is_dir():
                folder.rmdir()
            os.replace(new, folder)
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxpeft.write {folder.name}")
