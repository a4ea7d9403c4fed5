"""Prompts of the study as token ids, and the tokens that would answer them."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxpeft.data import (
    Encoded,
    PromptSet,
    Record,
    draw_demonstrations,
    write_prompt,
)
from jaxpeft.models import joint, opened

OVERFLOWS = ("error", "drop_demos")
LABEL_TOKENS = ("in_context", "bare", "none")
CONTROLS = ("fixed", "shuffled")


class Asked(NamedTuple):
    """Prompts as token ids.

    Attributes:
        encoded: a row for each prompt, for ``data.evaluation_batches``; its ``labels``
            are the numbers of the rows.
        tokens: for each prompt the first token of each label, [rows, labels]; ``None``:
            accuracy is not asked for.
        right: the number of the right label, [rows]; with ``tokens`` alone.
        facts: how many inputs and demonstrations were left out, and tokens, JSON-able.
    """

    encoded: Encoded
    tokens: Int32[np.ndarray, "rows labels"] | None
    right: Int32[np.ndarray, " rows"] | None
    facts: dict[str, Any]


def ask(
    records: PromptSet,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int,
    shots: int = 0,
    demos: str = "official",
    seed: int = 42,
    overflow: str = "error",
    label_tokens: str = "in_context",
    control: str | None = None,
    of_train: bool = False,
) -> Asked:
    """Returns the prompts of a task as token ids.

    Inputs that came before are left out, so that the rows are the same ones for every
    number of demonstrations and every model.

    Args:
        records: the task.
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's embedding.
        max_length: the most tokens of a prompt.
        shots: demonstrations in each.
        demos: how they are drawn, as in ``data.draw_demonstrations``.
        seed: of the draw.
        overflow: of a prompt that is too long: ``"error"``, or ``"drop_demos"``, which
            leaves out demonstrations from the front, whole, until it fits.
        label_tokens: ``"in_context"``, the token that follows when the label is put
            behind the prompt; ``"bare"``, the first one of the label by itself, as the
            study's own code has it; ``"none"``: no accuracy.
        control: what the demonstrations are robbed of: ``"fixed"``: all questions see
            the same ones, so that they do not spread the states by themselves;
            ``"shuffled"``: their answers are exchanged over all training records (one
            permutation), so that they show the form and the labels, and not the task.
        of_train: the training records are asked, without demonstrations.

    Returns:
        The prompts.

    Raises:
        ValueError: a prompt is too long, two labels have the same first token, the
            task has no labels, an option is unknown, or a control has no
            demonstrations to act on.

    References:
        Janapati and Ji, A comparative study of learning paradigms in large language
        models via intrinsic dimension, arXiv 2412.06245.
    """
    if overflow not in OVERFLOWS:
        raise ValueError(f"`overflow` must be one of {OVERFLOWS}, got {overflow!r}")
    if control is not None and control not in CONTROLS:
        raise ValueError(f"`control` must be one of {CONTROLS}, got {control!r}")
    if (shots == 0 and control) or (shots and of_train):
        raise ValueError(
            f"`shots` {shots}: a control needs demonstrations, and training records "
            "are asked without any, since they are the demonstrations."
        )
    every = records.train if of_train else records.evaluated
    pool = _shuffled(records.train, seed) if control == "shuffled" else records.train
    draws = 1 if control == "fixed" else len(every)
    shown = draw_demonstrations(draws, len(pool), shots, demos, seed=seed)
    shown *= len(every) // draws
    seen: set[str] = set()
    kept = []
    for number, record in enumerate(every):
        if record.input not in seen:
            seen.add(record.input)
            kept.append(number)
    ids: list[int] = []
    lengths, dropped, cut = [], 0, 0
    for number in kept:
        chosen = [pool[i] for i in shown[number]]
        one = opened(tokenizer, write_prompt(every[number], chosen))
        while len(one) > max_length:
            if overflow == "error" or not chosen:
                raise ValueError(
                    f"prompt {number} of {records.name} has {len(one)} tokens with "
                    f"{len(chosen)} demonstrations; the most is `max_length` "
                    f"{max_length}. Fewer `shots`, or overflow='drop_demos', which "
                    "never cuts the question."
                )
            cut, dropped = cut + (len(chosen) == shots), dropped + 1
            chosen = chosen[1:]
            one = opened(tokenizer, write_prompt(every[number], chosen))
        ids += one
        lengths.append(len(one))
    tokens, right = None, None
    asked = [every[number] for number in kept]
    if label_tokens != "none":
        tokens = _label_tokens(records, asked, tokenizer, label_tokens)
        places = {label: place for place, label in enumerate(records.labels)}
        right = np.array([places[record.output] for record in asked], np.int32)
    highest = max(max(ids), 0 if tokens is None else int(np.max(tokens)))
    if highest >= vocab_size:
        raise ValueError(
            f"`tokenizer` does not fit the model: it gives token {highest}, and the "
            f"model's vocabulary has {vocab_size} rows."
        )
    encoded = Encoded(
        name=f"{records.name}, {shots} shots",
        ids=np.asarray(ids, np.int32),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.arange(len(kept), dtype=np.int32),
        pad=0,  # what padding holds does not matter
        max_length=max(lengths),
    )
    facts = {
        "rows": len(kept),
        "repeated_inputs": len(every) - len(kept),
        "dropped_demonstrations": dropped,
        "prompts_with_fewer": cut,
        "tokens": len(ids),
        "longest": max(lengths),
    }
    return Asked(encoded, tokens, right, facts)


def _shuffled(train: Sequence[Record], seed: int) -> list[Record]:
    """The records with each other's outputs, one permutation of all."""
    outputs = [record.output for record in train]
    random.Random(f"{seed}/outputs").shuffle(outputs)
    return [
        record._replace(output=output)
        for record, output in zip(train, outputs, strict=True)
    ]


