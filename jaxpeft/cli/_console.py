"""Progress and notes on standard error; results alone go to standard output."""

import contextlib
import sys
import time
from collections.abc import Iterator


def note(text: str) -> None:
    """Writes a line to standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(text: str) -> Iterator[None]:
    """Shows that something takes its time: a spinner in a terminal, then one line.

    Args:
        text: what is being done, ``"reading minilm"``.
    """
    from rich.console import Console
    from rich.text import Text

    started = time.perf_counter()
    with Console(stderr=True).status(Text(text)):
        yield
    note(f"{text}: {time.perf_counter() - started:.1f} s")
