"""What a task is: rows in splits, which columns mean what, and how it is scored."""

import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxpeft.data.metrics._direction import metric_mode


@runtime_checkable
class Rows(Protocol):
    """A source: a random-access sequence of rows, each a mapping from column to value.

    A list of dicts is one, and so is what `tfds.data_source` or a Grain source gives.
    Text may be str or UTF-8 bytes.
    """

    def __len__(self) -> int:
        """Returns the number of rows."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Returns row `index`, counted from 0."""


class Task(NamedTuple):
    """A task: what to read, what to predict, and how the prediction is scored.

    Make one with `jaxpeft.data.task`, or from rows of your own with
    `jaxpeft.data.make_task`, which checks it.

    Attributes:
      name: short name, for reports and messages.
      text: the one or two columns the model reads.
      label: the column it predicts.
      labels: class names in the order of their ids; None if the label is a number to
        regress on.
      metrics: names out of `jaxpeft.data.metrics`; the first is the one that decides
        which checkpoint is best.
      splits: rows by split, at least "train" and "validation".
      facts: where the rows come from and what was dropped, JSON-able, for reports.
      bad_rows: "raise": a row that is not as it should be is an error; "skip": it is
        left out and counted (`facts` of `jaxpeft.data.tokenize`).
    """

    name: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    splits: Mapping[str, Rows]
    facts: Mapping[str, Any]
    bad_rows: str = "raise"

    @property
    def regression(self) -> bool:
        """Whether the label is a number, not a class."""
        return self.labels is None

    @property
    def head(self) -> str:
        """The head of the model for it."""
        return "regression" if self.regression else "classification"

    @property
    def best(self) -> dict[str, str]:
        """The score that says which checkpoint is best, and whether by max or min."""
        return {"metric": self.metrics[0], "mode": metric_mode(self.metrics[0])}

    @property
    def num_labels(self) -> int:
        """The width of the model's head: the number of classes, 1 for a number."""
        return 1 if self.labels is None else len(self.labels)


BAD_ROWS = ("raise", "skip")
CLASSIFICATION_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION_METRICS = ("pearson", "spearman")


def make_task(
    name: str,
    splits: Mapping[str, Rows],
    *,
    text: str | Sequence[str],
    label: str,
    labels: Sequence[str | int] | None,
    metrics: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    bad_rows: str = "raise",
) -> Task:
    """Returns the `Task` with these rows, columns and labels, checked.

    Args:
      name: short name, for reports and messages.
      splits: rows by split; "train" and "validation" must be there.
      text: the column the model reads, or a pair of columns.
      label: the column it predicts.
      labels: class names in the order of their ids; whole numbers are taken for the
        names that they read as. None for regression.
      metrics: names out of `jaxpeft.data.metrics`, the deciding one first; None means
        accuracy for classes, Pearson and Spearman for regression.
      facts: where the rows come from, JSON-able.
      bad_rows: "raise", the first row without its columns, its text or a label of the
        task is an error; "skip", such rows are left out and counted.

    Returns:
      The task. Its columns are looked for in the first row of each split here, and in
      every row, with its label, by `jaxpeft.data.tokenize`.

    Raises:
      ValueError: on an empty or absent split, a column that is not there, fewer than
        two or repeated class names, a metric that is unknown or of the other kind.

    Example:
      >>> rows = [{"text": "what fun", "mood": "good"}, {"text": "oh", "mood": "bad"}]
      >>> task = make_task(
      ...     "moods",
      ...     {"train": rows, "validation": rows},
      ...     text="text",
      ...     label="mood",
      ...     labels=["bad", "good"],
      ... )
      >>> task.num_labels, task.metrics
      (2, ('accuracy',))
    """
    columns = (text,) if isinstance(text, str) else tuple(text)
    if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
        raise ValueError(
            f"`text` is one column or a pair of different ones; got {columns}."
        )
    if labels is not None:
        given = labels
        if not isinstance(labels, str):  # stars, 1 to 5: names that read like numbers
            labels = tuple(str(x) if _is_whole(x) else x for x in labels)
        named = not isinstance(labels, str) and all(isinstance(x, str) for x in labels)
        if not named or len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(
                f"`labels` of task {name!r} must be two or more different class names; "
                f"got {given!r}. For a number to regress on, write labels=None."
            )
    allowed = REGRESSION_METRICS if labels is None else CLASSIFICATION_METRICS
    if metrics is None:
        metrics = REGRESSION_METRICS if labels is None else ("accuracy",)
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    kind = "regression" if labels is None else "classification"
    check_parts(name, kind, metrics, allowed, splits, (*columns, label), bad_rows)
    facts = dict(facts or {})
    return Task(name, columns, label, labels, metrics, splits, facts, bad_rows)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_parts(
    name: str,
    kind: str,
    metrics: Sequence[str],
    allowed: Sequence[str],
    splits: Mapping[str, Rows],
    columns: Sequence[str],
    bad_rows: str,
) -> None:
    """Raises unless a task has known metrics and splits with rows and columns."""
    check_bad_rows(bad_rows)
    for metric in metrics or ("",):
        if metric not in allowed:
            raise ValueError(
                f"`metrics` of the {kind} task {name!r} has {metric!r}; it must name "
                f"one or more of {', '.join(allowed)}."
            )
    for split in ("train", "validation"):
        if split not in splits:
            raise ValueError(
                f"`splits` of task {name!r} must have {split!r}; got {list(splits)}."
            )
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"Split {split!r} of task {name!r} is empty: no rows.")
        for column in columns if bad_rows == "raise" else ():
            value_of(rows[0], column, f"task {name!r}, split {split!r}, row 0")


def check_bad_rows(bad_rows: str) -> None:
    """Raises unless it says what becomes of bad rows."""
    if bad_rows not in BAD_ROWS:
        raise ValueError(f"`bad_rows` must be one of {BAD_ROWS}; got {bad_rows!r}.")


def value_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """Returns the row's value in a column; `where` names the row in the error."""
    if column not in row:
        near = near_misses(column, row)
        raise ValueError(f"{where} has no column {column!r}.{near}")
    if row[column] is None:
        raise ValueError(f"{where} has no value in column {column!r}.")
    return row[column]


def near_misses(name: Any, names: Any) -> str:
    """Returns the end of an error message: what there is, and the nearest of it."""
    names = [str(n) for n in names]
    near = difflib.get_close_matches(str(name), names, n=3)
    nearest = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{nearest} There is: {listed(names)}."


def listed(names: Sequence[str], most: int = 200) -> str:
    """Returns names with commas, and of very many how many are left out."""
    more = f", ... and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
