"""Sections of a config written as calls: ``"kasa(rank=8, alpha=16)"``."""

import ast
import re
from pathlib import Path
from typing import Any

import ml_collections

# Fields of a run that name a function and give it arguments.
CALLS = ("adapter", "data", "ranks.before", "ranks.during")


def read_call(text: str, field: str = "adapter") -> dict[str, Any]:
    """Reads a name and its arguments; nothing is evaluated.

    Args:
        text: ``"kasa"`` or ``"kasa(rank=8, alpha=16)"``. The name may have slashes
            (``"opinions/movies"``), arguments have names, values are literals of
            Python: numbers, text, True, False, None, tuples, lists, dictionaries.
        field: where it stands in the config, for messages.

    Returns:
        ``{"name": "kasa", "rank": 8, "alpha": 16}``.

    Raises:
        ValueError: it is no such call; what is wrong, and how to write it.

    Example:
        >>> read_call("texts(train='mine.jsonl', labels=('no', 'yes'))", "data")
        {'name': 'texts', 'train': 'mine.jsonl', 'labels': ('no', 'yes')}
        >>> read_call("opinions/movies")
        {'name': 'opinions/movies'}
    """
    said = f"`config.{field}` {text!r}"
    found = re.fullmatch(r"\s*([^\s()]+)\s*(\(.*\))?\s*", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{said} is no call; write name or name(argument=value, ...).")
    name, arguments = found[1], found[2] or "()"
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
    except (SyntaxError, ValueError) as error:  # a null byte is the latter
        raise ValueError(
            f"{said}: what stands in brackets cannot be read ({error}); write "
            f"{name}(argument=value, ...), text in quotation marks."
        ) from error
    # "f(1)(2)" is a call, too, of something that is no name.
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(f"{said} is more than one call.")
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(
            f"{said} has an argument without a name; write {name}(argument=value)."
        )
    read: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        if keyword.arg == "name" or keyword.arg in read:
            raise ValueError(f"{said} says {keyword.arg} twice.")
        try:
            read[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError) as error:
            source = ast.unparse(keyword.value)
            raise ValueError(
                f"{said}: {keyword.arg}={source} is no number, text, True, False, "
                "None, tuple, list or dictionary; nothing is evaluated, and text needs "
                f"quotation marks: {keyword.arg}={source!r}."
            ) from error
    return {"name": name, **read}


def with_calls(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Writes out the sections of a config that are written as calls.

    Args:
        config: of which ``adapter``, ``data``, ``ranks.before`` or ``ranks.during`` may
            be text; of ranks ``""`` is ``None``. ``ranks.before`` may also name a file:
            text without brackets, or of a file that is there, stays.

    Returns:
        The config itself, changed in place; sections have ``name`` and arguments.

    Raises:
        ValueError: as ``read_call``.

    Example:
        >>> config = ml_collections.ConfigDict({"adapter": "lora(rank=4)"})
        >>> with_calls(config).adapter.rank
        4
    """
    for field in CALLS:
        *parents, last = field.split(".")
        holder: Any = config
        for parent in parents:
            holder = holder.get(parent) if _is_section(holder) else None
        if not _is_section(holder) or not isinstance(holder.get(last), str):
            continue
        text = holder[last]
        if field == "ranks.before" and text:
            if "(" not in text or Path(text).is_file():
                continue
        new = None
        if text or not parents:
            new = ml_collections.ConfigDict(read_call(text, field))
        with holder.ignore_type(), holder.unlocked():
            holder[last] = new
    return config


def _is_section(value: Any) -> bool:
    return isinstance(value, ml_collections.ConfigDict)
