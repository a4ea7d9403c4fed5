"""Batches of a few shapes; batch i is a pure function of the seed and i.

Nothing is remembered from batch to batch. An epoch's batches are planned whole, from
an order that the seed and the epoch's number alone decide; so the state of a run is
one number, any batch can be made again, and a resumed run reads the very bytes that a
run never stopped would have read.

All processes make the same plan and each reads its own slice of every batch: at every
step all have the same shape, and their slices put together are the batch of one
process.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from jaxpeft.console import optional
from jaxpeft.data._encoded import Encoded, Mixed

# One batch of a plan: the rows in it and the length they are padded to.
_Planned = tuple[Integer[ndarray, " _"], int]


def batches(
    encoded: Encoded,
    batch_size: int,
    *,
    seed: int,
    lengths: Sequence[int] | None = None,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Any:
    """Returns the training batches of a split, shuffled anew each epoch.

    Rows of like length stand together: each is padded to the smallest of `lengths`
    that holds it, and what does not fill a batch moves up to the next. An epoch has
    `batches_per_epoch` batches, whatever the lengths; the rows % batch_size rows that
    would not fill the last one sit this epoch out, others the next time. Of a mixture
    of tasks an epoch has each task's quota of rows; none comes again before all others
    of its task have come.

    Args:
      encoded: the split, from `jaxpeft.data.tokenize`.
      batch_size: rows in a batch of all processes together.
      seed: of the shuffling; a whole number from 0 to 2**64 - 1.
      lengths: rising token counts to pad to; None: 32, 64, 128, ... `max_length`.
      epochs: how many; None: no end.
      process_index: which slice of each batch to read; None: `jax.process_index()`.
      process_count: how many slices there are; None: `jax.process_count()`.

    Returns:
      A `grain.MapDataset`: `ds[i]` is batch i, `iter(ds)` an iterator with
      `get_state()` (a small JSON-able dict) and `set_state(state)`, `ds.map(...)`
      transforms. A batch is a dict of numpy arrays:

      - input_ids: int32, [rows, length].
      - attention_mask: int32, [rows, length], 1 on tokens, 0 on padding.
      - token_type_ids: int32, [rows, length]; only if the tokenizer gives them.
      - label: int32 or float32, [rows]; of a writing task, its learnt tokens.
      - targets: int32, [rows, length], the token after each; and
      - target_weights: float32, [rows, length], 1 where that is to be learnt, else 0;
        both only of a writing task.
      - segment_ids: int32, [rows, length], from 1, 0 on padding; and
      - positions: int32, [rows, length], of tokens in their own text; both only of a
        packed split.
      - task_id: int32, [rows], which task of a mixture; and
      - label_mask: bool, [rows, classes], which classes are that task's, where it has
        classes; both only of a mixture.

    Raises:
      ValueError: if the batch is larger than the split or is not divisible among the
        processes, or a row is longer than every length.

    Example:
      >>> iterator = iter(batches(encoded, 32, seed=0))  # doctest: +SKIP
      >>> batch, state = next(iterator), iterator.get_state()  # doctest: +SKIP
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be a whole number from 0; got {seed!r}.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"`epochs` must be at least 1, or None; got {epochs}.")
    share = _share(batch_size, process_index, process_count)
    each = batches_per_epoch(encoded, batch_size)
    sizes = _row_sizes(encoded, lengths)
    # Two epochs at most, since a reader's threads may stand on both sides of a border.
    # No lru_cache: this function must pickle, for readers in other processes.
    recent: list[tuple[int, list[_Planned]]] = []

    def batch(index: int) -> dict[str, ndarray]:
        epoch, position = divmod(int(index), each)
        plan = dict(recent).get(epoch)
        if plan is None:
            plan = _plan_epoch(encoded, sizes, batch_size, seed, epoch)
            recent[:] = [(epoch, plan), *recent[:1]]
        rows, length = plan[position]
        return _gather(encoded, rows[share], length)

    return _dataset(sys.maxsize if epochs is None else epochs * each, batch)


