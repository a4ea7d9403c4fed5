"""A text out of a row: a column, or a template with columns in braces."""

import numbers
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.data._labels import text_of
from jaxpeft.data._task import value_of


def is_template(source: str) -> bool:
    """Whether it has braces, as no name of a column has."""
    return "{" in source or "}" in source


def read_text(row: Mapping[str, Any], source: str, where: str) -> str:
    r"""Returns a row's text in a column, or a template filled with its columns.

    Args:
      row: the row.
      source: the name of a column; or a template, "Q: {question}\nA:". A "/" in the
        name of a column goes into one of several parts, "{question/stem}"; numbers
        are written as Python does; "{{" is a brace.
      where: names the row in errors.
    """
    if source in row or not is_template(source):
        return text_of(row, source, where)
    written = ""
    for text, field in pieces(source, "template"):
        written += text
        if field:
            value = inside(row, field, where)
            if isinstance(value, np.ndarray) and value.ndim == 0:  # what TFDS gives
                value = value.item()
            if isinstance(value, numbers.Number) and not isinstance(value, bool):
                value = str(value)
            written += text_of({field: value}, field, where)
    return written


def pieces(template: str, argument: str) -> list[tuple[str, str]]:
    """A template's literal texts, and the column behind each; "" behind the last."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`{argument}` {template!r} is no template: {error}."
        ) from None
    if not any(field for _, field, _, _ in parts) or any(
        field == "" or spec or conversion for _, field, spec, conversion in parts
    ):
        raise ValueError(
            f"`{argument}` {template!r} must have columns in braces, and no more than "
            "their names: '{question}'."
        )
    return [(text, field or "") for text, field, _, _ in parts]


def inside(row: Mapping[str, Any], column: str, where: str) -> Any:
    """Returns the value of a column, or of a part of one: "question/stem"."""
    if column in row:
        return value_of(row, column, where)
    first, _, rest = column.partition("/")
    value = value_of(row, first if rest else column, where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: column {first!r} has no parts, as {column!r} asks.")
    return inside(value, rest, where)
