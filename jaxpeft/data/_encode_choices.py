"""From held-out rows of a multiple-choice task to token ids, a row for each choice."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpeft.data._bad_rows import good_rows
from jaxpeft.data._choices import choices_of
from jaxpeft.data._encode_texts import read_behind
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._part import Part, part_of
from jaxpeft.data._texts import TextTask

_Pair = tuple[list[int], list[int]]  # tokens of a prompt, and of a choice behind it


def choices_part(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    numbers: Sequence[int],
) -> Part:
    """Returns a row for each choice of some rows, behind its question's prompt.

    The tokens are those of training, less the end token. None is left out, for an
    accuracy is one of all questions.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    labels: list[tuple[int, ...]] = []
    longest = (0, "")

    def read(row: Any, where: str, notes: Counter[str]) -> tuple[list[_Pair], int]:
        prompt, choices, right = choices_of(row, task.columns, where)
        found = read_behind(tokenizer, prompt, choices, task.columns[0], where, notes)
        for place, choice in enumerate(choices):
            if not found[place][1]:
                raise ValueError(
                    f"{where}: choice {place}, {choice!r}, has no token to score."
                )
        return found, right

    good = good_rows(task, split)
    for number, (pairs, right) in good.read(numbers, read):
        for place, (before, after) in enumerate(pairs):
            ids += before + after
            learnt += [False] * len(before) + [True] * len(after)
            lengths.append(len(before) + len(after))
            row = len(after), number, place, len(pairs), int(place == right)
            labels.append(row)
            if lengths[-1] > longest[0]:
                longest = lengths[-1], f"{good.what}, row {number}, choice {place}"
    return part_of(
        good,
        ids,
        lengths,
        learn=learnt,
        labels=np.asarray(labels, np.int32).reshape(-1, 5),
        longest=longest,
    )


def choices_encoded(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    part: Part,
    facts: dict[str, Any],
) -> Encoded:
    """Returns a split, of all its rows as `choices_part` has them."""
    if part.longest[0] > max_length:
        tokens, where = part.longest
        over = int((part.lengths > max_length).sum())
        raise ValueError(
            f"{where} has {tokens} tokens with its prompt, and {over} choices "
            f"more than `max_length` {max_length}. Write max_length={tokens}, or "
            "leave their rows out of the task."
        )
    counts = {"choices": len(part.labels), "tokens": len(part.ids)}
    return Encoded(
        name=f"{task.name}/{split}",
        ids=part.ids,
        types=None,
        offsets=part.offsets,
        labels=part.labels,
        pad=tokenizer.pad_token_id,
        max_length=max_length,
        learn=part.learn,
        facts={"rows": len(task.splits[split]), **counts, **facts},
    )
