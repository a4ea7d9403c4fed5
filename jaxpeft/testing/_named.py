"""A method as the command names it: ``my_package:my_method``, with options."""

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxpeft.tree import Adapter, methods

EXAMPLE = "python -m jaxpeft.testing my_package:my_method"


def load(name: str) -> Callable[..., Adapter]:
    """Imports a module and returns the constructor that it defines.

    Args:
        name: ``"my_package:my_method"``.

    Returns:
        The constructor, one of ``tree.methods()`` now.

    Raises:
        ValueError: the name has another form, there is no such module, it has no such
            name, or what it names is not decorated with ``jaxpeft.tree.method``.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            "the method must be given as the module that defines it, a colon and its "
            f"name, got {name!r}; write {EXAMPLE}"
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{name!r}: {module!r} imports {error.name!r}, which is not installed"
            ) from error
        raise ValueError(
            f"{name!r}: there is no module {error.name!r} where Python looks; install "
            "its package, or run the command in the folder that it lies in"
        ) from error
    known = set(map(id, methods().values()))
    constructor = getattr(found, attribute, None)
    theirs = [n for n, x in vars(found).items() if id(x) in known]
    if constructor is None:
        near = difflib.get_close_matches(attribute, theirs, 3, 0) or "none"
        raise ValueError(
            f"{name!r}: module {module!r} has no {attribute!r}; its methods: {near}"
        )
    if id(constructor) not in known:
        raise ValueError(
            f"{name!r} is not the constructor of a method, but "
            f"{type(constructor).__name__} {constructor!r}; decorate the function that "
            "returns the Adapter with @jaxpeft.tree.method"
        )
    return constructor


def read_options(constructor: Callable[..., Adapter], given: Sequence[str]) -> dict:
    """Returns the options of a constructor that a command line gives.

    Args:
        constructor: of a method.
        given: ``["rank=2", "start=normal"]``; a value is a Python literal, or a text.

    Raises:
        ValueError: an entry has another form, or the constructor no such option.
    """
    known = list(inspect.signature(constructor).parameters)
    options: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(
                f"`--option` must be a name, '=' and a value, got {entry!r}; write "
                "--option rank=2"
            )
        if name not in known:
            raise ValueError(
                f"`--option` {entry!r}: {constructor.__name__} has no option {name!r}; "
                f"it has {known}"
            )
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options
