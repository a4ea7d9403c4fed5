"""From held-out rows of a multiple-choice task to token ids, a row for each choice."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxpeft.data._bad_rows import good_rows
from jaxpeft.data._choices import choices_of
from jaxpeft.data._encode_texts import read_behind
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._texts import TextTask

_Pair = tuple[list[int], list[int]]  # tokens of a prompt, and of a choice behind it


def encode_choices(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    chunks: Iterable[range],
) -> Encoded:
    """Returns a split with a row for each choice, behind its question's prompt.

    The tokens are those of training, less the end token. None is left out, for an
    accuracy is one of all questions.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    labels: list[tuple[int, ...]] = []
    rows = task.splits[split]
    longest = (0, "")

    def read(row: Any, where: str, notes: Counter[str]) -> tuple[list[_Pair], int]:
        prompt, choices, right = choices_of(row, task.columns, where)
        found = []
        for place, choice in enumerate(choices):
            before, after = read_behind(
                tokenizer, prompt, choice, task.columns[0], where, notes
            )
            if not after or not choice.strip():
                raise ValueError(
                    f"{where}: choice {place}, {choice!r}, has no token to score."
                )
            found.append((before, after))
        return found, right

    good = good_rows(task, split)
    for chunk in chunks:
        for number, (pairs, right) in good.read(chunk, read):
            for place, (before, after) in enumerate(pairs):
                ids += before + after
                learnt += [False] * len(before) + [True] * len(after)
                lengths.append(len(before) + len(after))
                row = len(after), number, place, len(pairs), int(place == right)
                labels.append(row)
                if lengths[-1] > longest[0]:
                    longest = lengths[-1], f"{good.what}, row {number}, choice {place}"
    facts = good.facts()
    if longest[0] > max_length:
        over = sum(length > max_length for length in lengths)
        raise ValueError(
            f"{longest[1]} has {longest[0]} tokens with its prompt, and {over} choices "
            f"more than `max_length` {max_length}. Write max_length={longest[0]}, or "
            "leave their rows out of the task."
        )
    return Encoded(
        name=f"{task.name}/{split}",
        ids=np.asarray(ids, np.int32),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.asarray(labels, np.int32),
        pad=tokenizer.pad_token_id,
        max_length=max_length,
        learn=np.asarray(learnt, bool),
        facts={
            "rows": len(rows),
            "choices": len(labels),
            "tokens": len(ids),
            **facts,
        },
    )
