"""From rows of a writing task to token ids, and which of them are learnt."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxpeft import models
from jaxpeft.data._bad_rows import good_rows
from jaxpeft.data._chats import encode_chat
from jaxpeft.data._choices import choices_of
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._part import Part, part_of
from jaxpeft.data._templates import read_text
from jaxpeft.data._texts import TextTask

# The ids of a sequence, and for each whether it is to be predicted.
_Sequence = tuple[list[int], list[bool]]


def texts_of(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    numbers: Sequence[int],
) -> Part:
    """Returns some rows of a split as token ids.

    A text that is too long goes on in another sequence, which repeats one token for
    the next to follow: each is learnt once. A completion or chat that is too long is
    left out, whole, and counted: cut, it would teach to stop nowhere.
    """
    if max_length < 2:
        raise ValueError(
            f"`max_length` must be at least 2 to learn a token; got {max_length}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`tokenizer` has no end token, after which writing stops. Write "
            "models.tokenizer(name, eos_token=...), one of its tokens, or "
            "config.tokenizer.eos_token."
        )
    if task.form == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"`tokenizer` has no chat template, and task {task.name!r} is of messages. "
            'Write models.tokenizer(name, chat_template="chatml"), another template or '
            "a file, or config.tokenizer.chat_template, or give prompts and "
            "completions."
        )
    forms = {
        "text": _text,
        "completion": _completion,
        "chat": encode_chat,
        "choice": _choice,
    }
    encode = forms[task.form]
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    counts = {"continued": 0, "left_out": 0}
    longest = 0
    good = good_rows(task, split)

    def read(row: Any, where: str, notes: Counter[str]) -> list[_Sequence]:
        return encode(tokenizer, row, task.columns, where, notes)

    for _, sequences in good.read(numbers, read):
        for one in sequences:
            longest = max(longest, len(one[0]))
            if len(one[0]) > max_length:
                counts["continued" if task.form == "text" else "left_out"] += 1
                if task.form != "text":
                    continue
            for some, these in _pieces(one, max_length):
                ids += some
                learnt += these
                lengths.append(len(some))
    return part_of(
        good, ids, lengths, learn=learnt, counts=counts, longest=(longest, "")
    )


def texts_encoded(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    part: Part,
    facts: dict[str, Any],
) -> Encoded:
    """Returns a split, of all its rows as `texts_of` has them."""
    name, rows = f"{task.name}/{split}", len(task.splits[split])
    if not part.learn.any():
        raise ValueError(
            f"{name} has nothing to learn: {part.counts['left_out']} of {rows} rows "
            f"are longer than `max_length` {max_length}; the longest has "
            f"{part.longest[0]} tokens."
        )
    counts = {n: part.counts[n] for n in ("continued", "left_out")}
    tokens = {"tokens": len(part.ids), "learnt_tokens": int(part.learn.sum())}
    return Encoded(
        name=name,
        ids=part.ids,
        types=None,
        offsets=part.offsets,
        labels=np.add.reduceat(part.learn, part.offsets[:-1], dtype=np.int32),
        pad=tokenizer.pad_token_id,
        max_length=max_length,
        learn=part.learn,
        facts={"rows": rows, **counts, **facts, **tokens},
    )


def _pieces(sequence: _Sequence, max_length: int) -> Iterator[_Sequence]:
    ids, learnt = sequence
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        piece = slice(start, start + max_length)
        yield ids[piece], [False, *learnt[piece][1:]]


def _text(
    tokenizer: Any,
    row: Any,
    columns: tuple[str, ...],
    where: str,
    notes: Counter[str],
) -> list[_Sequence]:
    ids = models.opened(tokenizer, read_text(row, columns[0], where))
    ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise ValueError(f"{where}: column {columns[0]!r} has no text.")
    return [(ids, [False] + [True] * (len(ids) - 1))]


def _completion(
    tokenizer: Any,
    row: Any,
    columns: tuple[str, ...],
    where: str,
    notes: Counter[str],
) -> list[_Sequence]:
    prompt, completion = (read_text(row, column, where) for column in columns)
    ((before, after),) = read_behind(
        tokenizer, prompt, [completion], columns[0], where, notes
    )
    after = [*after, tokenizer.eos_token_id]
    return [(before + after, [False] * len(before) + [True] * len(after))]


def _choice(
    tokenizer: Any,
    row: Any,
    columns: tuple[str, ...],
    where: str,
    notes: Counter[str],
) -> list[_Sequence]:
    prompt, choices, right = choices_of(row, columns, where)
    texts = {"prompt": prompt, "choice": choices[right]}
    return _completion(tokenizer, texts, ("prompt", "choice"), where, notes)


def read_behind(
    tokenizer: Any,
    prompt: str,
    completions: Sequence[str],
    column: str,
    where: str,
    notes: Counter[str],
) -> list[tuple[list[int], list[int]]]:
    """Tokens of a prompt and of what is written behind it, for each of some texts.

    Counts under "borders_moved" where the prompt by itself has other tokens.
    """
    alone = models.opened(tokenizer, prompt)
    if not alone:
        raise ValueError(
            f"{where}: column {column!r} has no text; without prompts, give the "
            "completions as `text`."
        )
    found = [
        models.joint(tokenizer, prompt, completion, alone=alone)
        for completion in completions
    ]
    for (before, _), completion in zip(found, completions, strict=True):
        if not before:
            raise ValueError(
                f"{where}: the first token is of the prompt {prompt[:40]!r} and of "
                f"what follows, {completion[:40]!r}, so that nothing is left to be "
                "read. Begin the one with a space, or end the other with a line end."
            )
    notes["borders_moved"] += any(before != alone for before, _ in found)
    return found
