"""A split as token ids."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from numpy import ndarray


class Mixed(NamedTuple):
    """Which rows of a split are of which task, and how often each is drawn.

    Attributes:
      names: of the tasks, in order.
      task_ids: the task of each row, [rows], rising.
      quotas: rows of each task in an epoch; fewer or more than it has.
      label_mask: of tasks with classes, which of all classes are a task's own,
        [tasks, classes]; None for writing tasks.
    """

    names: tuple[str, ...]
    task_ids: Int32[ndarray, " rows"]
    quotas: tuple[int, ...]
    label_mask: Bool[ndarray, "tasks classes"] | None


class Encoded(NamedTuple):
    """One split as token ids, rows end to end, nothing padded yet.

    Attributes:
      name: task and split, "trec/train", for messages.
      ids: token ids of all rows, [tokens].
      types: 0 for tokens of the first text, 1 for the second, [tokens]; None if the
        tokenizer gives no such thing.
      offsets: row i is `ids[offsets[i] : offsets[i + 1]]`, [rows + 1].
      labels: class ids (int32) or scores (float32), [rows]; of a writing task, how
        many tokens of the row are learnt; of held-out choices, a row each, [rows, 5]:
        their tokens, which question they belong to, which of its choices they are, of
        how many, and whether it is the right one (1 or 0).
      pad: the id that fills up short rows.
      max_length: the most tokens a row may have.
      learn: whether a token is to be predicted from those before it, [tokens]; None:
        this is not a writing task. Never true of the first token of a text.
      segments: which text of a packed row a token is of, from 1, [tokens]; None: not
        packed.
      positions: of a token in its own text, [tokens]; None: not packed.
      facts: what became of the rows, JSON-able; None: each is there, cut if need be.
      mixed: how the rows of several tasks are mixed; None: they are of one.
    """

    name: str
    ids: Int32[ndarray, " tokens"]
    types: Int32[ndarray, " tokens"] | None
    offsets: Int64[ndarray, " rows_and_one"]
    labels: Int32[ndarray, " rows *columns"] | Float32[ndarray, " rows"]
    pad: int
    max_length: int
    learn: Bool[ndarray, " tokens"] | None = None
    segments: Int32[ndarray, " tokens"] | None = None
    positions: Int32[ndarray, " tokens"] | None = None
    facts: Mapping[str, Any] | None = None
    mixed: Mixed | None = None

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.labels)

    @property
    def epoch_rows(self) -> int:
        """The number of rows drawn in an epoch."""
        return sum(self.mixed.quotas) if self.mixed else self.rows

    @property
    def lengths(self) -> Int64[ndarray, " rows"]:
        """The number of tokens of each row."""
        return np.diff(self.offsets)
