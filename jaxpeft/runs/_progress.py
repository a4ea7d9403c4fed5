"""What a run shows while it works: a live bar in a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table


@contextlib.contextmanager
def progress(
    total: int, *, done: int = 0, console: rich.console.Console | None = None
) -> Iterator["Progress"]:
    """Shows how far a run is, for as long as the context.

    Args:
        total: steps in the whole run.
        done: steps done before (a resumed run).
        console: where to write; None: standard output. In a terminal or a notebook it
            is a bar that is redrawn, elsewhere one line each :meth:`Progress.show`.

    Yields:
        a :class:`Progress`. On every process but the first it shows nothing.
    """
    console = rich.console.Console() if console is None else console
    live = console.is_terminal or console.is_jupyter
    whole = lambda width: rich.table.Column(no_wrap=True, min_width=width)
    rest = rich.table.Column(no_wrap=True, overflow="ellipsis", ratio=1)
    digits = 2 * len(str(total)) + 1
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", table_column=whole(10)),
        rich.progress.BarColumn(bar_width=12, table_column=whole(12)),
        rich.progress.MofNCompleteColumn(table_column=whole(digits)),
        rich.progress.TextColumn("left", table_column=whole(4)),
        rich.progress.TimeRemainingColumn(table_column=whole(7)),
        rich.progress.TextColumn(
            "{task.fields[values]}", style="cyan", table_column=rest
        ),
        console=console,
        expand=True,
        disable=not live or jax.process_index() != 0,
    )
    with bar:
        yield Progress(bar, total, done)


class Progress:
    """Made by :func:`progress`; keeps the last value of everything it has shown."""

    def __init__(self, bar: rich.progress.Progress, total: int, done: int):
        """See :func:`progress`."""
        self._bar, self._total, self._first = bar, total, done
        self._task = bar.add_task("train", total=total, completed=done, values="")
        self._since = time.monotonic()
        self._values: dict[str, Any] = {}

    def advance(self) -> None:
        """One more step is done."""
        self._bar.advance(self._task)

    def show(self, step: int, **values: Any) -> None:
        """Shows values, ``loss=0.51``; others keep what they showed last."""
        self._values |= values
        text = "  ".join(f"{k} {_short(v)}" for k, v in self._values.items())
        self._bar.update(self._task, completed=step, values=text)
        if self._bar.disable:
            spent = time.monotonic() - self._since
            left = spent / max(step - self._first, 1) * (self._total - step)
            self.note(f"step {step}/{self._total}  {text}  left {clock(left)}")

    def note(self, text: str) -> None:
        """Writes a line that stays, above the bar if there is one."""
        if jax.process_index() == 0:
            self._bar.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Stops redrawing; what follows is written below the bar."""
        self._bar.stop()

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Any]:
        """A second bar for something else, such as an evaluation over ``total`` rows.

        Yields:
            a function that is told how many more are done.
        """
        task = self._bar.add_task(name, total=total, values="")
        try:
            yield lambda count: self._bar.advance(task, count)
        finally:
            self._bar.remove_task(task)


def _short(value: Any) -> str:
    """Three significant digits, thousands with commas; all else as it is.

    Example:
        >>> [_short(v) for v in (0.51234, 2e-5, 12345.6, 7, "sms", 0.0)]
        ['0.512', '2.00e-05', '12,346', '7', 'sms', '0']
    """
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def clock(seconds: float) -> str:
    """Returns a time as people write it.

    Example:
        >>> clock(92.4), clock(3725.0)
        ('1:32', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
