"""Lines of fields: CSV, in which marks quote, and TSV, in which they are text."""

import csv
import re
from collections.abc import Iterator
from itertools import islice
from os import PathLike

from jaxpeft.data._lines import read_lines

# A quoted field; what is once taken is not given back, so a mark that is one of two
# closes nothing.
_FIELD = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')


def read_records(
    path: str | PathLike, delimiter: str, quoting: bool | None, encoding: str | None
) -> Iterator[tuple[int, list[str]]]:
    r"""Yields the line that each record ends on, and its fields; blank lines are none.

    Args:
      path: the file.
      delimiter: one character.
      quoting: whether ``"..."`` quotes; None: not between tabs, where then a field that
        is quoted for certain is an error.
      encoding: as in `read_lines`.

    Raises:
      ValueError: as `jaxpeft.data.read_csv` says.
    """
    if quoting or (quoting is None and delimiter != "\t"):
        yield from _quoted(path, delimiter, encoding)
        return
    for number, line in enumerate(read_lines(path, encoding), 1):
        # One line end: a field may end in a "\r" of its own.
        line = line.removesuffix("\n").removesuffix("\r")
        if not line:
            continue
        fields = line.split(delimiter)
        if quoting is None and '"' in line:
            _refuse_quoted(path, number, fields, first=number == 1)
        yield number, fields


def _refuse_quoted(path, number: int, fields: list[str], *, first: bool) -> None:
    """Raises if fields of a TSV file are quoted, though no one said so."""
    for field in fields:
        in_marks = len(field) > 1 and field[0] == field[-1] == '"'
        # In marks and doubled inside, or a column's name in marks: a writer quoted it.
        if in_marks and (first or ('""' in field[1:-1] and _FIELD.fullmatch(field))):
            raise ValueError(
                f"{path}, line {number}: the field {field[:40]!r} looks quoted, and "
                "TSV knows no quoting. Write quoting=True where marks quote, or "
                "quoting=False where they are a part of the text."
            )


def _quoted(path, delimiter: str, encoding) -> Iterator[tuple[int, list[str]]]:
    # One limit for all of the process, 131,072 characters. It is not lowered again:
    # another thread may be reading.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    # Strict: else text behind a closing mark loses its marks, and a file that ends
    # within a field is taken for whole.
    records = csv.reader(read_lines(path, encoding), delimiter=delimiter, strict=True)
    while True:
        first = records.line_num + 1
        try:
            fields = next(records, None)
        except csv.Error:
            lines = islice(read_lines(path, encoding), first - 1, records.line_num)
            raise ValueError(
                f"{path}, {_fault(''.join(lines), first, delimiter)}. A field "
                "with marks, delimiters or line ends stands in marks as a whole, each "
                'mark in it written twice: "say ""hi""". Where marks are a part of the '
                "text, write quoting=False."
            ) from None
        if fields is None:
            return
        if fields:
            yield records.line_num, fields


def _fault(record: str, first: int, delimiter: str) -> str:
    """What is wrong with a record, and on which line of the file."""
    on = lambda place: f"line {first + record.count(chr(10), 0, place)}"
    start = 0
    while start < len(record):
        if record[start] != '"':
            end = record.find(delimiter, start)
        elif field := _FIELD.match(record, start):
            end = field.end()
            if record[end : end + 1] not in ("", delimiter, "\r", "\n"):
                return (
                    f"{on(end)}: text stands behind the mark that closes the field "
                    f"opened on {on(start)}"
                )
        else:
            return (
                f"{on(start)}: a quotation mark opens a field there and none closes "
                "it, so that the field would be the rest of the file"
            )
        if record[end : end + 1] != delimiter:
            break
        start = end + 1
    return f"{on(start)}: a carriage return stands in a field without marks"
