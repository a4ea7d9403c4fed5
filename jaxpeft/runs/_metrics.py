"""What a run writes down: one JSON line an event, TensorBoard, time and memory."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxpeft.console import optional
from jaxpeft.training import Checkpointer, NonFiniteError, TrainState, check_finite

METRICS_FILE = "metrics.jsonl"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class MetricsWriter:
    """Appends events to ``metrics.jsonl`` and to TensorBoard files beside it.

    Every line is one event, ``{"event": "train", "step": 20, "time": 1.7e9, ...}``,
    and is on disk when :meth:`write` returns. Numbers that JSON does not know are
    written as the strings "nan", "inf" and "-inf". Only the first process writes.

    Args:
        folder: the run's folder.
        after: the step the run resumes from. Events of later steps, written by a run
            that was killed after its last checkpoint, are dropped, so that every step
            appears once; so is a half-written last line. None: a new run, and a file
            that is there already is an error.
        again: the event of step ``after`` that will be written anew; None: none.
        tensorboard: whether numbers also go to ``tensorboard/``.

    Raises:
        ValueError: ``after`` is None and the folder has a metrics file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after: int | None,
        again: str | None = None,
        tensorboard: bool = True,
    ):
        """See the class."""
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        path = folder / METRICS_FILE
        if path.exists():
            if after is None:
                raise ValueError(
                    f"`after` is None but {str(path)!r} exists; give the step to go on "
                    f"from, or delete the file."
                )
            anew = lambda e: e["step"] == after and e["event"] == again
            kept = [e for e in read_metrics(folder) if e["step"] <= after]
            _rewrite(path, [e for e in kept if not anew(e)])
        self._file = open(path, "a", encoding="utf-8")
        if tensorboard:
            with optional("TensorBoard's files"):
                import tensorboardX

            self._board = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=None if after is None else after + 1,
                # The file's own name has whole seconds only: a quick restart would
                # write over it.
                filename_suffix=f".{time.time_ns()}",
            )

    def write(self, event: str, step: int, **values: Any) -> None:
        """Writes one event; numbers and strings, or lists and dicts of them."""
        if self._file is None:
            return
        values = jax.tree.map(_plain, values)
        line = {"event": event, "step": step, "time": time.time()} | values
        print(json.dumps(line, allow_nan=False), file=self._file, flush=True)
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{event}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()

    def __enter__(self) -> "MetricsWriter":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes both files."""
        self.close()


def _plain(value: Any) -> Any:
    """An array scalar as a Python number; a number JSON does not know as a string."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _rewrite(path: Path, events: list[dict[str, Any]]) -> None:
    fresh = path.with_suffix(".new")
    with open(fresh, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_metrics(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Returns the events of a run, in the order they were written.

    Args:
        folder: the run's folder.
        event: only events of this name; None: all.

    Returns:
        one dict a line. A last line that was cut off by a kill is left out.

    Raises:
        ValueError: a line before the last one is not JSON.
    """
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"line {number} of {str(folder / METRICS_FILE)!r} is not JSON: {line!r}"
            ) from error
    return [e for e in events if event in (None, e["event"])]


class Stopwatch:
    """Time and tokens per training step, without the time spent elsewhere.

    Steps are asynchronous: call :meth:`lap` only where the values of the last step
    have been fetched. Time in which XLA compiled is counted apart, and
    :meth:`restart` after an evaluation or a checkpoint leaves those out.

    Example:
        >>> watch = Stopwatch()
        >>> for _ in range(3):
        ...     with watch.waiting():
        ...         batch = "the next one"
        ...     watch.count(tokens=512)
        >>> sorted(watch.lap())
        ['compile_seconds', 'input_wait', 'step_seconds', 'tokens_per_second']
    """

    def __init__(self):
        """Starts the first lap."""
        self.restart()

    def restart(self) -> None:
        """Starts a lap, forgetting the steps since the last one."""
        self._since = time.perf_counter()
        self._compiled = compile_seconds()
        self._steps = self._tokens = 0
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of this context as waiting for the next batch."""
        since = time.perf_counter()
        yield
        self._waited += time.perf_counter() - since

    def count(self, *, tokens: int) -> None:
        """Counts one step over ``tokens`` tokens of all processes, padding left out."""
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> dict[str, float]:
        """Ends the lap and starts the next.

        Returns:
            ``step_seconds`` (mean of the lap), ``tokens_per_second`` (without padding)
            and ``compile_seconds`` (all of this process up to now).

        Raises:
            ValueError: no step was counted.
        """
        if not self._steps:
            raise ValueError("no step in this lap: call count(tokens=...) every step.")
        spent = time.perf_counter() - self._since
        running = max(spent - (compile_seconds() - self._compiled), 1e-9)
        lap = {
            "step_seconds": running / self._steps,
            "tokens_per_second": self._tokens / running,
            "input_wait": min(self._waited / running, 1.0),
            "compile_seconds": compile_seconds(),
        }
        self.restart()
        return lap


_compiled = [0.0]  # seconds, of this process


def _add_compile_time(event: str, duration: float, **_: Any) -> None:
    if event == COMPILE_EVENT:
        _compiled[0] += duration


jax.monitoring.register_event_duration_secs_listener(_add_compile_time)


def compile_seconds() -> float:
    """Returns the seconds XLA has compiled in this process since this import."""
    return _compiled[0]


def memory() -> dict[str, int]:
    """Returns the peak memory of this process so far, in bytes.

    Returns:
        ``host_peak_bytes`` (resident set); where the device reports it (GPU, TPU) also
        ``device_peak_bytes``, the largest over this process's devices.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"host_peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return found | ({"device_peak_bytes": max(peaks)} if peaks else {})


def stop_if_not_finite(
    state: TrainState, checkpoints: Checkpointer, writer: MetricsWriter
) -> None:
    """Ends a run some update of which was not finite; writes down that it did.

    Args:
        state: the state.
        checkpoints: the run's; the last one is kept.
        writer: for the ``stopped`` event.

    Raises:
        NonFiniteError: it says which update, and which checkpoint is left.
    """
    try:
        check_finite(state)
    except NonFiniteError as error:
        checkpoints.wait()
        told = error.keeping(checkpoints.latest)
        writer.write("stopped", told.step, reason=str(told))
        raise told from None
