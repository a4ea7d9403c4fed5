"""Some rows of a split, and rows one by one."""

import numpy as np

from jaxpeft.data._encoded import Encoded
from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import Task
from jaxpeft.data._texts import TextTask


def unpacked(task: Task | TextTask | MixedTask) -> Task | TextTask | MixedTask:
    """Returns a task whose training rows are not packed: one text a row.

    Args:
      task: any task.

    Returns:
      The same, or with `pack=False`, in all parts of a mixture.

    Example:
      >>> unpacked(task("reasoning_gym/chain_sum")).pack  # doctest: +SKIP
      False
    """
    if isinstance(task, MixedTask):
        return task._replace(parts={n: unpacked(t) for n, t in task.parts.items()})
    return task._replace(pack=False) if isinstance(task, TextTask) else task


def sample(encoded: Encoded, rows: int, *, seed: int = 0) -> Encoded:
    """Returns rows of a split drawn without replacement, in their old order.

    Args:
      encoded: a split, from `jaxpeft.data.tokenize`.
      rows: how many; all, where the split has no more. Of a mixture all tasks' rows
        are drawn alike, however often training draws them.
      seed: of the draw.

    Returns:
      The split with these rows alone.

    Raises:
      ValueError: if `rows` is below 1.

    Example:
      >>> sample(encoded, 500).rows  # doctest: +SKIP
      500
    """
    if rows < 1:
        raise ValueError(f"`rows` must be at least 1, got {rows}.")
    if rows >= encoded.rows:
        return encoded
    kept = np.random.default_rng(seed).choice(encoded.rows, rows, replace=False)
    kept = np.sort(kept)
    sizes = encoded.lengths[kept]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    # Where each kept token was: its row's start, and how far into the row it is.
    starts = np.repeat(encoded.offsets[kept] - offsets[:-1], sizes)
    tokens = starts + np.arange(offsets[-1])
    of = lambda column: None if column is None else column[tokens]
    mixed = encoded.mixed
    if mixed is not None:
        ids = mixed.task_ids[kept]
        counts = np.bincount(ids, minlength=len(mixed.names))
        mixed = mixed._replace(task_ids=ids, quotas=tuple(map(int, counts)))
    return encoded._replace(
        ids=encoded.ids[tokens],
        types=of(encoded.types),
        offsets=offsets,
        labels=encoded.labels[kept],
        learn=of(encoded.learn),
        segments=of(encoded.segments),
        positions=of(encoded.positions),
        mixed=mixed,
    )
