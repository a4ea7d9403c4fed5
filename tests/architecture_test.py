"""Who may import whom, and what `import jaxpeft` may load: read from the sources."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from jaxpeft.console import EXTRAS

ROOT = pathlib.Path(__file__).parents[1] / "jaxpeft"
ORDER = [
    ["console", "numerics", "hlo"],
    ["tree", "dimension"],
    ["transform"],
    ["lowrank"],
    ["parts"],
    ["adapters", "allocate"],
    ["mixtures"],
    ["models"],
    ["interop"],
    ["data", "launch", "training", "testing"],
    ["serving"],
    ["runs"],
    ["study", "compare"],
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
        for parts in (name.split(".") + ["", ""] for name in names):
            if parts[0] == "jaxpeft":
                yield parts[1], parts[2], f"{path}:{node.lineno}"


# What methods of allocation have in common.
ALLOCATIONS = ("_allocation", "_allocator", "_choices", "_components", "_kept")
PROJECT = ROOT.parent
OUTSIDE = [
    PROJECT / "train.py",
    *(PROJECT / "benchmarks").glob("*.py"),
    *(PROJECT / "configs").glob("*.py"),
]


@pytest.mark.parametrize(
    "path", FILES + OUTSIDE, ids=lambda p: str(p.relative_to(PROJECT))
)
def test_no_file_uses_a_private_one_of_another_room(path):
    """A room's door is its package: ``from jaxpeft.tree import is_node``."""
    inside = path.is_relative_to(ROOT)
    mine = path.relative_to(ROOT).parts[0] if inside else None
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            library, *parts = name.split(".")
            if library == "jaxpeft" and len(parts) > 1 and parts[0] != mine:
                private = [part for part in parts if part.startswith("_")]
                assert not private, f"{path}:{node.lineno}: {name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            door, name = node.value.id, node.attr
            inner = re.fullmatch("_[a-z][a-z_]*", name) and door != mine
            if inner and (ROOT / door / f"{name}.py").exists():
                raise AssertionError(f"{path}:{node.lineno}: {door}.{name}")


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
    assert {"tree", "transform", "adapters", "models", "data", "training"} <= rooms
    assert rooms <= set(LEVEL), "a room without a place in the order"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = path.relative_to(ROOT).parts[0]
    for theirs, file, where in imported(path):
        if theirs == mine:  # no method knows another
            assert mine != "adapters", where
            assert mine != "allocate" or file in ALLOCATIONS, where
        else:
            assert LEVEL.get(theirs, 99) < LEVEL[mine], where


@pytest.mark.parametrize(
    "room",
    [
        "console",
        "numerics",
        "tree",
        "transform",
        "lowrank",
        "parts",
        "adapters",
        "mixtures",
    ],
)
def test_the_core_needs_nothing_heavy(room):
    for path in (ROOT / room).rglob("*.py"):
        heavy = set(at_the_top(path)) - LIGHT - {"jaxpeft"} - sys.stdlib_module_names
        assert not heavy, f"{path} imports {heavy}"


def third_party(path):
    """``(module, whether it is imported inside ``with optional(...)``)`` of a file."""

    def walk(node, told):
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items]
            names = [getattr(getattr(c, "func", c), "id", "") for c in calls]
            told = told or bool({"optional", "_optional"} & set(names))
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in {name.split(".")[0] for name in names}:
            # rich comes with flax; compression is Python's own from 3.14 on.
            known = LIGHT | {"jaxpeft", "rich", "compression"}
            if name not in known | sys.stdlib_module_names:
                yield name, told
        for child in ast.iter_child_nodes(node):
            yield from walk(child, told)

    yield from walk(ast.parse(path.read_text()), False)


def test_a_package_that_is_missing_is_told_with_its_extra():
    """Every room says how to install what it imports, and pyproject.toml agrees."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    plain = lambda text: re.split(r"[^\w.-]", text)[0].lower().replace("_", "-")
    extras = {
        extra: {plain(one) for one in needs}
        for extra, needs in project["optional-dependencies"].items()
    }
    brought = {  # and what those bring, as transformers does tokenizers
        extra: names
        | {
            plain(one)
            for name in names
            if name in {"transformers", "tensorflow-datasets"}
            for one in importlib.metadata.requires(name)
        }
        for extra, names in extras.items()
    }
    sold_by = importlib.metadata.packages_distributions()
    seen, told = {}, set()
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0]
        for module, inside in third_party(path):
            seen.setdefault((room, module), path)
            if inside:
                told.add((room, module))
    assert len(seen) > 10
    for (room, module), path in seen.items():
        assert (room, module) in told, (
            f"{path} imports {module}: write it inside `with optional(...)`"
        )
        names = {plain(name) for name in sold_by.get(module, [module])}
        extra = EXTRAS.get(module, "train")
        assert names & brought[extra], f"{module} is not in the extra {extra!r}"
    assert set(EXTRAS.values()) <= set(extras)


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


@pytest.mark.parametrize("room", ["tree", "transform", "lowrank", "parts", "adapters"])
def test_no_method_is_named_in_core(room):
    """Nothing outside of its own file knows a method; core knows none at all."""
    names = {p.stem.removeprefix("_") for p in (ROOT / "adapters").glob("_[a-z]*.py")}
    for path in (ROOT / room).rglob("_[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else None
            name = node.attr if isinstance(node, ast.Attribute) else name
            own = room == "adapters" and name == path.stem.removeprefix("_")
            assert name not in names - {"full"} or own, f"{path}:{node.lineno}: {name}"
