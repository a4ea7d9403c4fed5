"""Several tasks as one: their shares, their classes in one head, all their scores."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from jaxpeft.data._encoded import Encoded, Mixed
from jaxpeft.data._score import score
from jaxpeft.data._task import Rows, Task, near_misses
from jaxpeft.data._texts import TextTask


class MixedTask(NamedTuple):
    """Several tasks that one model learns together.

    Make one with `jaxpeft.data.mix`, which checks it. Of tasks with classes the model
    has one head for all classes of all tasks; a row is asked about those of its own
    task alone. Training rows are mixed; all others are scored task by task.

    Attributes:
      name: short name, for reports and messages.
      parts: the tasks by name, in order.
      temperature: how equal their shares are, see `mixture_shares`.
      cap: the most rows of a task that count for its share; None: all.
      only: the tasks whose rows are trained on; the others are evaluated alone.
      facts: of each task, JSON-able, for reports.
    """

    name: str
    parts: Mapping[str, Task | TextTask]
    temperature: float
    cap: int | None
    only: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def head(self) -> str:
        """The head of the model for it."""
        return next(iter(self.parts.values())).head

    @property
    def best(self) -> dict[str, str]:
        """The mean of the deciding metrics of what is trained; by max or by min."""
        return {
            "metric": "mean",
            "mode": next(iter(self.parts.values())).best["mode"],
        }

    @property
    def num_labels(self) -> int | None:
        """The classes of all tasks together; None for writing tasks."""
        if self.head == "causal_lm":
            return None
        return sum(task.num_labels or 0 for task in self.parts.values())

    @property
    def splits(self) -> dict[str, list[Rows]]:
        """The splits that every task has, with the rows of each task."""
        parts = list(self.parts.values())
        names = [n for n in parts[0].splits if all(n in task.splits for task in parts)]
        return {name: [task.splits[name] for task in parts] for name in names}

    def classes(self, name: str) -> slice:
        """Returns which columns of the model's head are this task's classes."""
        widths = [task.num_labels or 0 for task in self.parts.values()]
        index = list(self.parts).index(name)
        return slice(sum(widths[:index]), sum(widths[: index + 1]))


def mix(
    parts: Mapping[str, Task | TextTask],
    *,
    temperature: float = 1.0,
    cap: int | None = None,
    only: Sequence[str] | None = None,
    name: str | None = None,
) -> MixedTask:
    """Returns several tasks as one, checked.

    Args:
      parts: the tasks by name; all with classes, or all writing tasks.
      temperature: 1 draws each row as often as any other, infinity each task as often
        as any other; see `mixture_shares`.
      cap: the most rows of a task that count for its share; None: all.
      only: the tasks whose rows are trained on; the others keep their place in the
        head and are evaluated, without counting in the mean. None: all.
      name: short name; None: the tasks' names with "+" between them.

    Returns:
      The task.

    Raises:
      ValueError: if there are fewer than two tasks, or they do not go together: numbers
        to regress on, classes beside writing, a metric that is best when low beside
        one that is best when high; or `temperature` or `cap` make no sense.

    Example:
      >>> from jaxpeft.data import make_task
      >>> rows = [{"text": "a", "label": 0}]
      >>> toy = make_task(
      ...     "toy",
      ...     {"train": rows, "validation": rows},
      ...     text="text",
      ...     label="label",
      ...     labels=["no", "yes"],
      ... )
      >>> mixed = mix({"one": toy, "other": toy})
      >>> mixed.name, mixed.num_labels, mixed.classes("other")
      ('one+other', 4, slice(2, 4, None))
    """
    if len(parts) < 2:
        raise ValueError(f"`parts` of a mixture are two or more; got {list(parts)}.")
    (first, task), *others = parts.items()
    if any("/" in part for part in parts):
        raise ValueError(
            f"`parts` must have names without '/', which scores are named with; got "
            f'{list(parts)}. Write tasks={{"nyt": "opinions/nyt"}}.'
        )
    for part, other in parts.items():
        if other.head == "regression":
            raise ValueError(
                f"`parts` {part!r} is a number to regress on; a mixture has tasks with "
                f"classes or writing tasks."
            )
    for part, other in others:
        if other.head != task.head or other.best["mode"] != task.best["mode"]:
            raise ValueError(
                f"`parts` {first!r} ({task.head}, best by {task.best}) and {part!r} "
                f"({other.head}, best by {other.best}) cannot be mixed: neither one "
                f"model nor one mean score would do for both."
            )
    only = tuple(parts) if only is None else tuple(only)
    if not only or len(set(only)) < len(only):
        raise ValueError(f"`only` must be different names of tasks; got {only}.")
    for part in only:
        if part not in parts:
            raise ValueError(f"`only` has {part!r}.{near_misses(part, parts)}")
    mixture_shares([1] * len(only), temperature=temperature, cap=cap)
    return MixedTask(
        name="+".join(parts) if name is None else name,
        parts=dict(parts),
        temperature=temperature,
        cap=cap,
        only=only,
        facts={part: dict(task.facts) for part, task in parts.items()},
    )


def mixture_shares(
    rows: Sequence[int], *, temperature: float = 1.0, cap: int | None = None
) -> list[float]:
    """Returns how often each task is drawn: as min(n, cap)^(1/temperature).

    Args:
      rows: the number of rows of each task, n.
      temperature: 1: every row alike; infinity: every task alike.
      cap: the most rows of a task that count; None: all.

    Returns:
      The tasks' shares; they sum to 1.

    Raises:
      ValueError: if a number is not above zero.

    Example:
      >>> shares = mixture_shares([100, 400, 1600], temperature=2.0)
      >>> [round(7 * share, 6) for share in shares]
      [1.0, 2.0, 4.0]

    References:
      Raffel et al., Exploring the Limits of Transfer Learning with a Unified
      Text-to-Text Transformer, JMLR 2020, section 3.5.2.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0; got {temperature!r}.")
    if cap is not None and cap < 1:
        raise ValueError(f"`cap` must be at least 1 row, or None; got {cap!r}.")
    if not rows or min(rows) < 1:
        raise ValueError(f"`rows` must be at least 1 of each task; got {list(rows)}.")
    counted = [n if cap is None else min(n, cap) for n in rows]
    # Of the largest, so that no power of a row count overflows.
    weights = [(n / max(counted)) ** (1 / temperature) for n in counted]
    return [weight / sum(weights) for weight in weights]


