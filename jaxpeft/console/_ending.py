"""How a program ends: one message for what it refuses, and an exit status."""

import argparse
import sys
import traceback as tracebacks
from collections.abc import Callable
from typing import Any, NoReturn

from jaxpeft.console._optional import import_message

# Python's own status of an uncaught exception is 1: that is a fault of the program.
REFUSED = 2  # what was asked for cannot be done
NOT_FINITE = 3  # a run was stopped by a NaN or an infinity
INTERRUPTED = 130  # by Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser that knows ``--traceback`` and says what is wrong in one line."""

    def __init__(self, *, default=False, **options):
        """As argparse's; ``default`` is that of ``--traceback``."""
        usual: dict[str, Any] = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(**(usual | options))
        self.add_argument(
            "--traceback",
            action="store_true",
            default=default,
            help="show where in the code an error was raised",
        )

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; a flag's text is never empty."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            values = getattr(found, action.dest, None)
            for value in values if isinstance(values, list) else [values]:
                blank = isinstance(value, str) and not value.strip()
                if action.option_strings and blank:
                    self.error(f"argument {action.option_strings[-1]}: got {value!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Ends the program; argparse would print all of the usage, too."""
        self.exit(REFUSED, f"{self.prog}: error: {message}. See {self.prog} --help\n")


def ended(
    program: str,
    do: Callable[[], object],
    *,
    traceback: bool = False,
    reword: Callable[[str], str] = str,
    interrupted: str = "stopped",
) -> int:
    """Does something, and returns the exit status of the program.

    What cannot be done as it was asked for (``ValueError``, ``RuntimeError``,
    ``OSError``, ``ImportError``) is one message on standard error. Any other exception
    is a fault of the program, and goes through with its traceback.

    Args:
        program: who says so, ``"train.py"``.
        do: what to do.
        traceback: show before the message where it was raised.
        reword: changes a message before it is shown.
        interrupted: what is said after Ctrl-C.

    Returns:
        0; ``REFUSED`` (2); ``NOT_FINITE`` (3) after a ``FloatingPointError``, of which
        ``training.NonFiniteError`` is one; ``INTERRUPTED`` (130).

    Example:
        >>> ended("train.py", lambda: None)
        0
    """
    try:
        do()
    except KeyboardInterrupt:
        _tell(f"{program}: {interrupted}")
        return INTERRUPTED
    except FloatingPointError as error:
        _show(program, error, traceback)
        return NOT_FINITE
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if isinstance(error, NotImplementedError | RecursionError):
            raise
        _show(program, error, traceback, reword)
        return REFUSED
    return 0


def _show(program: str, error: Exception, traceback: bool, reword=str) -> None:
    if traceback:
        tracebacks.print_exception(error)
    _tell(f"{program}: error: {reword(_said(error))}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _said(error: Exception) -> str:
    """The message of an exception."""
    if isinstance(error, OSError) and error.strerror:
        places = [repr(str(f)) for f in (error.filename, error.filename2) if f]
        return ": ".join([error.strerror, *places])
    text = str(error).strip() or type(error).__name__
    return import_message(error) if isinstance(error, ImportError) else text
