"""The lines of a text file, packed or not, in any encoding; errors name the line."""

import bz2
import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from jaxpeft.console import optional

# A file that begins with one of these says its encoding; the longer ones come first.
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# How names of packed files end, and what those begin with.
_PACKED = {
    ".gz": rb"\x1f\x8b",
    ".bz2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\x00",
    ".zst": rb"\x28\xb5\x2f\xfd",
}
# Bytes that cannot be decoded become these, which no encoding gives: so the line they
# are in is known, which a decoder, reading ahead, does not say.
_UNDECODED = re.compile("[\udc00-\udcff]")
_MARK = "jaxpeft.undecoded"
codecs.register_error(
    _MARK, lambda error: (chr(0xDC00 + error.object[error.start]), error.end)
)


def bare_name(path: str | PathLike) -> Path:
    """Returns a file's name without the ending of a packed one: "a.csv.gz" is "a.csv".

    Args:
      path: the file.
    """
    path = Path(path)
    packed = path.suffix.lower() in _PACKED
    return Path(path.stem if packed else path.name)


def read_lines(path: str | PathLike, encoding: str | None = None) -> Iterator[str]:
    r"""Yields the lines of a text file, each with its end, one after the other.

    Lines end with "\n" or "\r\n", and a "\r" alone is text; only in a file whose first
    line ends with one does it end the others too.

    Args:
      path: the file, packed or not: .gz, .bz2, .xz, .zst, told by their content.
      encoding: of the file; None: UTF-8, or what a byte-order mark says.

    Yields:
      The lines, without a byte-order mark.

    Raises:
      ValueError: at a line that is not of the encoding or has a NUL; if a packed file
        is not whole, or Python does not know `encoding`.
      ImportError: a .zst file, and no package to read it with.
    """
    with _open(path) as file:
        start = file.peek(4)[:4]
        marked = (name for bom, name in _BOMS.items() if start.startswith(bom))
        said = encoding or next(marked, "utf-8")
        try:
            text = io.TextIOWrapper(file, said, errors=_MARK, newline="")
        except LookupError:
            raise ValueError(
                f"`encoding` {encoding!r} is none that Python knows; for example "
                'encoding="latin-1", "cp1252", "utf-16".'
            ) from None
        number, line, by_return = 0, "", None
        try:
            for part in text:  # ends at "\r", too
                line += part
                by_return = part.endswith("\r") if by_return is None else by_return
                if part.endswith("\r") and not by_return:
                    continue
                number += 1
                yield _checked(path, number, line, said)
                line = ""
        except UnicodeError as error:  # UTF-16 or UTF-32 without a mark
            raise ValueError(
                f"{path} is not {said}: {error}. Without a byte-order mark, write "
                f'encoding="{said}-le" or "{said}-be".'
            ) from None
        if line:
            yield _checked(path, number + 1, line, said)


def _checked(path: Any, number: int, line: str, encoding: str) -> str:
    if "\0" in line:
        order = "be" if line.startswith("\0") else "le"
        raise ValueError(
            f"{path}, line {number} has a NUL, which no text has. If "
            f'the file is of UTF-16, write encoding="utf-16-{order}".'
        )
    if not line.isascii() and (bad := _UNDECODED.search(line)):
        at = bad.start()
        around = _UNDECODED.sub("�", line[max(at - 20, 0) : at + 20].strip())
        raise ValueError(
            f"{path}, line {number} is not {encoding}: byte "
            f"0x{ord(bad[0]) - 0xDC00:02x} in {around!r}. Say in what it is written "
            'with `encoding`: encoding="latin-1", or of spreadsheets "cp1252".'
        )
    return line.removeprefix("\ufeff") if number == 1 else line


@contextlib.contextmanager
def _open(path: str | PathLike) -> Iterator[Any]:
    """Yields the bytes of a file, unpacked."""
    with open(path, "rb") as file:
        start = file.peek(10)
        ending = next((e for e, mark in _PACKED.items() if re.match(mark, start)), "")
        broken: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
        if ending == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        elif ending == ".bz2":
            unpacked = bz2.BZ2File(file)
        elif ending == ".xz":
            import lzma  # not every Python has it

            unpacked, broken = lzma.LZMAFile(file), (*broken, lzma.LZMAError)
        elif ending == ".zst":
            unpacked, error = _zstd(file)
            broken = (*broken, error)
        else:
            yield file
            return
        try:
            yield io.BufferedReader(unpacked)
        except broken as error:
            raise ValueError(
                f"{path} is no whole {ending} file ({error}); fetch or pack it anew."
            ) from error


def _zstd(file: Any) -> tuple[Any, type[Exception]]:
    """The unpacked stream of a .zst file, and what it raises."""
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        with optional("Files that end in .zst"):
            import zstandard
        return _Frames(file, zstandard.ZstdDecompressor()), zstandard.ZstdError
    return zstd.ZstdFile(file), zstd.ZstdError


class _Frames(io.RawIOBase):
    """Frames of Zstandard one after the other; a cut one is an error.

    The package's own stream ends at a cut without a word.
    """

    def __init__(self, file: Any, decompressor: Any) -> None:
        self._file, self._made = file, decompressor
        self._frame = decompressor.decompressobj()
        self._begun = False
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                if self._begun:
                    raise EOFError("it ends within a frame")
                return 0
            self._ready = self._frame.decompress(self._packed)
            self._packed, self._begun = b"", True
            if self._frame.eof:
                self._packed, self._begun = self._frame.unused_data, False
                self._frame = self._made.decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
