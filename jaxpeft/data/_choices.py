"""Multiple choice: what a row must have, and which choice the model likes best."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

from jaxpeft.data._labels import plain, text_of
from jaxpeft.data._task import value_of
from jaxpeft.data._templates import read_text

CHOICE_METRICS = ("accuracy", "accuracy_per_token")


def choices_of(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[str, list[str], int]:
    """Returns a row's prompt, its choices, and the place of the right one."""
    prompt = read_text(row, columns[0], where)
    given = value_of(row, columns[1], where)
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__len__"):
        raise ValueError(
            f"{where}: column {columns[1]!r} must be a list of texts; got {given!r}."
        )
    names = [f"{columns[1]}[{i}]" for i in range(len(given))]
    read = dict(zip(names, given, strict=True))
    choices = [text_of(read, name, where) for name in names]
    bare = [choice.strip() for choice in choices]
    if len(bare) < 2 or len(set(bare)) < len(bare):
        raise ValueError(
            f"{where}: column {columns[1]!r} must have two or more different choices; "
            f"got {choices}."
        )
    answer = plain(value_of(row, columns[2], where))
    if isinstance(answer, str) and answer.strip() in bare:
        return prompt, choices, bare.index(answer.strip())
    place = isinstance(answer, numbers.Integral) and not isinstance(answer, bool)
    if place and 0 <= answer < len(choices):
        return prompt, choices, int(answer)
    raise ValueError(
        f"{where}: column {columns[2]!r} must be a place from 0 to {len(choices) - 1} "
        f"or the text of one of the choices {choices}; got {answer!r}."
    )


def score_choices(
    name: str,
    metrics: Sequence[str],
    losses: Float[ndarray, " n"],
    labels: Integer[ndarray, "n 5"],
) -> dict[str, float]:
    """Returns the accuracies of a multiple-choice task; `score` says which they are.

    Args:
      name: of the task.
      metrics: which of them.
      losses: minus the log-probability of each choice, the sum over its tokens.
      labels: of each choice its tokens, its question, its place, of how many, and
        whether it is right.
    """
    order = np.lexsort((labels[:, 2], labels[:, 1]))
    losses = losses[order]
    tokens, question, place, count, right = labels[order].T
    if not np.all(np.isfinite(losses)):
        row = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise ValueError(
            f"`outputs` must be finite; question {question[row]}, choice {place[row]} "
            f"of task {name!r} has {losses[row]}."
        )
    starts = np.flatnonzero(np.diff(question, prepend=-1))
    counts = np.diff(starts, append=len(question))
    rights = np.add.reduceat(right, starts)
    whole = place == np.arange(len(place)) - np.repeat(starts, counts)
    whole &= count == np.repeat(counts, counts)
    lacking = (rights != 1) | ~np.logical_and.reduceat(whole, starts)
    if lacking.any():
        raise ValueError(
            f"`labels` of task {name!r} must have each choice of a question once, the "
            f"right one among them; question {question[starts[lacking][0]]} has not."
        )
    scores = {"accuracy": -losses, "accuracy_per_token": -losses / tokens}
    found = {}
    for metric in metrics:
        likeliest = [
            int(np.argmax(part)) for part in np.split(scores[metric], starts[1:])
        ]
        found[metric] = float(np.mean(right[starts + likeliest]))
    return found
