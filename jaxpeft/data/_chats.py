"""From a chat to sequences of tokens in which the assistant's turns are learnt."""

import os.path
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jaxpeft.data._messages import messages_of, tools_of
from jaxpeft.models import turn_end

_MARKS = re.compile(r"\{%-?\s*generation\b")


def encode_chat(
    tokenizer: Any,
    row: Mapping[str, Any],
    columns: tuple[str, ...],
    where: str,
    notes: Counter[str],
) -> list[tuple[list[int], list[bool]]]:
    """Returns a chat as token ids, and which of them are learnt.

    Each turn of the assistant is learnt behind what the model sees when it says it:
    the template's rendering of all messages before, opened for a turn. Mostly the
    rendering of a turn begins with that of the turn before, and the chat is one
    sequence. A template that rewrites history (leaves out of earlier turns what was
    thought) makes sequences of those turns, so that no turn is learnt in a form in
    which it is never said.

    Args:
      tokenizer: with a chat template.
      row: the row.
      columns: of the messages, and maybe of the tools.
      where: names the row in errors.
      notes: counts what a report should say.
    """
    messages = messages_of(row, columns[0], where)
    tools = tools_of(row, columns[1], where) if columns[1:] else None
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(
            f"{where}: no message has the role 'assistant', whose words are learnt; "
            f"roles are {roles}."
        )
    if roles[0] == "assistant":
        raise ValueError(
            f"{where}: message 0 is the assistant's, with nothing before it to answer."
        )

    def call(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        try:
            return function(*given, tools=tools, **options)
        except Exception as error:  # templates raise what they like
            raise ValueError(
                f"{where}: the tokenizer's chat template refused it: {error}"
            ) from error

    def render(count: int, prompt: bool = False) -> str:
        return call(
            tokenizer.apply_chat_template,
            messages[:count],
            tokenize=False,
            add_generation_prompt=prompt,
        )

    template = call(tokenizer.get_chat_template)
    _note_unread(messages, tools, template, where, notes)
    marked = _MARKS.search(template) and getattr(tokenizer, "is_fast", False)
    # Each: the text, what of it is learnt, and how many messages it is of.
    parts: list[tuple[str, list[tuple[int, int]], int]] = []
    for i, role in enumerate(roles):
        if role != "assistant":
            continue
        text, span, count = _turn(tokenizer, render, messages, i, where, notes)
        if parts and text.startswith(parts[-1][0]):
            parts[-1] = text, [*parts[-1][1], span], count
        else:
            parts.append((text, [span], count))
    whole = render(len(messages))
    if parts[-1][2] and whole.startswith(parts[-1][0]):
        parts[-1] = whole, parts[-1][1], len(messages)
    notes["chats_by_turns"] += len(parts) > 1
    found = []
    for text, spans, count in parts:
        ids, learnt = _learnt(tokenizer, text, spans, where)
        if marked and count:
            marks = call(
                tokenizer.apply_chat_template,
                messages[:count],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            spanned, learnt = learnt, [bool(m) for m in marks["assistant_masks"]]
            # Earlier turns of a rewritten history are learnt in their own sequences.
            first = spanned.index(True) if any(spanned) else 0
            learnt[:first] = [False] * first
        ends = _ends(tokenizer)
        stops = any(i in ends for i, learn in zip(ids, learnt, strict=True) if learn)
        notes["chats_without_end"] += not stops
        learnt[0] = False
        if not any(learnt):
            raise ValueError(f"{where}: no token of what the assistant says is learnt.")
        found.append((ids, learnt))
    return found


def _turn(
    tokenizer: Any,
    render: Callable[..., str],
    messages: list[dict[str, Any]],
    i: int,
    where: str,
    notes: Counter[str],
) -> tuple[str, tuple[int, int], int]:
    """The text up to a turn's end, where in it the turn stands, of how many messages.

    No messages: it is no rendering of the template, but put together out of two.
    """
    base, prompt, text = render(i), render(i, prompt=True), render(i + 1)
    if not (prompt.startswith(base) and text.startswith(base)):
        raise ValueError(
            f"{where}: with this chat template the tokens up to message {i} are not "
            "the first ones of the whole, so that what is said there cannot be told "
            "apart. Give prompts and completions."
        )
    said, count = messages[i].get("content", ""), i + 1
    start = len(os.path.commonprefix([prompt, text]))
    if _dense(said) not in _dense(text[len(base) :]):
        # The template leaves out a part of what is said, even of the last turn.
        text = _written(base, prompt, text, said, where, i)
        start, count = len(prompt), 0
    elif start < len(prompt):  # the turn is not written as it is opened
        place = text.find(said.strip(), len(base))
        start = start if place < 0 else min(start, place)
        notes["borders_moved"] += 1
    # Writing stops at a turn's end; templates put a line end behind it.
    ends = tokenizer.convert_ids_to_tokens(sorted(_ends(tokenizer)))
    places = [text.find(end, start) + len(end) for end in ends if end in text[start:]]
    return text, (start, min(places, default=len(text))), count


def _written(base: str, prompt: str, text: str, said: str, where: str, i: int) -> str:
    """The prompt, all that is said, and what the template closes a turn with."""
    said = said.rstrip()
    least, most = 0, len(said)  # the longest end of it that the template has written
    while least < most:
        middle = (least + most) // 2
        if said[middle:] in text[len(base) :]:
            most = middle
        else:
            least = middle + 1
    if not said[least:].strip():
        raise ValueError(
            f"{where}: the chat template does not write what message {i} says, so that "
            "it cannot be learnt. Give prompts and completions."
        )
    closing = text[text.rindex(said[least:]) + len(said[least:]) :]
    # The prompt may open what is thought already.
    opening, rest = prompt[len(base) :].rstrip(), said.lstrip()
    given = next(
        (n for n in range(len(opening), 0, -1) if rest.startswith(opening[-n:])), 0
    )
    return prompt + (rest[given:].lstrip() if given else said) + closing


def _learnt(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], where: str
) -> tuple[list[int], list[bool]]:
    """Tokens of a text, and whether each is of one of the spans of characters."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learnt = [
            any(begin < end and at < stop for begin, stop in spans)
            for at, end in found["offset_mapping"]
        ]
        return found["input_ids"], learnt
    tokens = lambda upto: tokenizer(text[:upto], add_special_tokens=False)["input_ids"]
    ids = tokens(len(text))
    learnt = [False] * len(ids)
    for span in spans:
        begin, stop = (tokens(place) for place in span)
        if ids[: len(stop)] != stop or ids[: len(begin)] != begin:
            raise ValueError(
                f"{where}: a token reaches over the border of a turn, and this "
                "tokenizer does not say which characters a token is of. Load the fast "
                "one, or give prompts and completions."
            )
        learnt[len(begin) : len(stop)] = [True] * (len(stop) - len(begin))
    return ids, learnt


def _ends(tokenizer: Any) -> set[int]:
    """The tokens after which a turn has ended."""
    own = {tokenizer.eos_token_id, turn_end(tokenizer)}
    return {token for token in own if token is not None}


def _note_unread(
    messages: list[dict[str, Any]],
    tools: Any,
    template: str,
    where: str,
    notes: Counter[str],
) -> None:
    """Counts what the template never asks for; it does not reach the model."""
    read = {"role", "content", *re.findall(r"\w+", template)}
    for i, message in enumerate(messages):
        unread = [key for key in message if key not in read]
        for key in unread:
            notes[f"unread {key}"] += 1
        if "content" not in message and len(unread) == len(message) - 1:
            raise ValueError(
                f"{where}, message {i} has no 'content', and the chat template does "
                f"not read {', '.join(map(repr, unread))}, so that nothing is said."
            )
    if tools is not None and "tools" not in read:
        notes["unread tools"] += 1


def _dense(text: str) -> str:
    return "".join(text.split())
