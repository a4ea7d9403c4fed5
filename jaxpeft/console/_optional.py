"""Packages that the library itself does not need: how a missing one is told."""

import contextlib
from collections.abc import Iterator

# Modules that are of another extra than "train" in pyproject.toml.
EXTRAS = {"pytest": "testing", "reasoning_gym": "reasoning"}


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
        raise ImportError(
            f"{what} need the package `{module}`: {_install(error)}.", name=error.name
        ) from error


def import_message(error: ImportError) -> str:
    """Returns what an import error says, with the command that helps.

    Args:
        error: from ``optional``, which has the command already, or any other.

    Example:
        >>> import_message(ModuleNotFoundError("No module named 'rich'", name="rich"))
        "No module named 'rich'. Write: pip install 'jaxpeft[train]'"
    """
    text = str(error)
    return text if "pip install" in text else f"{text}. Write: {_install(error)}"


def _install(error: ImportError) -> str:
    module = (error.name or "").partition(".")[0]
    return f"pip install 'jaxpeft[{EXTRAS.get(module, 'train')}]'"
