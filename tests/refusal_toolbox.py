"""What is asked of every refusal, whoever refuses."""

import contextlib
import os
from pathlib import Path

import jax
import jax.monitoring

COMPILES = []  # one entry a program that was compiled, or taken from a cache


def _heard(event: str, duration: float, **_) -> None:
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILES.append(event)


jax.monitoring.register_event_duration_secs_listener(_heard)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: its size, and when it was last written."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path)] = (about.st_size, about.st_mtime_ns) * (not path.is_dir())
    return found


def status_of(main, argv) -> int:
    try:
        return main([str(word) for word in argv])
    except SystemExit as stopped:  # argparse
        return stopped.code


@contextlib.contextmanager
def standing_in(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def assert_refused(main, argv, named, *, folder, capsys, compiles=False):
    """One message that names what is wrong, status 2, nothing compiled or written.

    Args:
        main: of the program.
        argv: what it is given, in ``folder``.
        named: words of which the message has one.
        folder: where nothing may change.
        capsys: of pytest.
        compiles: whether a key may have been made (what is wrong is in the weights).
    """
    before, compiled = listing(folder), len(COMPILES)
    capsys.readouterr()
    with standing_in(folder):
        status = status_of(main, argv)
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert "Traceback" not in err and "Traceback" not in out
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert len(lines) == 1, err
    message = err[err.index(lines[0]) :]
    assert any(word in message for word in named), (named, message)
    assert len(message) < 3000, f"{len(message)} characters: {message[:300]}"
    assert compiles or len(COMPILES) == compiled, "something was compiled"
    assert listing(folder) == before
