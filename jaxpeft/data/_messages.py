"""A chat of a row as messages that chat templates read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.data._labels import text_of
from jaxpeft.data._task import value_of

# What ShareGPT's files call those who speak.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def is_chat(value: Any) -> bool:
    """Whether a value is read as messages, and not as a text."""
    return isinstance(value, Mapping) or _listed(value)


def messages_of(
    row: Mapping[str, Any], column: str, where: str
) -> list[dict[str, Any]]:
    """Returns the messages of a row: each with "role", most with "content".

    Nulls are left out; of content in parts the texts are joined; ShareGPT's "from" and
    "value" become "role" and "content". All else is as it stands, for the template.
    """
    given = value_of(row, column, where)
    if isinstance(given, Mapping) and all(_listed(v) for v in given.values()):
        if len({len(v) for v in given.values()}) == 1:  # TFDS's list of mappings
            columns = zip(*given.values(), strict=True)
            given = [dict(zip(given, values, strict=True)) for values in columns]
    if not _listed(given) or not len(given):
        raise ValueError(
            f"{where}: column {column!r} must be a list of messages; got {given!r}."
        )
    return [_message(one, f"{where}, message {i}") for i, one in enumerate(given)]


def tools_of(row: Mapping[str, Any], column: str, where: str) -> list[Any] | None:
    """Returns the tools that a chat may call: a list, or JSON of one; None: none."""
    tools = row.get(column)
    if isinstance(tools, str | bytes):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: column {column!r} is not JSON ({error}): {tools[:60]!r}."
            ) from None
    if tools is None or (_listed(tools) and not len(tools)):
        return None
    if not _listed(tools):
        raise ValueError(
            f"{where}: column {column!r} must be a list of tools, or JSON of one; got "
            f"{tools!r}."
        )
    return list(tools)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f'{where} must be {{"role": ..., "content": ...}}; got {message!r}.'
        )
    found = {key: value for key, value in message.items() if value is not None}
    if "from" in found and "role" not in found:
        speaker = text_of(found, "from", where)
        if speaker not in _SPEAKERS:
            raise ValueError(
                f"{where}: 'from' {speaker!r} is none of {', '.join(_SPEAKERS)}."
            )
        found["role"] = _SPEAKERS[speaker]
        del found["from"]
        if "value" in found:
            found["content"] = found.pop("value")
    if "role" not in found:
        raise ValueError(
            f"{where} has no 'role' (or, as in ShareGPT's files, 'from'); it has "
            f"{sorted(found)}."
        )
    found["role"] = text_of(found, "role", where)
    if _listed(found.get("content")):
        parts = [_part(part, where) for part in found["content"]]
        found["content"] = "".join(parts)
    elif "content" in found:
        found["content"] = text_of(found, "content", where)
    elif found["role"] != "assistant" or len(found) == 1:
        raise ValueError(f"{where}, of the role {found['role']!r}, has no 'content'.")
    return found


def _part(part: Any, where: str) -> str:
    if isinstance(part, str | bytes):
        part = {"text": part}
    kind = part.get("type", "text") if isinstance(part, Mapping) else part
    if kind not in ("text", b"text"):
        raise ValueError(
            f"{where}: a part of its content is {kind!r}; a language model reads "
            'parts {"type": "text", "text": ...} alone.'
        )
    return text_of(part, "text", where)


def _listed(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
