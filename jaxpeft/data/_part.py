"""What tokenising makes of some rows of a split, and of all parts together."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped
from numpy import ndarray

from jaxpeft.data._bad_rows import GoodRows


class Part(NamedTuple):
    """Some rows as token ids, end to end, and what was counted.

    Attributes:
      ids: of all rows, [tokens].
      lengths: of each row.
      types: as of `Encoded`, [tokens]; None: there are none.
      learn: as of `Encoded`, [tokens]; None: there are none.
      labels: as of `Encoded`, [rows]; None: they follow from `learn`.
      counts: what became of the rows.
      longest: the most tokens of a row, and which one that is.
      notes: of `GoodRows`.
      bad: of `GoodRows`.
      first: of `GoodRows`.
    """

    ids: Int32[ndarray, " tokens"]
    lengths: Int64[ndarray, " rows"]
    types: Int32[ndarray, " tokens"] | None
    learn: Bool[ndarray, " tokens"] | None
    labels: Shaped[ndarray, " rows *columns"] | None
    counts: Counter[str]
    longest: tuple[int, str]
    notes: Counter[str]
    bad: int
    first: str

    @property
    def offsets(self) -> Int64[ndarray, " rows_and_one"]:
        """Where each row begins, and the last one ends."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)


def part_of(
    good: GoodRows,
    ids: Any,
    lengths: Any,
    *,
    types: Any = None,
    learn: Any = None,
    labels: Any = None,
    counts: Any = (),
    longest: tuple[int, str] = (0, ""),
) -> Part:
    """Returns a `Part` of lists; `good` has read its rows."""
    return Part(
        ids=np.asarray(ids, np.int32),
        lengths=np.asarray(lengths, np.int64),
        types=None if types is None else np.asarray(types, np.int32),
        learn=None if learn is None else np.asarray(learn, bool),
        labels=labels,
        counts=Counter(dict(counts)),
        longest=longest,
        notes=good.notes,
        bad=good.bad,
        first=good.first,
    )


def joined(parts: Iterable[Part], good: GoodRows) -> tuple[Part, dict[str, Any]]:
    """Returns parts as one, in their order, and the facts of `good` with theirs.

    Raises:
      ValueError: all rows are bad.
    """
    parts = list(parts)
    for part in parts:
        good.notes += part.notes
        good.bad += part.bad
        good.first = good.first or part.first
    facts = good.facts()  # before there is nothing to join

    def column(field: str) -> Any:
        arrays = [getattr(part, field) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    whole = part_of(
        good,
        column("ids"),
        column("lengths"),
        types=column("types"),
        learn=column("learn"),
        labels=column("labels"),
        counts=sum((part.counts for part in parts), Counter()),
        longest=max((part.longest for part in parts), key=lambda x: x[0]),
    )
    return whole, facts
