"""FLOPs of Pallas kernels, which a compiled program does not tell."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def kernel_flops(jaxpr: Any) -> dict[str, float]:
    """Returns the FLOPs of one call of each Pallas kernel in a traced function.

    Every cell of a kernel's grid counts, also those that it skips, as attention is
    counted in general: a causal one as if all tokens saw all.

    Args:
        jaxpr: of the function, ``jax.jit(f).trace(...).jaxpr``.

    Returns:
        ``{name: FLOPs of its matmuls}``, on one device where it stands in a
        ``shard_map``. Of kernels that share a name, the dearest.

    Example:
        >>> import jax
        >>> kernel_flops(jax.make_jaxpr(lambda x: x + 1)(1.0))
        {}
    """
    found: dict[str, float] = {}
    for equation in _equations(getattr(jaxpr, "jaxpr", jaxpr)):
        if equation.primitive.name != "pallas_call":
            continue
        flops = _cells(equation) * _flops(equation.params["jaxpr"])
        name = _name(equation.params)
        found[name] = max(flops, found.get(name, 0.0))
    return found


def traced_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of all matmuls in a traced function, on all devices together.

    As they are written, before a compiler leaves anything out or computes it twice.

    Args:
        jaxpr: as for ``kernel_flops``.

    Returns:
        The count: loops of known length count as often as they run, others once, of
        branches the dearest.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> f = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)
        >>> traced_flops(jax.make_jaxpr(f)(jnp.ones((2, 2))))
        48.0
    """
    return _flops(getattr(jaxpr, "jaxpr", jaxpr))


def _name(params: Any) -> str:
    named = params.get("name_and_src_info")
    return getattr(named, "name", None) or params.get("name") or "kernel"


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in _inner(equation):
                yield from _equations(inner)


def _inner(equation: Any) -> list[Any]:
    values = [
        v if isinstance(v, tuple | list) else (v,) for v in equation.params.values()
    ]
    flat = [getattr(x, "jaxpr", x) for value in values for x in value]
    return [x for x in flat if isinstance(x, core.Jaxpr)]


def _flops(jaxpr: Any) -> float:
    """Of the matmuls of a function, loops counted out; of branches the dearest."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            width = math.prod(left[i] for i in summed)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * width
            continue
        inner, times = [_flops(one) for one in _inner(equation)], 1
        if equation.primitive.name == "cond":
            inner = [max(inner)]
        elif equation.primitive.name == "scan":
            times = equation.params["length"]
        elif equation.primitive.name == "shard_map":
            times = equation.params["mesh"].size
        elif equation.primitive.name == "pallas_call":
            times = _cells(equation)
        total += times * sum(inner)
    return total


def _cells(equation: Any) -> int:
    grid = equation.params["grid_mapping"].grid
    return math.prod(n for n in grid if isinstance(n, int))
