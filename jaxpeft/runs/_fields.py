"""The fields of a config: what each may be."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections

from jaxpeft.numerics import KINDS
from jaxpeft.runs._arguments import check_finite_numbers
from jaxpeft.runs._config import count_steps, near_names
from jaxpeft.training import flat_config, new_name


class _Field(NamedTuple):
    fits: Callable[[Any], bool]
    words: str


def _whole_number(least: int, most: int = 2**31 - 1) -> _Field:
    fits = lambda x: isinstance(x, int) and not isinstance(x, bool)
    words = f"a whole number from {least} to {most}"
    return _Field(lambda x: fits(x) and least <= x <= most, words)


def _or_none(field: _Field) -> _Field:
    return _Field(lambda x: x is None or field.fits(x), f"{field.words}, or None")


def _listed(each: Callable[[Any], bool], words: str) -> _Field:
    fits = lambda x: isinstance(x, tuple | list) and all(map(each, x))
    return _Field(fits, f"a tuple of {words}")


def _is_length(text: Any) -> bool:
    try:
        return isinstance(text, str) and count_steps(text, 1, field="") > 0
    except ValueError:
        return False


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_floating(name: Any) -> bool:
    try:
        return isinstance(name, str) and jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


def _is_named_section(value: Any) -> bool:
    named = isinstance(value, ml_collections.ConfigDict) and "name" in value
    return named and isinstance(value.name, str) and value.name != ""


_is_text = lambda value: isinstance(value, str)
_is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
_TEXT = _Field(_is_text, "text")
_BOOL = _Field(lambda value: isinstance(value, bool), "True or False")
_NAME = _Field(lambda value: _is_text(value) and value != "", "a name")
_DTYPE = _or_none(_Field(_is_floating, "a floating dtype, such as 'bfloat16'"))
_LENGTH = _Field(_is_length, "a length above zero, '200 steps' or '3 epochs'")
_NAMES = _listed(lambda x: _is_text(x) and x != "", "names")
_SITES = _Field(
    lambda value: _is_text(value) or _NAMES.fits(value),
    "a tuple of names, a regular expression or 'all-linear'",
)
_PAIRS = _listed(_is_pair, "pairs (site, value)")
_SECTION = _Field(_is_named_section, "a section with a name: dict(name=..., ...)")

# Where a run stands and what it shows: a resumed run may do it differently, and its
# numbers are the same.
FREE = ("mesh", "input", "log")
# Sections whose fields are the arguments of something else.
FREE_SECTIONS = ("data", "adapter", "optimizer", "stage_changes", "mesh")
FIELDS: dict[str, _Field] = {
    "seed": _whole_number(0, 2**32 - 1),
    "model.name": _NAME,
    "model.dtype": _DTYPE,
    "model.param_dtype": _DTYPE,
    "model.scan_layers": _BOOL,
    "model.remat": _or_none(_TEXT),
    "model.attention": _or_none(_TEXT),
    "model.quantise": _or_none(
        _Field(lambda x: _is_text(x) and x in KINDS, f"one of {', '.join(KINDS)}")
    ),
    "model.dropout": _BOOL,
    "tokenizer.pad_token": _or_none(_TEXT),
    "tokenizer.eos_token": _or_none(_TEXT),
    "tokenizer.chat_template": _or_none(_TEXT),
    "data": _SECTION,
    "max_length": _whole_number(1),
    "lengths": _Field(
        lambda x: (
            isinstance(x, tuple | list)
            and len(x) > 0
            and all(map(_whole_number(1).fits, x))
            and list(x) == sorted(set(x))
        ),
        "a tuple of rising whole numbers",
    ),
    "batch_size": _whole_number(1),
    "eval_batch_size": _whole_number(1),
    "accumulate": _whole_number(1),
    "adapter": _SECTION,
    "start": _TEXT,
    "stage": _TEXT,
    "stages": _NAMES,
    "stage_changes": _Field(
        lambda x: isinstance(x, ml_collections.ConfigDict), "a section"
    ),
    "targets": _SITES,
    "exclude": _SITES,
    "rank_pattern": _PAIRS,
    "alpha_pattern": _PAIRS,
    "ranks.before": _or_none(
        _Field(
            lambda x: _is_named_section(x) or (_is_text(x) and x != ""),
            "a file, a name of jaxpeft.allocate, or dict(name=..., ...)",
        )
    ),
    "ranks.during": _or_none(_SECTION),
    "head": _NAMES,
    "optimizer": _Field(
        lambda x: isinstance(x, ml_collections.ConfigDict), "a section"
    ),
    "clip_norm": _or_none(
        _Field(lambda x: _is_number(x) and 0 < x < math.inf, "a number above 0")
    ),
    "train_for": _LENGTH,
    "evaluate_every": _LENGTH,
    "save_every": _Field(
        lambda x: _is_text(x) and _is_length(x.removesuffix(", kept")),
        "a length above zero, '50 steps' or '50 steps, kept'",
    ),
    "mesh": _Field(lambda x: isinstance(x, ml_collections.ConfigDict), "a section"),
    "input.workers": _or_none(_whole_number(0, 1024)),
    "input.prefetch": _whole_number(0, 1024),
    "log.every": _whole_number(1),
    "log.tensorboard": _BOOL,
    "log.compilation_cache": _TEXT,
}


def check_fields(config: ml_collections.ConfigDict) -> None:
    """Raises unless a config has the fields of a run, each with a possible value.

    Args:
        config: of ``load_config``.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of range; its
            name, its value and what it may be are in the message.

    Example:
        >>> check_fields(ml_collections.ConfigDict({"seed": -1}))
        Traceback (most recent call last):
        ...
        ValueError: `config.seed` must be a whole number from 0 to 4294967295, got -1.
    """
    found = {}
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        if inner and name not in FREE_SECTIONS:
            found |= {f"{name}.{key}": value[key] for key in value}
        else:
            found[name] = value
    for name in found:
        if now := new_name(name):
            raise ValueError(f"`config.{name}` is `config.{now}` now; write that.")
        if name not in FIELDS:
            raise ValueError(
                f"`config.{name}`: a run has no such field; nearest: "
                f"{near_names(name, FIELDS) or sorted(FIELDS)}."
            )
    for name, field in FIELDS.items():
        if name not in found:
            raise ValueError(
                f"`config.{name}` is missing; it is {field.words}, see "
                "configs/quickstart.py."
            )
        if not field.fits(found[name]):
            shown = found[name]
            if isinstance(shown, ml_collections.ConfigDict):
                shown = shown.to_dict()
            raise ValueError(
                f"`config.{name}` must be {field.words}, got {_cut_short(shown)}."
            )
    for name, value in flat_config(config).items():
        check_finite_numbers(value, f"`config.{name}`")


def _cut_short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