def join(task: MixedTask, encoded: Mapping[str, Encoded]) -> Encoded:
    """Returns the training splits of a mixture's tasks as one.

    An epoch has as many rows as all trained tasks together, capped ones counted as
    `cap`, and of each its share, rounded by largest remainders.

    Raises:
      ValueError: if a task is never drawn.
    """
    parts = [of_part(task, name, encoded[name]) for name in task.parts]
    if any(part.segments is not None for part in parts):
        parts = [_one_a_sequence(part) for part in parts]
    rows = [part.rows for part in parts]
    drawn = [n for name, n in zip(task.parts, rows, strict=True) if name in task.only]
    shares = iter(mixture_shares(drawn, temperature=task.temperature, cap=task.cap))
    total = sum(n if task.cap is None else min(n, task.cap) for n in drawn)
    exact = [next(shares) * total if name in task.only else 0.0 for name in task.parts]
    quotas = [math.floor(each + 1e-9) for each in exact]
    by_rest = sorted(range(len(quotas)), key=lambda i: quotas[i] - exact[i])
    for index in by_rest[: total - sum(quotas)]:
        quotas[index] += 1
    for name, quota in zip(task.parts, quotas, strict=True):
        if name in task.only and not quota:
            raise ValueError(
                f"`temperature` {task.temperature} and `cap` {task.cap} leave task "
                f"{name!r} with no row of an epoch's {total}; raise the temperature."
            )
    ids = np.repeat(np.arange(len(parts), dtype=np.int32), rows)
    names = tuple(task.parts)
    shown = dict(zip(names, quotas, strict=True))
    facts = {name: dict(part.facts) for name, part in encoded.items() if part.facts}
    starts = np.cumsum([0] + [len(part.ids) for part in parts[:-1]])
    column = lambda field: _column([getattr(part, field) for part in parts])
    return Encoded(
        name=f"{task.name}/train",
        ids=column("ids"),
        types=column("types"),
        offsets=np.concatenate(
            [[0], *(p.offsets[1:] + s for p, s in zip(parts, starts, strict=True))]
        ).astype(np.int64),
        labels=column("labels"),
        pad=parts[0].pad,
        max_length=parts[0].max_length,
        learn=column("learn"),
        segments=column("segments"),
        positions=column("positions"),
        facts={"rows_of_an_epoch": shown, **facts},
        mixed=Mixed(
            names,
            ids,
            tuple(quotas),
            _column([part.mixed and part.mixed.label_mask for part in parts]),
        ),
    )


