"""What a compiled program moves: between devices, and to and from their memory."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxpeft.hlo._read import Instruction, Part, executions, read

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
# Nothing is read or written for these, or what is counts at the other half of a pair.
_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast while conditional call
    after-all partition-id replica-id opt-barrier add-dependency iota copy-done
    all-gather-done all-reduce-done collective-permute-done async-done async-update
    send-done recv-done domain rng-get-and-update-state""".split()
)
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")


class Collective(NamedTuple):
    """All collectives of one kind and one size of group in a step.

    Attributes:
        kind: ``"all-gather"``, ``"all-reduce"``, ...
        devices: of a group that exchanges.
        count: how many run in a step.
        bytes: of their results on a device, of a reduce-scatter of what is reduced.
        sent: bytes that a device sends on a ring: an all-reduce sends nearly two times
            what it holds, the others nearly one time.
    """

    kind: str
    devices: int
    count: int
    bytes: float
    sent: float


class Array(NamedTuple):
    """An array that a step makes in a device's memory.

    Attributes:
        what: dtype and shape, ``"bf16[32,2048,4096]"``.
        bytes: its size.
        count: how many instructions make one of this type.
        source: where it comes from in the model.
    """

    what: str
    bytes: float
    count: int
    source: str


def collectives(text: str, *, devices: int = 1) -> list[Collective]:
    """Returns the collectives that a step runs, by kind and size of group.

    Args:
        text: optimised HLO, ``compiled.as_text()``; shapes in it are of one device.
        devices: of the whole mesh: where an instruction names no groups, all.

    Returns:
        The sums, what sends most first. Loops count as often as they run. The pieces
        that a TPU's compiler makes of one collective, to run it beside other work, are
        one, also where some of them are in a loop that runs meanwhile.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
        >>> collectives(made.as_text())
        []
    """
    computations, _ = read(text)
    times, first = executions(text), _first_pieces(computations)
    sums: dict[tuple[str, int], list[float]] = {}
    for name, instructions in computations.items():
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            if _channel(one) and (name, one.name) not in first:
                continue
            parts = one.parts
            if one.opcode == "all-gather-start":  # (operands, results)
                parts = parts[len(parts) // 2 :]
            elif one.opcode == "collective-permute-start":
                parts = parts[1:2]  # (operand, result, two of context)
            size = sum(part.bytes for part in parts)
            group = _group(one, devices)
            if kind == "reduce-scatter":
                size *= group
            elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as a TPU's compiler writes it
            share = 1.0 if kind.startswith("collective") else (group - 1) / group
            sent = size * share * (2 if kind == "all-reduce" else 1)
            found = sums.setdefault((kind, group), [0, 0.0, 0.0])
            for i, value in enumerate((1, size, sent)):
                found[i] += times[name] * value
    made = [Collective(*key, int(n), *rest) for key, (n, *rest) in sums.items()]
    return sorted(made, key=lambda one: -one.sent)


def _channel(one: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", one.rest)
    return found[1] if found else None


def _first_pieces(computations: dict[str, list[Instruction]]) -> set[tuple[str, str]]:
    """``(computation, instruction)`` of what stands for each collective's pieces.

    They are in fusions side by side, and in loops beside these.
    """
    callers: dict[str, list[tuple[str, bool]]] = {}
    for name, instructions in computations.items():
        for one in instructions:
            own = one.opcode in ("fusion", "async-start", "call")
            for inner in one.called:
                callers.setdefault(inner, []).append((name, own))

    def outermost(name: str) -> str:
        """The computation that an instruction of a fusion or an async call is in."""
        while callers.get(name, [("", False)])[0][1]:
            name = callers[name][0][0]
        return name

    @functools.cache
    def around(name: str) -> frozenset[str]:
        """All computations that a computation runs in."""
        outer = {caller for caller, _ in callers.get(name, ())}
        return frozenset(outer.union(*map(around, outer)))

    pieces: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for name, instructions in computations.items():
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS and (channel := _channel(one)):
                found = pieces.setdefault((kind, channel), {})
                found.setdefault(outermost(name), (name, one.name))
    return {
        piece
        for found in pieces.values()
        for place, piece in found.items()
        if not around(place) & found.keys()
    }


def _group(one: Instruction, devices: int) -> int:
    """How many devices exchange with each other."""
    if "collective-permute" in one.opcode:
        return 2
    mesh = _MESH_GROUPS.search(one.rest)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(n, 1)) for n in re.findall("'([^']+)'", mesh[2]))
    cut = re.search(r"replica_groups=\[\d+,(\d+)\]", one.rest)
    if cut:
        return int(cut[1])
    listed = re.search(r"replica_groups=\{\{([^}]*)\}", one.rest)
    return len(listed[1].split(",")) if listed else max(devices, 1)


