"""A run's config as JSON, and where two of them differ."""

import json
from collections.abc import Sequence
from typing import Any

import ml_collections

# What fields were called in configs and folders of runs from before. A config that is
# read has the new names.
_RENAMED = {"allocation": "ranks.before", "allocate": "ranks.during"}
# Fields that came later, ``section.field``: the value of before, and a field beside
# which they stand in every run's config.
_ADDED = {
    "model.attention": (None, "model.remat"),
    "model.quantise": (None, "model.remat"),
    "input.workers": (0, "mesh.data"),
    "input.prefetch": (0, "mesh.data"),
}


def new_name(field: str) -> str:
    """Returns what a field of a config is called now, empty where that is its name.

    Example:
        >>> new_name("allocate.target_rank"), new_name("adapter.rank")
        ('ranks.during.target_rank', '')
    """
    first, dot, rest = field.partition(".")
    return _RENAMED[first] + dot + rest if first in _RENAMED else ""


def with_new_names(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config from before with the names that its fields have now.

    Args:
        config: a run's, with old names or new ones.

    Returns:
        the config that was given where no name is old, else a copy, as locked as it.

    Raises:
        ValueError: a field is there under both names, with two values.

    Example:
        >>> print(with_new_names(ml_collections.ConfigDict({"allocate": None})))
        ranks:
          during: null
        <BLANKLINE>
    """
    if not _old_names(config):
        return config
    changed = config.copy_and_resolve_references().unlock()
    for part, old in _old_names(changed):
        section, _, field = _RENAMED[old].partition(".")
        value = part[old]
        del part[old]
        if section not in part:
            part[section] = {}
        there = part[section]
        if isinstance(there, ml_collections.ConfigDict) and there.get(field) is None:
            there[field] = value
        elif value is not None:
            raise ValueError(
                f"`config.{old}` is `config.{section}.{field}` now, and both are "
                "given; write the second alone."
            )
    return changed.lock() if config.is_locked else changed


def _old_names(config: ml_collections.ConfigDict) -> list[tuple[Any, str]]:
    """``(config or section of stage_changes, old name in it)``, for each."""
    is_section = lambda value: isinstance(value, ml_collections.ConfigDict)
    changes = config.get("stage_changes")
    sections = [config, *(changes.values() if is_section(changes) else ())]
    return [
        (x, old) for x in filter(is_section, sections) for old in _RENAMED if old in x
    ]


def _lacking(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """``{"section.field": value}`` of what a run's config from before lacks."""
    there = flat_config(config)
    return {
        field: value
        for field, (value, beside) in _ADDED.items()
        if beside in there and field not in there
    }


def flat_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns ``{"adapter.rank": 8, ...}``, one entry for each value of the config.

    Example:
        >>> flat_config(ml_collections.ConfigDict({"seed": 0, "adapter": {"rank": 8}}))
        {'adapter.rank': 8, 'seed': 0}
    """
    flat = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{key}.{name}": v for name, v in flat_config(value).items()}
        else:
            flat[key] = value
    return flat


def config_to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the config as JSON, sorted and indented; tuples become lists.

    Raises:
        TypeError: a value that JSON has no form for.
    """
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def config_from_json(text: str) -> ml_collections.ConfigDict:
    """Returns the locked config that :func:`config_to_json` wrote, lists as tuples.

    Fields have the names of now (``with_new_names``), and those of a run from before
    they were there say what was done without them.

    Example:
        >>> config = ml_collections.ConfigDict({"targets": ("query", "key")}).lock()
        >>> config_from_json(config_to_json(config)) == config
        True
    """
    read = ml_collections.ConfigDict(_with_tuples(json.loads(text)))
    for name, value in _lacking(read).items():
        section, _, field = name.partition(".")
        if section not in read:
            read[section] = {}
        read[section][field] = value
    return with_new_names(read).lock()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(v) for key, v in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def config_differences(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    *,
    free: Sequence[str] = (),
) -> list[str]:
    """Returns one line for each field that differs, ``"adapter.rank: 8, now 16"``.

    Values are compared in their JSON form, so a list equals a tuple.

    Args:
        old: what there was.
        new: what is now.
        free: fields and sections that may differ, ``"mesh"`` or ``"log.every"``.

    Returns:
        the lines, sorted by field.

    Example:
        >>> old, new = ({"rank": r, "seed": 0} for r in (8, 16))
        >>> config_differences(*map(ml_collections.ConfigDict, (old, new)))
        ['rank: 8, now 16']
    """
    before, after = (
        flat_config(config_from_json(config_to_json(c))) for c in (old, new)
    )
    absent = object()
    show = lambda value: "absent" if value is absent else repr(value)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(f"{key}.".startswith(f"{name}.") for name in free):
            continue
        was, now = before.get(key, absent), after.get(key, absent)
        if was is absent or now is absent or was != now:
            lines.append(f"{key}: {show(was)}, now {show(now)}")
    return lines
