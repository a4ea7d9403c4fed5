"""A line on stderr while something takes long."""

import sys
import time


class Progress:
    """A line on stderr for trees whose attachment takes more than two seconds."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.done = name, total, 0
        self.start = self.last = time.monotonic()
        self.shown = False

    def __call__(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        if self.done == self.total or now - self.start < 2 or now - self.last < 1:
            return
        self.last, self.shown = now, True
        end = "\r" if sys.stderr.isatty() else "\n"
        line = (
            f"attach {self.name}: {self.done}/{self.total} kernels, "
            f"{now - self.start:.0f} s"
        )
        print(line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            seconds = time.monotonic() - self.start
            print(
                f"attach {self.name}: {self.total} kernels in {seconds:.0f} s ",
                file=sys.stderr,
            )
