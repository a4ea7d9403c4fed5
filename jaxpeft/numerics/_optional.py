"""Packages that the library itself does not need: how a missing one is told."""

import contextlib
from collections.abc import Iterator

# Modules that are of another extra than "train" in pyproject.toml.
EXTRAS = {"reasoning_gym": "reasoning"}


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Says how to install a package that an import does not find.

    ``import jaxpeft`` needs few packages; every other one is imported where it is used,
    inside of this.

    Args:
        what: needs the package, the beginning of a sentence: ``"GGUF files"``.

    Raises:
        ImportError: an import in the block found no such module; names the package and
            the extra of jaxpeft that brings it.

    Example:
        >>> with optional("Clouds"):
        ...     import no_such_module
        Traceback (most recent call last):
        ImportError: Clouds need the package `no_such_module`: pip install ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(module, "train")
        raise ImportError(
            f"{what} need the package `{module}`: pip install 'jaxpeft[{extra}]'.",
            name=error.name,
        ) from error
