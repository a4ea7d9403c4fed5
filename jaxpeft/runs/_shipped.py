"""The train.py and the configs that come with the package."""

import ast
from pathlib import Path
from typing import NamedTuple


class Shipped(NamedTuple):
    """A config that comes with the package.

    Attributes:
        name: ``"quickstart"``, as ``--config`` takes it.
        title: the first line of its docstring.
        claim: what was measured with it, as it stands there; may be empty.
        file: where it lies.
    """

    name: str
    title: str
    claim: str
    file: Path


def shipped_folder() -> Path:
    """Returns the folder with ``train.py`` and ``configs``.

    In a wheel it lies in the package, in a checkout it is the project's own.

    Raises:
        FileNotFoundError: there is none: the package is neither of the two.
    """
    package = Path(__file__).parents[1]
    project = package.parent
    if (package / "shipped/train.py").is_file():
        return package / "shipped"
    if all((project / x).exists() for x in ("pyproject.toml", "train.py", "configs")):
        return project
    raise FileNotFoundError(
        f"train.py and configs are neither in {package} nor beside it; install the "
        "package from a wheel or a checkout."
    )


def shipped_configs() -> list[Shipped]:
    """Returns the configs that come with the package, by name.

    Example:
        >>> {config.name: config.title for config in shipped_configs()}["quickstart"]
        'KaSA on MiniLM, TREC questions: what ``python train.py`` runs.'
    """
    found = []
    for file in sorted((shipped_folder() / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        parts = [" ".join(part.split()) for part in text.split("\n\n")]
        lines = text.splitlines() or [""]
        claim = ""
        for part in parts:
            _, said, rest = part.partition("Measured: ")
            claim = claim or said + rest
        found.append(Shipped(file.stem, lines[0], claim, file))
    return found


def config_file(name: str | Path) -> Path:
    """Returns the file of a config, also of one that comes with the package.

    Args:
        name: a path; or, where there is no such file, the name of a config of
            ``shipped_configs``.

    Example:
        >>> config_file("quickstart").name
        'quickstart.py'
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    try:
        there = shipped_folder() / "configs" / f"{path.name}.py"
    except FileNotFoundError:
        return path
    return there if there.is_file() else path
