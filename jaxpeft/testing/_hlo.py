"""Reads optimised HLO: matmul FLOPs with loops counted out, and shapes of temporaries.

``compiled.cost_analysis()`` counts the body of a loop once. Here every computation
counts as often as it runs: the body of a ``while`` by its trip count, of a
``conditional`` the dearest branch.
"""

import functools
import math
import re
from collections.abc import Iterable

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"^\w+\[([\d,]*)\](?:\{[^}]*\})?")
_OPCODE = re.compile(r"^([\w\-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIBRARY_DOT = re.compile(r'custom_call_target="([^"]*(?:matmul|gemm|dot)[^"]*)"')

# Opcodes through which an array passes without being computed.
CARRIERS = frozenset(
    """bitcast bitcast-convert call constant convert copy copy-start copy-done
    dynamic-slice fusion get-tuple-element opt-barrier parameter reshape slice
    transpose tuple while""".split()
)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _split_type(right: str) -> tuple[tuple[int, ...] | None, str]:
    """``"f32[2,3]{1,0} dot(...)"`` to ``((2, 3), "dot(...)")``; None for tuples."""
    if not right.startswith("("):
        found = _ARRAY.match(right)
        return _dims(found[1]), right[found.end() :].strip()
    depth = 0
    for at, letter in enumerate(right):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return None, right[at + 1 :].strip()
    raise ValueError(f"unbalanced type in {right[:80]!r}")


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
    computations: dict[str, list] = {}
    current, entry = None, ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and not line.startswith("HloModule"):
            current = computations.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            shape, rest = _split_type(found[2])
            opcode = _OPCODE.match(rest)
            current.append((found[1], shape, opcode[1], opcode[2]))
    return computations, entry


def matmul_flops(text: str) -> float:
    """FLOPs of all matmuls that a program runs, two for a multiply-add.

    Args:
        text: optimised HLO, ``compiled.as_text()``; per device where it is sharded.

    Returns:
        The count; loops count as often as they run.

    Raises:
        ValueError: a loop has no known trip count, or a matmul has become a call
            into a library, whose FLOPs the text does not tell.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x, w: x @ w).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
        >>> matmul_flops(made.compile().as_text())
        48.0
    """
    computations, entry = parse(text)

    @functools.cache
    def total(name: str) -> float:
        shapes = {n: shape for n, shape, _, _ in computations[name]}
        return sum(
            _own(shape, op, rest, shapes) + _called(op, rest)
            for _, shape, op, rest in computations[name]
        )

    def _called(op: str, rest: str) -> float:
        branches = _BRANCHES.search(rest)
        if branches:
            return max(total(n.strip().lstrip("%")) for n in branches[1].split(","))
        inner = [total(n) for n in _CALLED.findall(rest)]
        if op == "conditional":
            return max(inner)
        times = 1
        if op == "while" and sum(inner):
            trips = _TRIPS.search(rest)
            if trips is None:
                raise ValueError(f"a loop without a known trip count: {rest[:200]}")
            times = int(trips[1])
        return float(times * sum(inner))

    return total(entry)


def copies(text: str) -> int:
    """Instructions that only move an array in memory: copies and transposes.

    A fusion counts if what it returns is a copy or a transpose.

    Args:
        text: optimised HLO, ``compiled.as_text()``.

    Returns:
        How many run in a step; loops count as often as they run, one of unknown length
        once, and of branches the one with the most.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x: x + 1).lower(jnp.ones((3, 3)))
        >>> copies(made.compile().as_text())
        0
    """
    computations, entry = parse(text)
    moves = lambda op: op in ("copy", "transpose")

    @functools.cache
    def total(name: str) -> int:
        return sum(_one(op, rest) for _, _, op, rest in computations[name])

    def _one(op: str, rest: str) -> int:
        called = _CALLED.findall(rest)
        if op == "fusion":
            root = computations[called[0]][-1]
            operands = _OPERAND.findall(root[3]) if root[2] == "tuple" else ()
            ops = {n: o for n, _, o, _ in computations[called[0]]}
            return sum(map(moves, (ops[n] for n in operands))) + moves(root[2])
        branches = _BRANCHES.search(rest)
        if branches:
            return max(total(n.strip().lstrip("%")) for n in branches[1].split(","))
        if op == "conditional":
            return max(map(total, called))
        trips = _TRIPS.search(rest) if op == "while" else None
        return (int(trips[1]) if trips else 1) * sum(map(total, called)) + moves(op)

    return total(entry)


def _own(shape, op: str, rest: str, shapes) -> float:
    if op == "custom-call" and _LIBRARY_DOT.search(rest):
        raise ValueError(f"a matmul went to a library: {rest[:200]}")
    if op not in ("dot", "convolution"):
        return 0.0
    if op == "convolution":
        raise ValueError("convolutions are not counted")
    left = shapes[_OPERAND.search(rest)[1]]
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    width = math.prod(left[i] for i in _dims(summed[1])) if summed else 1
    return 2.0 * math.prod(shape) * width


def made_of_shape(
    text: str, shapes: Iterable[tuple[int, ...]], *, inside: bool = False
) -> list[str]:
    """Instructions that make an array of one of the given shapes in memory.

    Args:
        text: optimised HLO.
        shapes: shapes; the order of axes and axes of length one do not matter.
        inside: whether what stays inside a fusion counts, too.

    Returns:
        ``"opcode[dims]"`` for each instruction that is not a mere carrier of its
        operand (``CARRIERS``). Of a fusion, only what it returns counts: the rest of
        it never leaves the registers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x, w: x @ w).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
        >>> bool(made_of_shape(made.compile().as_text(), [(4, 2)]))
        True
    """
    core = lambda dims: tuple(sorted(n for n in dims if n > 1))
    wanted = {core(shape) for shape in shapes}
    computations, _ = parse(text)
    fused = {
        name
        for instructions in computations.values()
        for _, _, op, rest in instructions
        if op == "fusion"
        for name in _CALLED.findall(rest)
    }
    return [
        f"{op}{list(shape)}"
        for name, instructions in computations.items()
        for _, shape, op, _ in (
            _returned(instructions) if name in fused and not inside else instructions
        )
        if shape is not None and core(shape) in wanted and op not in CARRIERS
    ]


def _returned(instructions: list) -> list:
    """The instructions of a fusion whose results leave it; its root comes last."""
    by_name = {name: (name, *rest) for name, *rest in instructions}
    found, waiting = [], [instructions[-1][0]]
    while waiting:
        instruction = by_name[waiting.pop()]
        _, _, op, rest = instruction
        if op in ("tuple", "bitcast", "copy", "reshape", "transpose", "convert"):
            waiting += [n for n in _OPERAND.findall(rest) if n in by_name]
        else:
            found.append(instruction)
    return found
