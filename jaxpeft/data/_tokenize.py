"""From rows of text to rows of token ids: once, up front, with every row checked."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from jaxpeft.data._bad_rows import good_rows
from jaxpeft.data._encode_choices import choices_encoded, choices_part
from jaxpeft.data._encode_texts import texts_encoded, texts_of
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._labels import label_reader, text_of
from jaxpeft.data._mixed import MixedTask, join, of_part
from jaxpeft.data._pack import pack
from jaxpeft.data._part import Part, joined, part_of
from jaxpeft.data._task import Rows, Task, near_misses
from jaxpeft.data._texts import TextTask
from jaxpeft.data._workers import Workers

_CHUNK = 1000  # rows handed to the tokenizer at once
_LARGE = 5000  # rows from which a progress bar is worth its line
# What to do where a prompt by itself is not what stands before its completion.
_ADVICE_PROMPT = (
    "(jaxpeft.models.joint): end it without a space, and begin what follows with one."
)
_ADVICE_CHAT = (
    "as the chat template opens a turn, which these do not go on with: let them begin "
    "as the opening does, with what is thought, say, or take another chat template."
)


def tokenize(
    task: Task | TextTask | MixedTask,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int = 128,
    splits: Sequence[str] | None = None,
    progress: bool = True,
    workers: int | None = 0,
) -> dict[str, Encoded]:
    """Returns the task's splits as token ids, with every row and label checked.

    Args:
      task: the task.
      tokenizer: a Hugging Face tokenizer (of transformers; no torch needed).
      vocab_size: rows of the model's embedding; each id must be below it.
      max_length: longer rows are cut to this many tokens, special ones included; of a
        pair the longer text first. In a writing task no row is cut: a text goes on in
        another sequence, which repeats one token; a longer completion or chat is left
        out. A held-out row of choices that is too long is an error.
      splits: which to read; None: all.
      progress: whether to show a progress bar over large splits.
      workers: processes that tokenise, which pay where rows are many; what they
        make is the same to the bit. 0: this one alone; None: as many as pay, none for
        less than 40,000 rows. A program that starts processes needs
        `if __name__ == "__main__":`.

    Returns:
      `Encoded` by split; of a mixture "train" for all tasks, and each task's others
      by themselves: "validation/trec". Their `facts` count, where there are any:
      texts that are "continued" and rows "left_out" for their length; "bad_rows", left
      out too, with the reason of the "first_bad_row"; "borders_moved", prompts that by
      themselves have other tokens than before their completion, which a warning says
      (`jaxpeft.models.joint`), and of a chat turns that are not written as they are
      opened; "chats_by_turns", whose turns are sequences of their own;
      "chats_without_end", where the template does not close a turn or its marks leave
      the end token out, so that the model is not taught to stop; "unread KEY", what
      messages have and the chat template never asks for.

    Raises:
      ValueError: if the tokenizer does not fit the vocabulary, has no padding token or
        no room within `max_length`, or, unless the task says bad_rows="skip" and one
        row is good, a row has no such column, no text, or a label outside the classes
        or not finite (naming split, row and value), or, in a
        writing task, the tokenizer has no end token or chat template where one is
        needed, or nothing is left to learn; or `workers` is negative, or tokenizer or
        task cannot be sent to them.
      RuntimeError: one of the `workers` has died.

    Example:
      >>> encoded = tokenize(task, tokenizer, vocab_size=30522)  # doctest: +SKIP
      >>> encoded["train"].rows  # doctest: +SKIP
    """
    with Workers(tokenizer, workers) as pool:
        limits = dict(vocab_size=vocab_size, max_length=max_length)
        return _tokenize(task, tokenizer, pool, splits, progress=progress, **limits)


def _tokenize(
    task: Task | TextTask | MixedTask,
    tokenizer: Any,
    pool: Workers,
    splits: Sequence[str] | None,
    *,
    vocab_size: int,
    max_length: int,
    progress: bool,
) -> dict[str, Encoded]:
    if isinstance(task, MixedTask):
        chosen = list(task.splits if splits is None else splits)
        options = dict(vocab_size=vocab_size, max_length=max_length, progress=progress)
        parts = {
            name: _tokenize(part, tokenizer, pool, chosen, **options)
            for name, part in task.parts.items()
        }
        found = {
            f"{split}/{name}": of_part(task, name, encoded[split])
            for name, encoded in parts.items()
            for split in chosen
            if split != "train"
        }
        if "train" in chosen:
            found["train"] = join(task, {n: part["train"] for n, part in parts.items()})
        return found
    check_tokenizer(
        tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
        pair=isinstance(task, Task) and len(task.text) == 2,
    )
    chosen = list(task.splits) if splits is None else list(splits)
    for split in chosen:
        if split not in task.splits:
            near = near_misses(split, task.splits)
            raise ValueError(
                f"`splits` has {split!r}, not in task {task.name!r}.{near}"
            )
    encoded = {}
    for split in chosen:
        chunks = _chunks(
            task.splits[split], f"Tokenising {task.name}/{split}", progress
        )
        writes = isinstance(task, TextTask)
        of_rows, encode = (texts_of, texts_encoded) if writes else (_rows_of, _encoded)
        # In training the right choice is a completion like any other.
        if split != "train" and writes and task.form == "choice":
            of_rows, encode = choices_part, choices_encoded
        parts = pool.each_part(of_rows, task, split, max_length, chunks)
        whole, facts = joined(parts, good_rows(task, split))
        encoded[split] = encode(task, split, tokenizer, max_length, whole, facts)
        if moved := (encoded[split].facts or {}).get("borders_moved"):
            advice = _ADVICE_CHAT if task.form == "chat" else _ADVICE_PROMPT
            warnings.warn(
                f"{encoded[split].name}: prompts by themselves have other tokens than "
                f"before what follows them, {moved} of them. A model in use reads the "
                f"prompt alone {advice}",
                stacklevel=3,
            )
        if split == "train" and isinstance(task, TextTask) and task.pack:
            encoded[split] = pack(encoded[split])
    return encoded


def check_tokenizer(
    tokenizer: Any, *, vocab_size: int, max_length: int, pair: bool = False
) -> None:
    """Raises unless the tokenizer fits a model's vocabulary and length.

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocab_size: rows of the model's embedding.
      max_length: the most tokens a row may have.
      pair: whether rows are pairs of texts.

    Raises:
      ValueError: naming the token or the length that does not fit.

    Example:
      >>> check_tokenizer(tokenizer, vocab_size=30522, max_length=128)  # doctest: +SKIP
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "get_vocab"):
        raise ValueError(
            f"`tokenizer` must be a tokenizer of transformers; got "
            f"{type(tokenizer).__name__}. Write jaxpeft.models.tokenizer(folder)."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "`tokenizer` has no padding token. models.tokenizer(name) takes the end "
            "token where there is none; name one of its tokens, "
            "models.tokenizer(name, pad_token=...) or config.tokenizer.pad_token."
        )
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"`tokenizer` does not fit the model: its token {token!r} has id "
            f"{largest}, the model's vocabulary has {vocab_size} rows, 0 to "
            f"{vocab_size - 1}. Take the tokenizer that came with the model's weights."
        )
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if not least <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"`max_length` {max_length} must lie between {least} ({special} special "
            f"tokens and some text) and the tokenizer's model_max_length, "
            f"{tokenizer.model_max_length}."
        )