def batches_per_epoch(encoded: Encoded, batch_size: int) -> int:
    """Returns how many full batches a split has, the number of steps of an epoch.

    Args:
      encoded: the split.
      batch_size: rows in a batch of all processes together.

    Returns:
      rows of an epoch // batch_size.

    Raises:
      ValueError: if not even one batch can be filled.

    Example:
      >>> batches_per_epoch(encoded, 32)  # doctest: +SKIP
    """
    rows = encoded.epoch_rows
    if not 1 <= batch_size <= rows:
        raise ValueError(
            f"`batch_size` {batch_size} must lie between 1 and the {rows} rows of "
            f"{encoded.name}."
        )
    return rows // batch_size


def evaluation_batches(
    encoded: Encoded,
    batch_size: int,
    *,
    lengths: Sequence[int] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Any:
    """Returns batches that hold every row of a split exactly once, in a fixed order.

    Args:
      encoded: the split, from `jaxpeft.data.tokenize`.
      batch_size: rows in a batch of all processes together.
      lengths: as in `batches`.
      process_index: as in `batches`.
      process_count: as in `batches`.

    Returns:
      A `grain.MapDataset` of known length. Its batches are those of `batches`, with
        valid: bool, [rows]; False on rows that only fill up the last batch. They are
          copies of a real row, so that nothing about them is degenerate; leave them
          out of every sum and metric.

    Raises:
      ValueError: if the batch is not divisible among the processes, or a row is longer
        than every length.

    Example:
      >>> for batch in evaluation_batches(encoded, 64):  # doctest: +SKIP
      ...     logits = forward(batch)[batch["valid"]]
    """
    share = _share(batch_size, process_index, process_count)
    sizes = _row_sizes(encoded, lengths)
    plan = _plan(np.arange(encoded.rows), sizes, batch_size)

    def batch(index: int) -> dict[str, ndarray]:
        rows, length = plan[index]
        # Shorter than the batch only in the last one.
        filled = np.pad(rows, (0, batch_size - len(rows)), mode="edge")
        valid = np.arange(batch_size) < len(rows)
        return {**_gather(encoded, filled[share], length), "valid": valid[share]}

    return _dataset(len(plan), batch)


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to: 32, doubled up to `max_length`.

    Args:
      max_length: the most tokens a row may have.

    Returns:
      Rising lengths; the last is `max_length`.

    Example:
      >>> bucket_lengths(128), bucket_lengths(100), bucket_lengths(20)
      ((32, 64, 128), (32, 64, 100), (20,))
    """
    lengths = [max_length]
    length = 32
    while length < max_length:
        lengths.append(length)
        length *= 2
    return tuple(sorted(lengths))


def _dataset(count: int, batch: Callable[[int], dict[str, ndarray]]) -> Any:
    # Not at the top: it takes longer to import than all else here.
    with optional("Batches"):
        import grain

    return grain.MapDataset.range(count).map(batch)


def _share(batch_size: int, index: int | None, count: int | None) -> slice:
    """Returns which rows of every batch this process reads."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(
            f"`process_index` must lie between 0 and {count - 1}; got {index}."
        )
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"`batch_size` {batch_size} is not divisible among {count} processes; the "
            f"nearest that is: {max(count, round(batch_size / count) * count)}."
        )
    each = batch_size // count
    return slice(index * each, (index + 1) * each)


def _row_sizes(
    encoded: Encoded, lengths: Sequence[int] | None
) -> Integer[ndarray, " rows"]:
    """Returns the length each row is padded to by itself."""
    chosen = bucket_lengths(encoded.max_length) if lengths is None else tuple(lengths)
    if not chosen or min(chosen) < 1 or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"`lengths` must be rising token counts; got {chosen}.")
    longest = int(encoded.lengths.max())
    if longest > chosen[-1]:
        raise ValueError(
            f"`lengths` ends at {chosen[-1]}, but {encoded.name} has a row of "
            f"{longest} tokens. Tokenise with max_length={chosen[-1]}, or end "
            f"`lengths` with {longest}."
        )
    return np.asarray(chosen)[np.searchsorted(chosen, encoded.lengths)]


