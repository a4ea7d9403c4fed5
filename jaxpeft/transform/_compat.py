"""All that depends on the version of jax: names inside equations, and their places."""

import contextlib
import functools
import os
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_JAX = os.path.dirname(os.path.abspath(jax.__file__))


def opened(jaxpr: Any) -> tuple[Any, list]:
    """``(jaxpr, consts)`` of a closed or an open jaxpr (one class from jax 0.11)."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def closed(invars, outvars, eqns) -> Any:
    """A closed jaxpr of some equations of another one."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = ("",) * len(invars), ("",) * len(outvars)
    info = _debug_info()("adapt", "adapt", *names)
    return jex.ClosedJaxpr(jex.Jaxpr([], invars, outvars, eqns, effects, info), [])


@functools.cache
def _debug_info() -> type:
    """The class of what a jaxpr knows of its source; jax.extend has it from 0.8."""
    return type(opened(jax.make_jaxpr(lambda: ())())[0].debug_info)


def only(found: Any) -> Any:
    """The result of an equation with one, also where its primitive gives a list."""
    return found[0] if isinstance(found, list) else found


def is_dropped(var: Any) -> bool:
    """Whether an equation's output is read by nobody and has no name."""
    return type(var).__name__ == "DropVar"  # jax.extend has it from 0.8


def scan_counts(params: dict) -> tuple[int, int]:
    """``(number of constants, number of carries)`` of a scan's operands."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.11 and later
    return len(tuple(consts)), len(tuple(carry))


def is_unspecified(sharding: Any) -> bool:
    """Whether a jit left a sharding open."""
    return not isinstance(sharding, jax.sharding.Sharding)


def manual_axes(params: dict) -> frozenset:
    """The mesh axes that a ``shard_map`` makes manual."""
    return frozenset(params.get("newly_manual_axes", params.get("manual_axes", ())))


def varying_axes(x: Any) -> frozenset:
    """The manual mesh axes along which ``x`` is known to differ."""
    kind = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", ()))


def as_varying(x: Any, axes: frozenset) -> Any:
    """``x``, known to differ along these manual axes, too."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)  # jax 0.7


def place(trail: Any) -> str:
    """``file:line (function)`` of the user's code behind an equation.

    Args:
        trail: the equations that lead to it, outermost first, itself last. What a
            nested jit traced earlier knows no line of the user's; its caller does.

    Returns:
        The innermost frame outside of jax, flax and this library; where there is
        none, the innermost outside of jax and this library.
    """
    fallback = None
    for eqn in reversed(trail):
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            if frame.file_name.startswith((_JAX, _HERE, contextlib.__file__)):
                continue
            if not frame.line_num:
                continue
            where = f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
            if f"{os.sep}flax{os.sep}" not in frame.file_name:
                return where
            fallback = fallback or where
    return fallback or "an unknown line"
