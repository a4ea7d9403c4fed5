"""Arguments that come as values out of a file or a command line."""

import collections.abc
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any


def check_arguments(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    say: Callable[[str], str] = "`{}`".format,
) -> None:
    """Raises unless values are of the types that a function's annotations say.

    Numbers must be finite, too. What an annotation says beyond plain values (arrays,
    trees) is the function's own to check.

    Args:
        function: what is to be called.
        arguments: ``{its argument: value}``.
        say: what an argument is called in a message.

    Raises:
        ValueError: a value of another type, or a number that is not finite.

    Example:
        >>> def f(rank: int, alpha: float | None = None): ...
        >>> check_arguments(f, {"rank": 8, "alpha": 16})
        >>> check_arguments(f, {"rank": "8"})
        Traceback (most recent call last):
        ...
        ValueError: `rank` must be a whole number, got '8'.
    """
    hints = typing.get_type_hints(function)
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            raise ValueError(
                f"{say(name)} must be {_words(hints[name])}, got {value!r}."
            )
        check_finite_numbers(value, say(name))


def check_finite_numbers(value: Any, called: str) -> None:
    """Raises if a value, or one inside it, is a number that is not finite."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            check_finite_numbers(one, called)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{called} must be a finite number, got {value}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; an int is a float, too."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inside)
    if origin is typing.Literal:
        return value in inside
    if origin in (tuple, list, collections.abc.Sequence):
        each = [one for one in inside if one is not Ellipsis]
        alike = origin is not tuple or Ellipsis in inside
        if not isinstance(value, list | tuple):
            return False
        if alike:
            return not each or all(fits(one, each[0]) for one in value)
        return len(value) == len(each) and all(map(fits, value, each))
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint in (str, bool, types.NoneType):
        return isinstance(value, hint)
    return True


def _words(hint: Any) -> str:
    """What an annotation says, for a message."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(_words(one) for one in inside)
        if "a number" in words:
            words.pop("a whole number", None)
        return " or ".join(words)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inside))}"
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "True or False",
        types.NoneType: "None",
    }
    if hint in plain:
        return plain[hint]
    if origin is None:
        return getattr(hint, "__name__", str(hint))
    inside = ", ".join("..." if x is Ellipsis else _words(x) for x in inside)
    return f"{origin.__name__.lower()} ({inside})"
