"""Optimised HLO as computations and instructions, and how often each one runs."""

import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"^\w+\[([\d,]*)\](?:\{[^}]*\})?")
_PART = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"^([\w\-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_INDEX = re.compile(r"\bindex=(\d+)")
_NUMBER = re.compile(r"^(-?\d+)\)")


class Part(NamedTuple):
    """One array of a type.

    Attributes:
        dtype: as HLO writes it, ``"bf16"``.
        dims: its shape.
        space: its memory space; 0 is the device's main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Its size, without padding."""
        bits = re.search(r"\d+", self.dtype)
        each = 1.0 if self.dtype == "pred" or not bits else int(bits[0]) / 8
        return math.prod(self.dims) * each


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: its own.
        type: what it makes, as text.
        opcode: what it does.
        rest: operands and attributes.
    """

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def parts(self) -> list[Part]:
        """The arrays that it makes: one, or those of a tuple."""
        return [
            Part(kind, dims_of(dims), _space(layout))
            for kind, dims, layout in _PART.findall(self.type)
        ]

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        depth = 1
        for at, letter in enumerate(self.rest):
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0:
                return _OPERAND.findall(self.rest[:at])
        return _OPERAND.findall(self.rest)

    @property
    def called(self) -> list[str]:
        """Computations that it calls; of a conditional, its branches."""
        branches = _BRANCHES.search(self.rest)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        return _CALLED.findall(self.rest)


def dims_of(text: str) -> tuple[int, ...]:
    """``"2,3"`` to ``(2, 3)``."""
    return tuple(int(n) for n in text.split(",") if n)


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _split_type(right: str) -> tuple[str, str]:
    """``"f32[2,3]{1,0} dot(...)"`` to its type and the rest."""
    if not right.startswith("("):
        found = _ARRAY.match(right)
        if found is None:  # a token, or a dimension that is only bounded
            kind, _, rest = right.partition(" ")
            return kind, rest
        return found[0], right[found.end() :].strip()
    depth = 0
    for at, letter in enumerate(right):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return right[: at + 1], right[at + 1 :].strip()
    raise ValueError(f"unbalanced type in {right[:80]!r}")


@functools.lru_cache(maxsize=4)
def read(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Splits a module into computations.

    Args:
        text: ``compiled.as_text()``.

    Returns:
        ``({computation: instructions}, the entry computation's name)``.
    """
    computations: dict[str, list[Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith("HloModule"):
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            kind, rest = _split_type(found[2])
            opcode = _OPCODE.match(rest)
            if opcode:  # else a line of the module's table of source files
                current.append(Instruction(found[1], kind, opcode[1], opcode[2]))
    return computations, entry


def parse(text: str) -> tuple[dict[str, list], str]:
    """Splits a module into computations.

    Args:
        text: ``compiled.as_text()``.

    Returns:
        ``({computation: [(name, shape or None, opcode, rest of the line), ...]},
        the entry computation's name)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x, w: x @ w).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
        >>> computations, entry = parse(made.compile().as_text())
        >>> [shape for _, shape, op, _ in computations[entry] if op == "parameter"]
        [(2, 3), (3, 4)]
    """
    computations, entry = read(text)
    return {
        name: [(one.name, shape(one), one.opcode, one.rest) for one in instructions]
        for name, instructions in computations.items()
    }, entry


def shape(instruction: Instruction) -> tuple[int, ...] | None:
    """The shape of what an instruction makes; None for tuples."""
    return None if instruction.type[:1] == "(" else instruction.parts[0].dims


def trip_count(loop: Instruction, computations: dict[str, list]) -> int | None:
    """How often a loop's body runs; None where the program does not say.

    XLA's CPU compiler writes it down. In a TPU's program the condition still compares
    a counter with a constant, and the body adds one to it, or two where it was
    unrolled; the counter begins at 1 where the first time was taken out of the loop.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = re.search(r"body=%?([\w.\-]+)", loop.rest)
    if condition is None or body is None:
        return None
    lines = {one.name: one for one in computations[condition[1]]}
    root = computations[condition[1]][-1]
    inner = computations[root.called[0]][-1] if root.opcode == "fusion" else root
    if not re.search("direction=(LT|GT|NE)", inner.rest):
        return None
    read = [lines[name] for name in root.operands if name in lines]
    bounds = [n for one in read if (n := _constant(one)) is not None]
    counters = [_INDEX.search(x.rest) for x in read if x.opcode == "get-tuple-element"]
    if len(bounds) != 1 or len(counters) != 1:
        return None
    index = int(counters[0][1])
    step = _added(computations[body[1]], index, computations)
    left = bounds[0] - _start(loop, index, computations)
    return -(-left // step) if step else None


def _constant(one: Instruction) -> int | None:
    found = _NUMBER.match(one.rest) if one.opcode == "constant" else None
    return int(found[1]) if found else None


def _start(loop: Instruction, index: int, computations: dict) -> int:
    """What a loop's counter begins at; 0 where the program does not say."""
    around = next(lines for lines in computations.values() if loop in lines)
    lines = {one.name: one for one in around}
    given = lines.get(loop.operands[0])
    if given is None or given.opcode != "tuple" or index >= len(given.operands):
        return 0
    one = lines[given.operands[index]]
    while one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        one = lines[one.operands[0]]
    return _constant(one) or 0


def _added(body: list[Instruction], index: int, computations: dict) -> int:
    """What a loop's body adds to the counter at a place of its tuple; 0: not known."""
    root = body[-1]
    if root.opcode != "tuple" or index >= len(root.operands):
        return 1

    def value(name: str, lines: dict, given: list) -> int | None:
        """A constant, or what was added to the counter."""
        one = lines[name]
        read = lambda name: value(name, lines, given)
        if one.opcode == "constant":
            return _constant(one)
        if one.opcode == "parameter" and given:
            return given[int(one.rest.partition(")")[0])]
        if one.opcode == "get-tuple-element" and not given:
            return 0 if f"index={index}" in one.rest.split(", ") else None
        if one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            return read(one.operands[0])
        parts = [read(name) for name in one.operands] if one.opcode != "tuple" else []
        if one.opcode == "fusion":
            inside = computations[one.called[0]]
            return value(inside[-1].name, {x.name: x for x in inside}, parts)
        if one.opcode == "add" and None not in parts:
            return sum(parts)
        return None

    return value(root.operands[index], {one.name: one for one in body}, []) or 0


def executions(text: str) -> dict[str, int]:
    """How often each computation runs in a step.

    Args:
        text: optimised HLO.

    Returns:
        ``{computation: times}``; a loop's body counts as often as it runs, one of
        unknown length once; all branches of a conditional count.
    """
    computations, entry = read(text)
    times: dict[str, int] = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for one in computations[name]:
            trips = 1
            if one.opcode == "while":
                trips = trip_count(one, computations) or 1
            for inner in one.called:
                visit(inner, count * trips)

    visit(entry, 1)
    return times
