"""Tokenising in processes of their own: the same parts in the same order, sooner.

What costs is Python, between one call of the tokenizer and the next. So threads gain
nothing (8,000 prompts with completions took two of them as long as one), and processes
share the work: 30,000 took 17.5 s of processor time alone, and 21.4 s of two together,
their imports included, with 0.1 s left for this one. Rows are read here and sent to
them; what is made of a row depends on no other.
"""

import collections
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from jaxpeft.data._part import Part
from jaxpeft.data._task import Rows

# A process takes seconds until it has imported what it needs; in that time a thousand
# rows and more are tokenised.
ROWS_OF_A_WORKER = 20_000
MOST_WORKERS = 8

# (task, split, tokenizer, max_length, numbers of rows) -> what becomes of these
OfRows = Callable[[Any, str, Any, int, Sequence[int]], Part]


def workers_for(rows: int, workers: int | None) -> int:
    """Returns how many processes tokenise so many rows.

    Args:
      rows: how many.
      workers: as many, where it is given; None: as many as pay, of 8 at most.

    Raises:
      ValueError: `workers` is negative.

    Example:
      >>> workers_for(10_000, None), workers_for(10_000, 3)
      (0, 3)
    """
    if workers is not None and workers < 0:
        raise ValueError(f"`workers` must be 0 or more, or None; got {workers}.")
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    pay = min(cores, MOST_WORKERS, rows // ROWS_OF_A_WORKER)
    return pay if pay > 1 else 0


class Workers:
    """Processes that tokenise, for as long as the context; none where none pay.

    Args:
      tokenizer: of all that is tokenised.
      workers: see `workers_for`.

    Raises:
      ValueError: `workers` is negative; or is given, and the tokenizer or a task
        cannot be sent to a process.
    """

    def __init__(self, tokenizer: Any, workers: int | None):
        """None are there before they are needed."""
        workers_for(0, workers)
        self._tokenizer, self._workers = tokenizer, workers
        self._pool: ProcessPoolExecutor | None = None
        self._count = 0

    def __enter__(self) -> "Workers":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes; what they are at is not waited for longer than that."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each_part(
        self,
        of_rows: OfRows,
        task: Any,
        split: str,
        max_length: int,
        chunks: Iterable[range],
    ) -> Iterator[Part]:
        """Yields what `of_rows` makes of each chunk of a split, in order.

        Args:
          of_rows: of a module, not a closure.
          task: the task.
          split: of the task.
          max_length: the most tokens of a row.
          chunks: numbers of rows.

        Raises:
          ValueError: what `of_rows` raises of the first chunk that has a fault.
          RuntimeError: a process has died.
        """
        rows = task.splits[split]
        # Of the task all but its rows: these are sent chunk by chunk.
        bare = task._replace(splits={}, facts={})
        if not self._begun(len(rows), bare):
            for chunk in chunks:
                yield of_rows(task, split, self._tokenizer, max_length, chunk)
            return
        chunks, waiting = iter(chunks), collections.deque()
        try:
            while True:
                for chunk in itertools.islice(chunks, 2 * self._count - len(waiting)):
                    some = _Some(chunk, [_row(rows, n) for n in chunk], len(rows))
                    given = of_rows, bare, split, max_length, chunk, some
                    waiting.append(self._pool.submit(_work, *given))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"a process that tokenised {task.name}/{split} has died: for lack of "
                "memory, or as it could not begin (a program that starts processes "
                'needs if __name__ == "__main__":). Write workers=0, '
                "config.input.workers in a run, and it is done without."
            ) from None

    def _begun(self, rows: int, task: Any) -> bool:
        """Whether there are processes for so many rows; starts them if need be."""
        count = workers_for(rows, self._workers)
        if not count:
            return False
        try:
            sent = pickle.dumps(self._tokenizer)
            pickle.dumps(task)
        except Exception as error:  # whatever their own code raises
            if self._workers is None:
                return False
            raise ValueError(
                f"`workers` {count}: tokenizer or task cannot be sent to another "
                f"process ({error}). Write workers=0, config.input.workers in a run."
            ) from error
        if self._pool is None:
            self._pool, self._count = _started(count, sent), count
        return True


def _started(count: int, sent: bytes) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # JAX has threads: none is forked
    return ProcessPoolExecutor(count, context, initializer=_begin, initargs=(sent,))


def _row(rows: Rows, number: int) -> Any:
    """A row; one that cannot be read is what reading it raises."""
    try:
        return rows[number]
    except ValueError as error:
        return error


class _Some:
    """Some rows of a split, by the numbers that they have in it."""

    def __init__(self, numbers: range, rows: Sequence[Any], total: int):
        self._rows = dict(zip(numbers, rows, strict=True))
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        row = self._rows[number]
        if isinstance(row, ValueError):
            raise row
        return row


_tokenizer: Any = None  # of this process, once it has begun


def _begin(sent: bytes) -> None:
    """Makes a process ready; Ctrl-C is the parent's, without which it is no more."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    jax.config.update("jax_platforms", "cpu")  # accelerators are the parent's
    _tokenizer = pickle.loads(sent)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(
    of_rows: OfRows, task: Any, split: str, max_length: int, numbers: range, rows: _Some
) -> Part:
    task = task._replace(splits={split: rows})
    return of_rows(task, split, _tokenizer, max_length, numbers)
