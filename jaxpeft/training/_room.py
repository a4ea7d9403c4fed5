"""A disk that is full, or cannot be written any more: said in numbers."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxpeft.training._sealed import from_all_processes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = re.compile("No space left on device|Disk quota exceeded|File too large")
_READ_ONLY_TEXT = re.compile("Read-only file system")


_PROBE = 65_536  # bytes


class NoRoomError(OSError):
    """What a run wanted to write could not be written; the message says how much."""


@contextlib.contextmanager
def told_of_room(
    folder: Path, needed: Callable[[], int], whole: Callable[[], list[int]]
) -> Iterator[None]:
    """Makes one message of whatever a library says of a full disk.

    Args:
        folder: of the checkpoints.
        needed: the bytes of what a checkpoint holds, 0 if that is not known; one that
            is whole shows what it takes on the disk.
        whole: the steps of the checkpoints that are whole.

    Raises:
        NoRoomError: something inside could not be written for lack of room, or as the
            disk cannot be written any more.
    """
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        told = list(_chain(error))
        numbers = {x.errno for x in told if isinstance(x, OSError)}
        says = lambda text: any(text.search(str(x)) for x in told)
        if errno.EROFS in numbers or says(_READ_ONLY_TEXT):
            lack = "cannot be written any more: its file system is read-only now"
        elif numbers & _FULL or says(_FULL_TEXT):
            lack = _lack(folder, needed(), whole())
        else:
            raise
        kept = (
            f"checkpoints {steps} are whole" if (steps := whole()) else "none is kept"
        )
        raise NoRoomError(
            f"{str(folder)!r} {lack}. Of what was saved {kept}; once that is mended, "
            "the same command goes on"
        ) from error


def check_writable(folder: Path) -> None:
    """Raises where not even a small file can be written; all processes call it.

    Orbax would wait minutes for a folder that it could not make.

    Args:
        folder: where the first process tries.

    Raises:
        OSError: on every process.
    """
    fault = None
    if jax.process_index() == 0:
        probe = folder / ".probe"
        try:
            probe.write_bytes(bytes(_PROBE))
        except OSError as error:
            fault = error.errno
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    fault = from_all_processes(fault)[0]
    if fault is not None:
        raise OSError(fault, os.strerror(fault), str(folder))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _taken(folder: Path) -> int:
    """Bytes of the disk that a folder takes: files come in whole blocks."""
    with contextlib.suppress(FileNotFoundError):  # it may just be renamed
        return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*"))
    return 0


def _lack(folder: Path, needed: int, steps: list[int]) -> str:
    needed = max([needed, *(_taken(folder / str(step)) for step in steps)])
    # What an interrupted save has left is removed before the next one.
    free = shutil.disk_usage(folder).free + sum(map(_taken, folder.glob("*tmp*")))
    takes = f"a checkpoint takes {_size(needed)}"
    text = f"has no room left: {_size(free)} are free"
    if needed > free:
        return f"{text}, {takes}: {_size(needed - free)} are missing"
    return f"{text}, {takes}: a quota or a limit is reached" if needed else text


def _size(count: int) -> str:
    """A number of bytes as people write it, never less than there are.

    Example:
        >>> _size(700), _size(1_234_567)
        ('0.1 MB', '1.3 MB')
    """
    return f"{-(-count // 100_000) / 10:,.1f} MB"
