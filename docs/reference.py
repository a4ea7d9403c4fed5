"""The pages of the reference, written out of the packages' lists of public names.

A name is described once, where a user would import it from: ``jaxpeft.attach`` and not
``jaxpeft.tree.attach``. Other rooms that export it too point there.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

# In the order in which a reader comes to need them.
ROOMS = (
    *(
        "adapters",
        "models",
        "data",
        "data.tasks",
        "data.metrics",
        "training",
        "serving",
        "interop",
    ),
    *("allocate", "dimension", "mixtures", "study", "compare", "runs", "launch"),
    *("tree", "transform", "parts", "lowrank", "numerics", "testing", "hlo"),
    *("console", "cli"),
)
FACE = "jaxpeft"


def public(module: ModuleType) -> dict[str, Any]:
    """The public names of a package, without its modules, in order."""
    found = {n: getattr(module, n) for n in sorted(dir(module), key=str.lower)}
    return {
        name: thing
        for name, thing in found.items()
        if not (name.startswith("_") or inspect.ismodule(thing))
    }


def modules() -> dict[str, ModuleType]:
    """The face and all rooms, ``{"jaxpeft.tree": module}``."""
    names = [FACE, *(f"{FACE}.{room}" for room in ROOMS)]
    return {name: importlib.import_module(name) for name in names}


def homes() -> dict[str, dict[str, str]]:
    """Where each public name is described: ``{room: {name: its home}}``.

    The face comes first, then the room that the thing was written in.
    """
    found = modules()
    face = public(found[FACE])
    said = {}
    for room, module in found.items():
        said[room] = {}
        for name, thing in public(module).items():
            written = ".".join(getattr(thing, "__module__", room).split(".")[:2])
            if face.get(name) is thing:
                said[room][name] = FACE
            elif written in found and public(found[written]).get(name) is thing:
                said[room][name] = written
            else:
                said[room][name] = room
    return said


def _described(home: str, name: str, thing: Any) -> str:
    """What autodoc is asked for one name."""
    full = f"{home}.{name}"
    if inspect.isclass(thing):
        return f".. autoclass:: {full}\n   :members:\n"
    if callable(thing):
        return f".. autofunction:: {full}\n"
    value = repr(thing)
    shown = f"\n   :value: {value}" if len(value) < 60 else ""
    return f".. py:data:: {full}{shown}\n"


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"


def _pages() -> dict[str, str]:
    """``{path below api/: text}``."""
    found, home_of = modules(), homes()
    methods = set(public(found[f"{FACE}.adapters"]))
    pages = {}
    for room, module in found.items():
        short = room.removeprefix(f"{FACE}.")
        parts = [_title(room), f".. module:: {room}\n", f"{_first(module)}\n"]
        here = {n: t for n, t in public(module).items() if home_of[room][n] == room}
        if room == FACE:
            here = {n: t for n, t in here.items() if n not in methods}
            parts.append("The methods are in :doc:`adapters`.\n")
        if short == "adapters":
            listed = "\n".join(f"   adapters/{name}" for name in sorted(methods))
            parts.append(f".. toctree::\n   :maxdepth: 1\n\n{listed}\n")
            for name in methods:
                described = _described(FACE, name, public(module)[name])
                title = _title(f"jaxpeft.{name}")
                pages[f"adapters/{name}.rst"] = f"{title}\n{described}"
        elif elsewhere := _elsewhere(home_of[room], room):
            parts.append(f"Also here: {elsewhere}.\n")
        parts += [_described(room, name, thing) for name, thing in here.items()]
        pages[f"{short}.rst"] = "\n".join(parts)
    pages["index.rst"] = _contents(pages)
    return pages


def _contents(pages: dict[str, str]) -> str:
    """The face first, then the rooms in their order."""
    names = [FACE, *ROOMS]
    listed = "\n".join(f"   {name}" for name in names if f"{name}.rst" in pages)
    said = (
        "By room: ``import jaxpeft as jp`` has the first two;\n"
        "other rooms are ``jaxpeft.NAME``, imported when asked for.\n"
    )
    title = _title("Every public name")
    return f"{title}\n{said}\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"


def _first(module: ModuleType) -> str:
    return (module.__doc__ or "").strip()


def _elsewhere(home_of: dict[str, str], room: str) -> str:
    others = [(n, home) for n, home in home_of.items() if home != room]
    return ", ".join(f":py:obj:`{n} <{home}.{n}>`" for n, home in others)


def write(folder: Path) -> None:
    """Writes the pages that are new or have changed, and removes others."""
    pages = _pages()
    for old in folder.rglob("*.rst"):
        if str(old.relative_to(folder)) not in pages:
            old.unlink()
    for path, text in pages.items():
        file = folder / path
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


# ------------------------- Docstrings, as they are written ---------------------------

_AS_TEXT = ("Notation:", "Presets:")


def as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Shows the aligned blocks of a docstring as they are aligned.

    Napoleon knows nothing of our ``Notation:``, a table by spaces, and takes what
    stands before a colon in ``Returns:`` for a type.
    """
    del app, what, name, obj, options
    for at, line in enumerate(lines):
        if line in _AS_TEXT:
            lines[at] = f"**{line[:-1]}** ::\n"
        elif line == "Returns:":
            lines[at] = ":returns:"
    lines[:] = "\n".join(lines).split("\n")


def unwanted(app, what, name, obj, skip, options) -> bool | None:
    """Leaves out what a named tuple says of its fields by itself."""
    del app, what, name, options
    said = getattr(obj, "__doc__", None) or ""
    return True if said.startswith("Alias for field number") else None