def memory_traffic(text: str) -> float:
    """Returns the bytes that a step reads from and writes to a device's main memory.

    What an instruction reads and what it makes count, what stays inside a fusion or in
    a memory near the cores (a TPU's VMEM) does not. Of a slice that is read or updated
    inside a fusion, only the slice counts.

    Args:
        text: optimised HLO, ``compiled.as_text()``.

    Returns:
        The sum; loops count as often as they run. An estimate: caches are not known,
        and a kernel's own reads are taken as one of each operand.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> made = jax.jit(lambda x: x + 1).lower(jnp.ones(1024)).compile()
        >>> memory_traffic(made.as_text())
        8192.0
    """
    computations, _ = read(text)
    times, near = executions(text), _callees(computations)
    total = 0.0
    for name, instructions in computations.items():
        if name in near or not times[name]:
            continue
        by_name = {one.name: one for one in instructions}
        moved = (_moved(one, by_name, computations) for one in instructions)
        total += times[name] * sum(moved, 0.0)
    return total


def _callees(computations: dict[str, list[Instruction]]) -> set[str]:
    """Computations whose instructions do not meet memory by themselves."""
    return {
        name
        for instructions in computations.values()
        for one in instructions
        if one.opcode not in ("while", "conditional", "call")
        for name in one.called
    }


def _in_memory(parts: list[Part]) -> float:
    return sum((part.bytes for part in parts if part.space == 0), 0.0)


def _moved(one: Instruction, by_name: dict, computations: dict) -> float:
    if one.opcode in _FREE:
        return 0.0
    read_parts = lambda name: by_name[name].parts if name in by_name else []
    if one.opcode == "fusion":
        inside = computations[one.called[0]]
        whole = enumerate(map(read_parts, one.operands))
        reads = (_read_inside(index, parts, inside) for index, parts in whole)
        return _made_inside(one, inside) + sum(reads)
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        made = _in_memory(one.parts)
        if not _in_memory(read_parts(one.operands[0])):
            return made
        return made + sum((part.bytes for part in one.parts), 0.0)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = one.operands[1] if one.opcode[0] == "d" else one.operands[-1]
        return 2 * _in_memory(read_parts(update))
    made = one.parts
    if one.opcode in ("copy-start", "all-gather-start", "collective-permute-start"):
        made = made[:1] if one.opcode == "copy-start" else made[1:2]
    if 'custom_call_target="AllocateBuffer"' in one.rest:
        return 0.0
    return _in_memory(made) + sum(_in_memory(read_parts(n)) for n in one.operands)


def _read_inside(index: int, parts: list[Part], inside: list[Instruction]) -> float:
    """What a fusion reads of one operand."""
    whole = _in_memory(parts)
    name = next(
        (x.name for x in inside if x.opcode == "parameter" and _number(x) == index), ""
    )
    users = [one for one in inside if name in one.operands]
    if not whole or not users:
        return 0.0
    sliced = 0.0
    for one in users:
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            sliced += sum(part.bytes for part in one.parts)
        elif one.opcode == "dynamic-update-slice" and one.operands[0] == name:
            continue  # updated in place
        else:
            return whole
    return min(sliced, whole)


def _made_inside(one: Instruction, inside: list[Instruction]) -> float:
    """What a fusion writes."""
    root = inside[-1]
    by_name = {x.name: x for x in inside}
    if root.opcode == "custom-call" and "AsyncCollective" in root.rest:
        return 0.0  # its collective counts between the devices
    returned = [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for part, source in zip(one.parts, returned, strict=False):
        if source.opcode in ("parameter", "get-tuple-element", *KINDS):
            continue
        if source.opcode == "dynamic-update-slice" and source.operands[1] in by_name:
            part = by_name[source.operands[1]].parts[0]._replace(space=part.space)
        total += _in_memory([part])
    return total


def _number(one: Instruction) -> int:
    return int(one.rest.partition(")")[0])


def largest_arrays(text: str, count: int = 5) -> list[Array]:
    """Returns the largest arrays that a step makes in a device's main memory.

    Args:
        text: optimised HLO, ``compiled.as_text()``.
        count: how many.

    Returns:
        By size, the largest first. Arguments and what only passes through do not
        count, and neither do parts of tuples.
    """
    computations, _ = read(text)
    times, near = executions(text), _callees(computations)
    found: dict[str, Array] = {}
    for one in _made(computations, near, times):
        part = one.parts[0]
        if part.space:
            continue
        what = f"{part.dtype}[{','.join(map(str, part.dims))}]"
        source = re.search(r'op_name="([^"]*)"', one.rest)
        named = source[1].split("closed_call/")[-1] if source else one.opcode
        before = found.get(what, Array(what, part.bytes, 0, named))
        found[what] = before._replace(count=before.count + 1)
    return sorted(found.values(), key=lambda array: -array.bytes)[:count]


def _made(computations, near, times) -> Iterator[Instruction]:
    for name, instructions in computations.items():
        if name in near or not times[name]:
            continue
        for one in instructions:
            if one.opcode not in _FREE and one.type[:1] != "(" and one.parts:
                yield one
