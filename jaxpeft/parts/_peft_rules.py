"""HF PEFT's rules for which modules the fields of a config mean."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def listed(patterns: str | Sequence[str] | None, path: str, dotted: bool = True):
    """Whether a field that is a list of ends, or an expression, names a module.

    Args:
        patterns: the field's value.
        path: the module's.
        dotted: whether an end must begin at a dot; PEFT's fields differ.
    """
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    dot = "." if dotted else ""
    return any(path == p or path.endswith(dot + p) for p in patterns)


def in_layers(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``layers_to_transform`` lets a module be a target, named by its end.

    Args:
        config: its fields.
        path: the module's.
    """
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return True
    patterns = config.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){p}\.(?P<i>\d+)\." for p in patterns or ()]
    for expression in expressions or [r".*?\.[^.]*\.(?P<i>\d+)\."]:
        if match := re.match(expression, path):
            index = int(match["i"])
            return index == indices if isinstance(indices, int) else index in indices
    return False
