"""From rows of a writing task to token ids, and which of them are learnt."""

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxpeft.data._choices import choices_of
from jaxpeft.data._encoded import Encoded
from jaxpeft.data._labels import text_of
from jaxpeft.data._task import value_of
from jaxpeft.data._texts import TextTask
from jaxpeft.models import turn_end

_LOG = logging.getLogger("jaxpeft.data")

# The ids of a sequence, and for each whether it is to be predicted.
_Sequence = tuple[list[int], list[bool]]


def encode_texts(
    task: TextTask,
    split: str,
    tokenizer: Any,
    max_length: int,
    chunks: Iterable[range],
) -> Encoded:
    """Returns a split as token ids; `chunks` yields the numbers of its rows.

    A text that is too long goes on in another sequence, which repeats one token for
    the next to follow: each is learnt once. A completion or chat that is too long is
    left out, whole, and counted: cut, it would teach to stop nowhere.
    """
    name = f"{task.name}/{split}"
    rows = task.splits[split]
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
    forms = {"text": _text, "completion": _completion, "choice": _choice}
    ends = {tokenizer.eos_token_id}
    if task.form == "chat":
        ends |= {turn_end(tokenizer)}
        forms["chat"] = functools.partial(_chat, ends=ends)
    encode = forms[task.form]
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    counts = {"rows": len(rows), "continued": 0, "left_out": 0}
    longest = 0
    for chunk in chunks:
        for number in chunk:
            where = f"Task {task.name!r}, split {split!r}, row {number}"
            one = encode(tokenizer, rows[number], task.columns, where)
            longest = max(longest, len(one[0]))
            if len(one[0]) > max_length:
                counts["continued" if task.form == "text" else "left_out"] += 1
                if task.form != "text":
                    continue
            for some, these in _pieces(one, max_length):
                ids += some
                learnt += these
                lengths.append(len(some))
    if not any(learnt):
        raise ValueError(
            f"{name} has nothing to learn: {counts['left_out']} of {len(rows)} rows "
            f"are longer than `max_length` {max_length}; the longest has {longest} "
            "tokens."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    learn = np.asarray(learnt, bool)
    if task.form == "chat" and not ends.intersection(np.asarray(ids)[learn].tolist()):
        _LOG.warning(
            "%s: the chat template ends no turn with a token of its own or the end "
            "token, so that a model does not learn to stop; `stop` of models.generate "
            "takes a text, too",
            name,
        )
    return Encoded(
        name=name,
        ids=np.asarray(ids, np.int32),
        types=None,
        offsets=offsets,
        labels=np.add.reduceat(learn, offsets[:-1], dtype=np.int32),
        pad=tokenizer.pad_token_id,
        max_length=max_length,
        learn=learn,
        facts={**counts, "tokens": len(ids), "learnt_tokens": int(learn.sum())},
    )


def _pieces(sequence: _Sequence, max_length: int) -> Iterator[_Sequence]:
    ids, learnt = sequence
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        piece = slice(start, start + max_length)
        yield ids[piece], [False, *learnt[piece][1:]]


def plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, and none that a tokenizer puts around one."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opened(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, behind the token that the tokenizer opens one with, if any."""
    ids, begin = plain(tokenizer, text), tokenizer.bos_token_id
    opens = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    return [begin, *ids] if opens and ids[:1] != [begin] else ids


def _text(tokenizer: Any, row: Any, columns: tuple[str, ...], where: str) -> _Sequence:
    ids = opened(tokenizer, text_of(row, columns[0], where))
    ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise ValueError(f"{where}: column {columns[0]!r} has no text.")
    return ids, [False] + [True] * (len(ids) - 1)


def _completion(
    tokenizer: Any, row: Any, columns: tuple[str, ...], where: str
) -> _Sequence:
    prompt, completion = (text_of(row, column, where) for column in columns)
    before = prompt_ids(tokenizer, prompt, columns[0], where)
    after = [*plain(tokenizer, completion), tokenizer.eos_token_id]
    return before + after, [False] * len(before) + [True] * len(after)


def prompt_ids(tokenizer: Any, prompt: str, column: str, where: str) -> list[int]:
    """Tokens of a prompt: apart, because alone it stands when the model is used."""
    before = opened(tokenizer, prompt)
    if not before:
        raise ValueError(
            f"{where}: column {column!r} has no text; without prompts, give the "
            "completions as `text`."
        )
    return before


def _choice(
    tokenizer: Any, row: Any, columns: tuple[str, ...], where: str
) -> _Sequence:
    prompt, choices, right = choices_of(row, columns, where)
    texts = {columns[0]: prompt, columns[1]: choices[right]}
    return _completion(tokenizer, texts, columns[:2], where)


def _chat(
    tokenizer: Any,
    row: Any,
    columns: tuple[str, ...],
    where: str,
    *,
    ends: Collection[int | None],
) -> _Sequence:
    messages = [
        _message(message, f"{where}, message {i}")
        for i, message in enumerate(value_of(row, columns[0], where))
    ]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{where}: no message has the role 'assistant', whose words are learnt; "
            f"roles are {[message['role'] for message in messages]}."
        )

    def render(count: int, prompt: bool = False) -> list[int]:
        try:
            return tokenizer.apply_chat_template(
                messages[:count],
                tokenize=True,
                return_dict=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"{where}: the tokenizer's chat template refused it: {error}"
            ) from error

    ids = render(len(messages))
    learnt = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = render(i, prompt=True), render(i + 1)
        if ids[: len(through)] != through or through[: len(before)] != before:
            raise ValueError(
                f"{where}: with this chat template the tokens up to message {i} are "
                "not the first ones of the whole, so that what is said there cannot be "
                "told apart. Give prompts and completions."
            )
        end = len(through)
        # Writing stops at a turn's end; templates put a line end behind it.
        stops = (k for k in range(len(before), end) if through[k] in ends)
        end = next(stops, end - 1) + 1
        learnt[len(before) : end] = [True] * (end - len(before))
    return ids, [False, *learnt[1:]]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{where} must be {{"role": ..., "content": ...}}; got {message!r}.'
        )
    # Text only; what else a template might read would be lost.
    if set(message) != {"role", "content"}:
        raise ValueError(
            f"{where} must have 'role' and 'content' and nothing else; got "
            f"{sorted(message)}."
        )
    return {key: text_of(message, key, where) for key in ("role", "content")}
