"""The two files of a saved adapter, and the way from a name to a method."""

import hashlib
import inspect
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxpeft.parts import PeftForm, form_of, has_native_form
from jaxpeft.tree import Adapter, methods

CONFIG, TENSORS = "adapter.json", "adapter.safetensors"
DIGEST = "sha256"  # of the arrays' file, in CONFIG
PEFT_CONFIG = "adapter_config.json"
FORMAT, VERSION = "jaxpeft adapter", 1
KEYS = ("id", "jaxpeft", "methods", "sites", "metadata")


def version() -> str:
    """The version of this library."""
    try:
        return metadata.version("jaxpeft")
    except metadata.PackageNotFoundError:
        return "of a source tree that is not installed"


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def forms() -> dict[str, tuple[Callable[..., Adapter], PeftForm]]:
    """Constructor and form in PEFT's files, of each method that has one of its own."""
    found = {name: make for name, make in _plain().items() if has_native_form(name)}
    return {name: (make, form_of(make())) for name, make in found.items()}


def whole_leaf() -> Adapter:
    """The method that trains any leaf in full."""
    for constructor in _plain().values():
        own = constructor.__module__.startswith(f"{__name__.partition('.')[0]}.")
        if own and (adapter := constructor()).where.leaf == "any":
            return adapter
    raise ValueError("no method trains whole leaves: jaxpeft.adapters is not imported")


def _plain() -> dict[str, Callable[..., Adapter]]:
    """The constructors that may be called without arguments, by name."""
    needs = lambda make: any(
        p.default is p.empty for p in inspect.signature(make).parameters.values()
    )
    return {name: make for name, make in methods().items() if not needs(make)}


def adapter_info(folder: str | Path) -> dict[str, Any]:
    """Reads what an adapter folder says about itself, without its arrays.

    Args:
        folder: where ``save_adapter`` wrote.

    Returns:
        The content of ``adapter.json``: ``"methods"``, ``"sites"``, ``"metadata"``,
        ``"jaxpeft"`` (the version that wrote it) and more.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: the file is damaged, or of another format or version.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"`folder` {str(folder)!r} holds no {CONFIG}; give a folder written by "
            "save_adapter."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, number = config["format"], config["version"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{file} is damaged or not an adapter's: {e!r}") from e
    if kind != FORMAT or number != VERSION:
        raise ValueError(
            f"{file} is of format {kind!r}, version {number!r}; jaxpeft "
            f"{version()} reads {FORMAT!r}, version {VERSION}. It was "
            f"written by jaxpeft {config.get('jaxpeft', '(unknown)')}: install that."
        )
    if missing := [key for key in KEYS if key not in config]:
        raise ValueError(f"{file} is damaged: it lacks {', '.join(missing)}")
    return config
