"""Text and label of a row, with errors that name the row."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpeft.data._task import Task, listed, near_misses, value_of


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """Returns the row's text in a column as str, decoding bytes as UTF-8."""
    value = value_of(row, column, where)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: column {column!r} is not UTF-8 text: {value[:60]!r} ..."
            ) from error
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: column {column!r} must be text; got {type(value).__name__} "
            f"{value!r}."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: column {column!r} has a lone surrogate, half of a character: "
            f"{value[:60]!r} ..."
        ) from None
    return value


def label_reader(
    task: Task,
) -> Callable[[Mapping[str, Any], str], int | float]:
    """Returns what reads a row's label: a class id, or a finite number for regression.

    A class may be given by its id or by its name. Where a name reads like a number
    ("1" to "5" for stars), numbers are taken for names, so that a label 5 means the
    class called "5" and never the sixth.

    Args:
      task: the task; its classes are put into a table here, once for all rows.

    Returns:
      ``(row, where) -> label``; `where` names the row in errors.
    """
    if task.labels is None:
        return lambda row, where: _number(_label(task, row, where), task.label, where)
    names = task.labels
    ids = {name: i for i, name in enumerate(names)}
    numeric = any(map(_reads_as_integer, names))

    def read(row: Mapping[str, Any], where: str) -> int:
        value = _label(task, row, where)
        at = f"{where}: `label` {value!r}"
        if isinstance(value, numbers.Integral):  # bool is one: False, True are 0, 1
            if numeric:
                value = str(int(value))
            elif 0 <= value < len(names):
                return int(value)
            else:
                raise ValueError(
                    f"{at} is outside the {len(names)} classes, which are 0 to "
                    f"{len(names) - 1}: {listed(names)}."
                )
        if not isinstance(value, str):
            raise ValueError(
                f"{at} is a {type(value).__name__}; a class is its integer id or its "
                f"name, one of {listed(names)}. For regression, write labels=None."
            )
        if value in ids:
            return ids[value]
        hint = near_misses(value, names)
        if _reads_as_integer(value) and not numeric:
            texts = listed([repr(str(i)) for i in range(len(names))])
            hint += f" For a column of class ids as text, write labels=[{texts}]."
        raise ValueError(f"{at} is none of the class names.{hint}")

    return read


def plain(value: Any) -> Any:
    """Returns a value of Python's own: TFDS gives arrays without axes, and bytes."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _label(task: Task, row: Mapping[str, Any], where: str) -> Any:
    return plain(value_of(row, task.label, where))


def _number(value: Any, column: str, where: str) -> float:
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: column {column!r} must be a number for regression; got "
            f"{value!r}. For classes, give their names: labels=[...]."
        ) from None
    # Asked of the float32 the model trains on: 1e39 is finite only before it is cast.
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(
            f"{where}: column {column!r} must be finite in float32; got {value!r}."
        )
    return number


def _reads_as_integer(name: str) -> bool:
    return name.strip().removeprefix("-").isdecimal()