def _rows_of(
    task: Task,
    split: str,
    tokenizer: Any,
    max_length: int,
    numbers: Sequence[int],
) -> Part:
    """Returns some rows of a task with labels as token ids."""
    has_types = "token_type_ids" in tokenizer.model_input_names
    good, label_of = good_rows(task, split), label_reader(task)

    def read(row: Any, where: str, _: Any) -> tuple[list[str], int | float]:
        return [text_of(row, c, where) for c in task.text], label_of(row, where)

    pairs = [pair for _, pair in good.read(numbers, read)]
    found: Any = {"input_ids": [], "token_type_ids": []}
    if pairs:
        found = tokenizer(
            *map(list, zip(*(texts for texts, _ in pairs), strict=True)),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=has_types,
            return_overflowing_tokens=False,
        )
    kind = np.float32 if task.regression else np.int32
    return part_of(
        good,
        _joined(found["input_ids"]),
        [len(ids) for ids in found["input_ids"]],
        types=_joined(found["token_type_ids"]) if has_types else None,
        labels=np.asarray([label for _, label in pairs], kind),
    )


def _encoded(
    task: Task,
    split: str,
    tokenizer: Any,
    max_length: int,
    part: Part,
    facts: dict[str, Any],
) -> Encoded:
    """Returns a split, of all its rows as `_rows_of` has them."""
    return Encoded(
        name=f"{task.name}/{split}",
        ids=part.ids,
        types=part.types,
        offsets=part.offsets,
        labels=part.labels,
        pad=tokenizer.pad_token_id,
        max_length=max_length,
        facts={"rows": len(task.splits[split]), **facts} if facts else None,
    )


def _joined(rows: Sequence[Sequence[int]]) -> Int32[ndarray, " tokens"]:
    return np.fromiter((i for row in rows for i in row), np.int32)


def _chunks(rows: Rows, title: str, progress: bool) -> Iterator[range]:
    """Yields the rows of each chunk, moving a progress bar if there are many."""
    starts: Iterable[int] = range(0, len(rows), _CHUNK)
    if progress and len(rows) >= _LARGE:
        from rich.console import Console
        from rich.progress import track

        starts = track(starts, title, console=Console(stderr=True))
    for start in starts:
        yield range(start, min(start + _CHUNK, len(rows)))
