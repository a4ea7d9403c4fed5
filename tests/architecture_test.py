"""Who may import whom, and what `import jaxpeft` may load: read from the sources."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxpeft"
ORDER = [
    ["numerics"],
    ["core", "dimension"],
    ["adapters", "allocate"],
    ["mixtures"],
    ["models", "interop"],
    ["data", "training"],
    ["serving", "study"],
    ["cli"],
    ["__main__.py"],
]
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name != "__init__.py"]
LIGHT = {"jax", "flax", "optax", "numpy", "jaxtyping"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write absolute imports"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for parts in (name.split(".") + [""] for name in names):
            if parts[0] == "jaxpeft":
                yield parts[1], f"{path}:{node.lineno}"


def at_the_top(path):
    """Packages that importing a file loads: imports outside of functions."""
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        waiting.extend(ast.iter_child_nodes(node))


def test_there_is_something_to_read():
    rooms = {p.relative_to(ROOT).parts[0] for p in FILES}
    assert {"core", "adapters", "models", "data", "training"} <= rooms
    assert rooms <= set(LEVEL), "a room without a place in the order"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = path.relative_to(ROOT).parts[0]
    for theirs, where in imported(path):
        if theirs == mine:  # no method knows another
            assert mine not in {"adapters", "allocate"}, where
        else:
            assert LEVEL.get(theirs, 99) < LEVEL[mine], where


@pytest.mark.parametrize("room", ["numerics", "core", "adapters", "mixtures"])
def test_the_core_needs_nothing_heavy(room):
    for path in (ROOT / room).rglob("*.py"):
        heavy = set(at_the_top(path)) - LIGHT - {"jaxpeft"} - sys.stdlib_module_names
        assert not heavy, f"{path} imports {heavy}"


def test_import_is_light():
    """Beyond jax, flax and optax, importing the library loads jaxtyping alone."""
    code = """
import sys, jax, flax, optax, jax.extend.core, jax.ad_checkpoint
before = {m.split(".")[0] for m in sys.modules}
import jaxpeft
print(*sorted({m.split(".")[0] for m in sys.modules} - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    more = set(done.stdout.split()) - set(sys.stdlib_module_names)
    assert more <= {"jaxpeft", "jaxtyping", "wadler_lindig"}, more


@pytest.mark.parametrize("room", ["core", "adapters"])
def test_no_method_is_named_in_core(room):
    """Nothing outside of its own file knows a method; core knows none at all."""
    names = {p.stem.removeprefix("_") for p in (ROOT / "adapters").glob("_[a-z]*.py")}
    for path in (ROOT / room).rglob("_[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else None
            name = node.attr if isinstance(node, ast.Attribute) else name
            own = room == "adapters" and name == path.stem.removeprefix("_")
            assert name not in names - {"full"} or own, f"{path}:{node.lineno}: {name}"
