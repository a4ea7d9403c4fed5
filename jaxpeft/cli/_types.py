"""What a flag's value may be: read and checked while the command line is parsed."""

import argparse
import math
from collections.abc import Callable


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number in a range, for argparse's ``type``.

    Args:
        least: the smallest allowed.
        most: the largest.

    Example:
        >>> whole(1)("16")
        16
    """

    def read(text: str) -> int:
        if not text.strip().removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, got {text!r}"
            )
        return int(text)

    return read


def number(
    least: int | float, most: int | float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """A finite number in a range, for argparse's ``type``.

    Args:
        least: the smallest allowed.
        most: the largest.
        above: whether ``least`` itself is too small.

    Example:
        >>> number(0, 1, above=True)("0.9")
        0.9
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = math.isfinite(value) and least <= value <= most
        if not fits or (above and value == least):
            start = f"above {least:g}" if above else f"from {least:g}"
            end = "" if math.isinf(most) else f" to {most:g}"
            raise argparse.ArgumentTypeError(
                f"must be a number {start}{end}, got {text!r}"
            )
        return value

    return read


def ending(*ends: str) -> Callable[[str], str]:
    """The name of a file of some kind, for argparse's ``type``.

    Example:
        >>> ending(".png")("ranks.png")
        'ranks.png'
    """

    def read(text: str) -> str:
        if not text.endswith(ends):
            raise argparse.ArgumentTypeError(
                f"must end in {' or '.join(ends)}, got {text!r}"
            )
        return text

    return read