def padded_lengths(longest: int) -> tuple[int, ...]:
    """The lengths that prompts are padded to: steps of a fifth or so, few programs.

    Example:
        >>> padded_lengths(150)
        (32, 48, 64, 80, 96, 112, 128, 160)
    """
    found, length = [32], 32
    while length < longest:
        step = max(16, 1 << (length.bit_length() - 3))
        length += step
        found.append(length)
    return tuple(found)


def _label_tokens(
    records: PromptSet, asked: Sequence[Any], tokenizer: Any, how: str
) -> np.ndarray:
    if how not in LABEL_TOKENS:
        raise ValueError(f"`label_tokens` must be one of {LABEL_TOKENS}, got {how!r}")
    if records.labels is None:
        raise ValueError(
            f"`label_tokens` {how!r}: task {records.name!r} has no set of labels, any "
            "text may be an answer. For states without an accuracy, write "
            "label_tokens='none'."
        )
    if len(records.labels) < 2:
        raise ValueError(
            f"`label_tokens` {how!r}: task {records.name!r} has the one label "
            f"{records.labels[0]!r}, and every answer would be right. Write "
            "label_tokens='none'."
        )
    if how == "bare":
        row = [
            tokenizer(label, add_special_tokens=False)["input_ids"][0]
            for label in records.labels
        ]
        rows = np.array([row] * len(asked), np.int32)
    else:
        rows = np.empty((len(asked), len(records.labels)), np.int32)
        for i, record in enumerate(asked):
            # Demonstrations before it change nothing at the end of the text.
            prompt = write_prompt(record)
            before = opened(tokenizer, prompt)
            for j, label in enumerate(records.labels):
                read, after = joint(tokenizer, prompt, label, alone=before)
                if read != before or not after:
                    raise ValueError(
                        f"`label_tokens` 'in_context': behind {prompt[-40:]!r} the "
                        f"label {label!r} changes the prompt's own tokens, or has "
                        "none. Write label_tokens='bare'."
                    )
                rows[i, j] = after[0]
    for row in rows:
        if len(set(row.tolist())) < len(row):
            at = next(j for j, x in enumerate(row) if x in row[:j])
            first = int(np.flatnonzero(row == row[at])[0])
            raise ValueError(
                f"`labels` {records.labels[first]!r} and {records.labels[at]!r} begin "
                f"with the same token {int(row[at])}, by which answers are told apart. "
                "Give other words, or label_tokens='none' for states alone."
            )
    return rows