def _plan_epoch(
    encoded: Encoded,
    sizes: Integer[ndarray, " rows"],
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[_Planned]:
    draws = _draws(seed, epoch, encoded.epoch_rows * 2)
    order = np.argsort(draws[: encoded.epoch_rows], kind="stable")
    if encoded.mixed:
        order = _drawn(encoded.mixed, seed, epoch)[order]
    plan = _plan(order[: len(order) // batch_size * batch_size], sizes, batch_size)
    shuffled = np.argsort(draws[len(order) :][: len(plan)], kind="stable")
    return [plan[i] for i in shuffled]  # else the short rows would come first


def _drawn(mixed: Mixed, seed: int, epoch: int) -> Integer[ndarray, " epoch_rows"]:
    """Returns the rows of a mixture's epoch, in no useful order.

    A task's rows are shuffled again and again, one shuffle after the other; an epoch
    takes the next quota of them.
    """
    drawn = []
    for task, quota in enumerate(mixed.quotas):
        rows = np.arange(*np.searchsorted(mixed.task_ids, [task, task + 1]))
        first, last = epoch * quota // len(rows), -(-(epoch + 1) * quota // len(rows))
        shuffles = [
            rows[np.argsort(_draws(seed, i, len(rows), task=task), kind="stable")]
            for i in range(first, last)
        ]
        start = epoch * quota - first * len(rows)
        drawn.append(np.concatenate([rows[:0], *shuffles])[start : start + quota])
    return np.concatenate(drawn)


def _draws(
    seed: int, epoch: int, count: int, task: int = -1
) -> Integer[ndarray, " count"]:
    # The raw stream of a bit generator, sorted: numpy keeps that the same for ever,
    # and says of Generator.permutation that it may change between versions.
    counter = np.array([0, 0, 0, task + 1], np.uint64)  # streams that never meet
    key = np.array([seed, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _plan(
    order: Integer[ndarray, " some"], sizes: Integer[ndarray, " rows"], batch_size: int
) -> list[_Planned]:
    """Cuts rows into batches by length, shortest first; only the last may be short."""
    plan = []
    waiting = order[:0]
    for length in np.unique(sizes[order]):
        rows = np.concatenate([waiting, order[sizes[order] == length]])
        full = len(rows) // batch_size * batch_size
        plan += [(part, int(length)) for part in rows[:full].reshape(-1, batch_size)]
        waiting = rows[full:]
    if len(waiting):
        plan.append((waiting, int(length)))
    return plan


def _gather(
    encoded: Encoded, rows: Integer[ndarray, " rows"], length: int
) -> dict[str, ndarray]:
    """Reads rows and pads them, on the right, to one length."""
    column = np.arange(length)[None, :]
    mask = column < encoded.lengths[rows][:, None]
    # Where there is no token, any index does that lies inside.
    where = np.where(mask, encoded.offsets[rows][:, None] + column, 0)
    batch = {
        "input_ids": np.where(mask, encoded.ids[where], np.int32(encoded.pad)),
        "attention_mask": mask.astype(np.int32),
    }
    if encoded.types is not None:
        batch["token_type_ids"] = np.where(mask, encoded.types[where], np.int32(0))
    if encoded.segments is not None:
        batch["segment_ids"] = np.where(mask, encoded.segments[where], np.int32(0))
        batch["positions"] = np.where(mask, encoded.positions[where], np.int32(0))
    if encoded.learn is not None:
        follows = column + 1 < encoded.lengths[rows][:, None]
        after = np.where(follows, where + 1, 0)
        batch["targets"] = np.where(follows, encoded.ids[after], np.int32(0))
        learnt = follows & encoded.learn[after]
        batch["target_weights"] = learnt.astype(np.float32)
    batch["label"] = encoded.labels[rows]
    if encoded.mixed:
        batch["task_id"] = encoded.mixed.task_ids[rows]
        if encoded.mixed.label_mask is not None:
            batch["label_mask"] = encoded.mixed.label_mask[batch["task_id"]]
    return batch
