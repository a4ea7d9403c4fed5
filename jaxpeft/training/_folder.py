"""Paths of folders that runs and their checkpoints can be kept in."""

import os
from pathlib import Path

# Checkpoints are found by patterns (orbax): in a folder whose name is itself a pattern
# they are written and not found again, or another folder's are taken for them. Its
# other end takes "gs:/" anywhere, and these roots, for a bucket's.
PATTERNS = ("*", "?", "[", "\\", "gs:/")
BUCKETS = ("/gs/", "/s3/", "/az/", "/hf/")
LONGEST = 3500  # bytes of a path: what is written inside needs some, of Linux's 4095


class WorkdirError(RuntimeError):
    """The folder cannot be used for this run; the message says what to do."""


def as_folder(path: str | Path, argument: str = "workdir") -> Path:
    r"""Returns the absolute path of a folder that can hold a run and its checkpoints.

    Args:
        path: of the folder, which need not be there; ``~`` is the home folder.
        argument: what ``path`` is called in a message.

    Returns:
        The path.

    Raises:
        WorkdirError: a URL, a path that is too long, or one with a character that
            checkpoints are not found behind.

    Example:
        >>> as_folder("/runs/50%").name
        '50%'
        >>> as_folder("runs/[new]")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        jaxpeft.training._folder.WorkdirError: `workdir` 'runs/[new]' has '[' in ...
    """
    if "://" in str(path):
        raise WorkdirError(
            f"`{argument}` {str(path)!r} is a URL; give a folder. A bucket can be "
            f"mounted as one (gcsfuse, mountpoint-s3)."
        )
    folder = Path(path).expanduser().absolute()
    found = [part for part in PATTERNS if part in f"{folder}/"]
    found += [root for root in BUCKETS if f"{folder}/".startswith(root)]
    if found:
        raise WorkdirError(
            f"`{argument}` {str(path)!r} has {found[0]!r} in its path, behind which "
            "checkpoints would not be found again; give a folder without any of "
            f"{' '.join(PATTERNS)}, and not below {' '.join(BUCKETS)}"
        )
    length = len(os.fsencode(folder))
    if length > LONGEST:
        raise WorkdirError(
            f"`{argument}` has a path of {length} bytes, {str(path)[:60]!r}...; give "
            f"one of at most {LONGEST}."
        )
    return folder
