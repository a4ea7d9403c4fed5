"""Rows one by one; what becomes of those that are not as the task says."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxpeft.data._task import Rows


def good_rows(task: Any, split: str) -> "GoodRows":
    """The rows of a task's split, bad ones treated as the task says."""
    what = f"Task {task.name!r}, split {split!r}"
    return GoodRows(task.splits[split], what, task.bad_rows)


def good_splits(
    name: str,
    splits: Mapping[str, Rows],
    one: Callable[[Any, str, Counter[str]], Any],
    bad_rows: str,
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Returns what ``one`` makes of each row of some splits, and facts of bad ones.

    Args:
      name: of the task.
      splits: its rows, as they are read.
      one: as for `GoodRows.read`.
      bad_rows: as for `GoodRows`.
    """
    found: dict[str, list[Any]] = {}
    bad: dict[str, Any] = {}
    for split, rows in splits.items():
        good = GoodRows(rows, f"Task {name!r}, split {split!r}", bad_rows)
        found[split] = [row for _, row in good.read(range(len(rows)), one)]
        if facts := good.facts():
            bad[split] = facts
    return found, {"bad_rows": bad} if bad else {}


class GoodRows:
    """The rows of a split that can be read, and what there is to say of them.

    Args:
      rows: the rows.
      what: task and split, for messages: "Task 'sums', split 'train'".
      bad_rows: "raise" raises the error of the first bad row; "skip" leaves bad rows
        out and counts them; "named" raises it without the advice to leave rows out,
        for rows that somebody asks about.
    """

    def __init__(self, rows: Rows, what: str, bad_rows: str):
        self.rows, self.what, self.bad_rows = rows, what, bad_rows
        self.bad, self.first = 0, ""
        self.notes: Counter[str] = Counter()

    def read(
        self,
        numbers: Iterable[int],
        one: Callable[[Any, str, Counter[str]], Any],
    ) -> Iterator[tuple[int, Any]]:
        """Yields the number of each good row, and ``one(row, where, notes)``.

        A row is bad where that is a ``ValueError``. What it counts in ``notes`` is
        among the facts.
        """
        for number in numbers:
            notes: Counter[str] = Counter()
            try:
                found = one(self.rows[number], f"{self.what}, row {number}", notes)
            except ValueError as error:
                if self.bad_rows == "named":
                    raise
                if self.bad_rows == "raise":
                    raise ValueError(
                        f"{error} To leave such rows out, give the task "
                        "bad_rows='skip'."
                    ) from error
                self.bad, self.first = self.bad + 1, self.first or str(error)
                continue
            self.notes += notes
            yield number, found

    def facts(self) -> dict[str, Any]:
        """What was counted, and of bad rows how many, and what the first one lacks.

        Raises:
          ValueError: all rows are bad.
        """
        if self.bad and self.bad == len(self.rows):
            raise ValueError(
                f"{self.what}: none of its {self.bad} rows can be read. {self.first}"
            )
        bad = {"bad_rows": self.bad, "first_bad_row": self.first} if self.bad else {}
        return {**self.notes, **bad}