def _one_a_sequence(encoded: Encoded) -> Encoded:
    """Returns a split that is not packed as one whose sequences hold a text each."""
    if encoded.segments is not None:
        return encoded
    starts = np.repeat(encoded.offsets[:-1], encoded.lengths)
    return encoded._replace(
        segments=np.ones(len(encoded.ids), np.int32),
        positions=(np.arange(len(encoded.ids)) - starts).astype(np.int32),
    )


def _column(arrays: list[ndarray | None]) -> ndarray | None:
    """Returns one column of all tasks end to end; all have it, or none."""
    given = [array for array in arrays if array is not None]
    assert len(given) in (0, len(arrays)), "tasks of one kind have the same columns"
    return np.concatenate(given) if given else None


def of_part(task: MixedTask, name: str, encoded: Encoded) -> Encoded:
    """Returns a task's split with its classes counted as the mixture counts them."""
    if task.num_labels is None:
        return encoded
    classes = task.classes(name)
    mask = np.zeros((1, task.num_labels), bool)
    mask[0, classes] = True
    return encoded._replace(
        labels=encoded.labels + np.int32(classes.start),
        mixed=Mixed((name,), np.zeros(encoded.rows, np.int32), (encoded.rows,), mask),
    )


def held_out(
    task: Task | TextTask | MixedTask, encoded: Mapping[str, Encoded], split: str
) -> dict[str, tuple[Encoded, Callable[[Any, Any], dict[str, float]]]]:
    """Returns what is to be evaluated of a split, and how each is scored.

    Args:
      task: the task.
      encoded: its splits, from `jaxpeft.data.tokenize`.
      split: "validation", "test" and so on.

    Returns:
      By name, rows and the function that scores outputs against labels, as
      `jaxpeft.data.score` does: one entry "", or one for each task of a mixture.

    Raises:
      ValueError: if there is no such split.
    """
    if split not in task.splits:
        raise ValueError(
            f"`split` {split!r} is not in task {task.name!r}: {list(task.splits)}."
        )
    if not isinstance(task, MixedTask):
        return {"": (encoded[split], functools.partial(score, task))}

    def score_part(name, outputs, labels):
        if task.num_labels is not None:
            classes = task.classes(name)
            outputs, labels = outputs[:, classes], labels - classes.start
        return score(task.parts[name], outputs, labels)

    return {
        name: (encoded[f"{split}/{name}"], functools.partial(score_part, name))
        for name in task.parts
    }


def gather_scores(
    task: Task | TextTask | MixedTask, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Returns the scores of all entries of `held_out` in one dict.

    Args:
      task: the task.
      scores: by the names of `held_out`, what each scored and its "loss".

    Returns:
      The scores; of a mixture "trec/accuracy" and so on, and of those trained on
      "mean", the mean of their deciding metrics, and "loss", the mean of their losses.

    Example:
      >>> rows = [{"q": "2 + 2 =", "a": " 4"}]
      >>> from jaxpeft.data import make_text_task
      >>> task = make_text_task(
      ...     "sums",
      ...     {"train": rows, "validation": rows},
      ...     prompt="q",
      ...     completion="a",
      ...     metrics="exact_match",
      ... )
      >>> one = {"exact_match": 0.25, "loss": 2.0}
      >>> scores = {"one": one, "other": {"exact_match": 0.75, "loss": 1.0}}
      >>> scores = gather_scores(mix({"one": task, "other": task}), scores)
      >>> scores["mean"], scores["loss"], scores["one/exact_match"]
      (0.5, 1.5, 0.25)
    """
    if not isinstance(task, MixedTask):
        return dict(scores[""])
    each = [scores[name][task.parts[name].best["metric"]] for name in task.only]
    mean = lambda values: math.fsum(values) / len(values)
    flat = {f"{name}/{k}": v for name in task.parts for k, v in scores[name].items()}
    losses = [scores[name]["loss"] for name in task.only]
    return {"mean": mean(each), "loss": mean(losses), **flat}
