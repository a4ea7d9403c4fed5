"""Reads optimised HLO: matmul FLOPs with loops counted out, and shapes of temporaries.

``compiled.cost_analysis()`` counts the body of a loop once. Here every computation
counts as often as it runs: the body of a ``while`` by its trip count, of a
``conditional`` the dearest branch.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from jaxpeft.hlo._read import Instruction, dims_of, parse, read, shape, trip_count

_OPERAND = re.compile(r"%([\w.\-]+)")
_LIBRARY_DOT = re.compile(r'custom_call_target="([^"]*(?:matmul|gemm|dot)[^"]*)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")

# Opcodes through which an array passes without being computed.
CARRIERS = frozenset(
    """bitcast bitcast-convert call constant convert copy copy-start copy-done
    dynamic-slice fusion get-tuple-element opt-barrier parameter reshape slice
    transpose tuple while""".split()
)


def matmul_flops(text: str, kernels: Mapping[str, float] | None = None) -> float:
    """FLOPs of all matmuls that a program runs, two for a multiply-add.

    A TPU's program has convolutions in place of matmuls; they count alike, and so do
    convolutions of any other kind.

    Args:
        text: optimised HLO, ``compiled.as_text()``; per device where it is sharded.
        kernels: FLOPs of one call of each Pallas kernel, by name (``kernel_flops``):
            of these the text says nothing. ``None``: they count as none.

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
    computations, entry = read(text)
    known = kernels or {}

    @functools.cache
    def total(name: str) -> float:
        shapes = {one.name: shape(one) for one in computations[name]}
        return sum(_own(one, shapes, known) + called(one) for one in computations[name])

    def called(one: Instruction) -> float:
        inner = [total(name) for name in one.called]
        if one.opcode == "conditional":
            return max(inner)
        times: int | None = 1
        if one.opcode == "while" and sum(inner):
            times = trip_count(one, computations)
            if times is None:
                raise ValueError(f"a loop without a known trip count: {one.rest[:200]}")
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
    computations, entry = read(text)
    moves = lambda one: one.opcode in ("copy", "transpose")

    @functools.cache
    def total(name: str) -> int:
        return sum(map(counted, computations[name]))

    def counted(one: Instruction) -> int:
        if one.opcode == "fusion":
            inside = computations[one.called[0]]
            root, by_name = inside[-1], {x.name: x for x in inside}
            returned = root.operands if root.opcode == "tuple" else ()
            return sum(moves(by_name[name]) for name in returned) + moves(root)
        inner = list(map(total, one.called))
        if one.opcode == "conditional":
            return max(inner)
        trips = trip_count(one, computations) if one.opcode == "while" else 1
        return (trips or 1) * sum(inner) + moves(one)

    return total(entry)


def _own(
    one: Instruction,
    shapes: Mapping[str, tuple[int, ...] | None],
    kernels: Mapping[str, float],
) -> float:
    if one.opcode == "custom-call":
        if _LIBRARY_DOT.search(one.rest):
            raise ValueError(f"a matmul went to a library: {one.rest[:200]}")
        return kernels.get(re.sub(r"(\.\d+|\.clone)*$", "", one.name), 0.0)
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (shapes[name] for name in one.operands[:2])
    if one.opcode == "convolution":
        return 2.0 * _multiply_adds(one, left, right)
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    width = math.prod(left[i] for i in dims_of(summed[1])) if summed else 1
    return 2.0 * math.prod(shape(one)) * width


def _multiply_adds(one: Instruction, left, right) -> float:
    """Multiply-adds of a convolution; those with padding or a gap do not count."""
    inputs, filters, outputs = _LABELS.search(one.rest).groups()
    made = shape(one)
    window = _WINDOW.search(one.rest)
    given = dict(item.split("=") for item in window[1].split()) if window else {}
    count = float(made[outputs.index("b")] * made[outputs.index("f")])
    count *= right[filters.index("i")]
    for axis in range(len(outputs) - 2):
        label = str(axis)
        number = lambda name, default, axis=axis: int(
            given[name].split("x")[axis] if name in given else default
        )
        before = (
            int(given["pad"].split("x")[axis].split("_")[0]) if "pad" in given else 0
        )
        reached = (
            np.arange(made[outputs.index(label)])[:, None] * number("stride", 1)
            + np.arange(right[filters.index(label)])[None] * number("rhs_dilate", 1)
            - before
        )
        gap = number("lhs_dilate", 1)
        size = left[inputs.index(label)]
        real = (reached % gap == 0) & (reached >= 0) & (reached // gap < size)
        count *= int(real.sum())
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    return count / (int(groups[1]) if groups else 1)


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
    wanted = {core(one) for one in shapes}
    computations, _ = parse(text)
    fused = {
        name
        for instructions in read(text)[0].values()
        for one in instructions
        if one.opcode == "fusion"
        for name in one.called
    }
    return [
        f"{op}{list(made)}"
        for name, instructions in computations.items()
        for _, made, op, _ in (
            _returned(instructions) if name in fused and not inside else instructions
        )
        if made is not None and core(made) in wanted and op not in CARRIERS
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
