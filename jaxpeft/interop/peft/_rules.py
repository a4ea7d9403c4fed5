"""HF PEFT's rules for which modules the fields of a config mean.

A config is a mapping of its fields, ``json.load`` of an ``adapter_config.json``; a
field that is left out has PEFT's default. A module is named as PEFT names it, by its
dotted path: ``"encoder.layer.0.attention.self.query"``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.models import ModuleName
from jaxpeft.tree import OUTPUT_HEADS

ALL_LINEAR = "all-linear"  # PEFT reads it in capitals, too
NO_TARGETS = "dummy-target-modules"  # PEFT's own word for an empty list
_TYING = ("embed_tokens", "lm_head")  # by which PEFT knows what may be tied


def is_target(config: Mapping[str, Any], path: str, kind: str) -> bool:
    """Whether ``target_modules`` and what restricts it make a module a target.

    ``exclude_modules`` and ``modules_to_save`` leave out what is named by either;
    ``layers_to_transform`` restricts what a list names by its end, not what it names
    by its whole path, and not what an expression matches.

    Args:
        config: its fields.
        path: the module's.
        kind: of ``ModuleName``; a norm is no target.
    """
    if not (names := target_entries(config, path, kind)):
        return False
    if listed(config.get("exclude_modules"), path) or is_saved_whole(config, path):
        return False
    is_list = not isinstance(config["target_modules"], str)
    by_end = is_list and path not in names
    return not by_end or in_layers(config, path)


def target_entries(config: Mapping[str, Any], path: str, kind: str) -> list[str]:
    """The entries of ``target_modules`` that name a module.

    Fields that leave modules out are not looked at: an entry is no mistake if all that
    it names is left out.

    Args:
        config: its fields.
        path: the module's.
        kind: of ``ModuleName``.

    Returns:
        The entries, or the whole field where that is one string.
    """
    wanted = config.get("target_modules")
    if wanted is None or kind == "norm":
        return []
    if not isinstance(wanted, str):
        return [entry for entry in wanted if listed([entry], path)]
    if wanted.lower() == ALL_LINEAR:
        linear = kind in ("linear", "conv1d")
        hit = linear and path.rpartition(".")[2] not in OUTPUT_HEADS
    else:
        hit = re.fullmatch(wanted, path) is not None
    return [wanted] if hit else []


def is_saved_whole(config: Mapping[str, Any], path: str) -> bool:
    """Whether a module lies in one that ``modules_to_save`` names.

    Args:
        config: its fields.
        path: the module's.
    """
    return any(
        re.match(rf"(^|.*\.){entry}($|\..*)", path)
        for entry in config.get("modules_to_save") or ()
    )


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


def fitting_pattern(patterns: Mapping[str, Any] | None, path: str) -> str | None:
    """The key of ``rank_pattern`` or ``alpha_pattern`` that decides about a module.

    Args:
        patterns: the field's value.
        path: the module's.

    Returns:
        The first key that fits, in the order of the file; ``None``: no key fits.
    """
    for pattern in patterns or ():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return pattern
    return None


def by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value that ``rank_pattern`` or ``alpha_pattern`` has for a module.

    Args:
        patterns: the field's value.
        path: the module's.
        otherwise: the value where no key fits.
    """
    found = fitting_pattern(patterns, path)
    return otherwise if found is None else patterns[found]


def with_tied(config: Mapping[str, Any], names: Sequence[ModuleName]) -> dict[str, Any]:
    """The config with what ``ensure_weight_tying`` adds to its lists of modules.

    It puts embedding and head among the targets, or among what is saved whole, where
    one of the two is there under a name that PEFT knows.

    Args:
        config: its fields.
        names: rows of the model; those that are tied say which two belong together.
    """
    pair = [name for row in names if row.tied for name in (row.theirs, row.tied)]
    if not config.get("ensure_weight_tying") or not pair:
        return dict(config)
    known = lambda name: name.rpartition(".")[2] in _TYING
    saved = config.get("modules_to_save") or ()
    wanted = config.get("target_modules") or ()
    if any(map(known, saved)):
        return config | {"modules_to_save": [*saved, *pair]}
    if isinstance(wanted, str):
        either = "|".join([f"(?:{wanted})", *map(re.escape, pair)])
        hit = any(re.fullmatch(wanted, name) for name in _TYING)
        return config | ({"target_modules": either} if hit else {})
    hit = any(map(known, wanted))
    return config | ({"target_modules": [*wanted, *pair]} if hit else {})
