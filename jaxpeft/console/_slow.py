"""A line on stderr while something takes long."""

import sys
import time


class SlowWork:
    """Counted work that says how far it is once it has taken two seconds.

    Args:
        what: is being done, the beginning of the line: ``"attach kasa"``.
        total: how many there are to do.
        unit: what they are: ``"kernels"``.

    Example:
        >>> work = SlowWork("attach kasa", 2, "kernels")
        >>> work(2)  # done so far, two more
        >>> work.close()
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.start = self.last = time.monotonic()
        self.shown = False

    def __call__(self, more: int) -> None:
        """Counts what was done since the last call."""
        self.done += more
        now = time.monotonic()
        if self.done == self.total or now - self.start < 2 or now - self.last < 1:
            return
        self.last, self.shown = now, True
        end = "\r" if sys.stderr.isatty() else "\n"
        self._say(f"{self.done}/{self.total} {self.unit},", end)

    def close(self) -> None:
        """Says what the whole took, where anything was said."""
        if self.shown:
            self._say(f"{self.total} {self.unit} in", " \n")

    def _say(self, how_far: str, end: str) -> None:
        line = f"{self.what}: {how_far} {time.monotonic() - self.start:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)
