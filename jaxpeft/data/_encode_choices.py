"""From held-out rows of a multiple-choice task to token ids, a row for each choice."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxpeft.data._choices import choices_of
from jaxpeft.data._encode_texts import plain, prompt_ids
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._texts import TextTask


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
    for chunk in chunks:
        for number in chunk:
            where = f"Task {task.name!r}, split {split!r}, row {number}"
            prompt, choices, right = choices_of(rows[number], task.columns, where)
            before = prompt_ids(tokenizer, prompt, task.columns[0], where)
            for place, choice in enumerate(choices):
                after = plain(tokenizer, choice)
                if not after:
                    raise ValueError(
                        f"{where}: choice {place}, {choice!r}, has no token to score."
                    )
                ids += before + after
                learnt += [False] * len(before) + [True] * len(after)
                lengths.append(len(before) + len(after))
                facts = len(after), number, place, len(choices), int(place == right)
                labels.append(facts)
                if lengths[-1] > longest[0]:
                    longest = lengths[-1], f"{where}, choice {place}"
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
        facts={"rows": len(rows), "choices": len(labels), "tokens": len(ids)},
    )
