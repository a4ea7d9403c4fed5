"""The train.py that a config is for."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from jaxpeft.runs._shipped import config_file, shipped_folder


def program_file(config: str, given: str | None) -> Path:
    """Where the train.py of a config stands.

    Args:
        config: the config's file, perhaps with arguments behind a colon, or its name.
        given: its place, or ``None``: beside the config, above it, here, or the one
            that comes with the package.

    Raises:
        ValueError: there is none.
    """
    folder = config_file(config.partition(":")[0]).absolute().parent
    places = [folder / "train.py", folder.parent / "train.py", Path("train.py")]
    if given:
        places = [Path(given)]
    else:
        with contextlib.suppress(FileNotFoundError):
            places.append(shipped_folder() / "train.py")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(
            f"`train` there is no {' nor '.join(map(str, places))}, and the step of a "
            "config stands in train.py; name it with --train FILE."
        )
    return file


def load_program(file: Path) -> Any:
    """Returns a train.py as a module, for what a step is made of.

    Args:
        file: of ``program_file``.

    Raises:
        ValueError: it lacks ``attach_all`` or ``make_step``.
    """
    spec = importlib.util.spec_from_file_location("jaxpeft_train", file)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program
    spec.loader.exec_module(program)
    for name in ("attach_all", "make_step"):
        if not hasattr(program, name):
            raise ValueError(
                f"`train` {str(file)!r} has no function {name}, of which a step is "
                "made; see the project's own train.py."
            )
    return program
