"""Kernels of one jaxpr that read the same input, so that they share a matmul."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

from jaxpeft.transform._moved import Kernel
from jaxpeft.transform._rule import RULES, Equation
from jaxpeft.transform._thin import read_together

_SAME_VALUE = ("convert_element_type", "copy", "reshape", "transpose")


class Shared:
    """Which contractions of a jaxpr read the same value is seen beforehand.

    Their kernels are brought up to their contractions when the first of them is
    reached, by the rules that say they only move a kernel.
    """

    def __init__(self, jaxpr, env: dict, move: Callable[[Any, list], list | None]):
        """Looks at a jaxpr.

        Args:
            jaxpr: an open jaxpr.
            env: the values of its variables that are known so far; grows as the
                walker goes on, and here where a kernel is moved before its turn.
            move: ``move(eqn, operands)`` applies a rule, or gives ``None``.
        """
        self.env, self.move = env, move
        self.made_by: dict[Any, Any] = {}
        self.groups: dict[int, list] = {}
        self.parts: dict[int, Any] = {}
        kernels = {v for v, x in env.items() if isinstance(x, Kernel) and x.terms}
        values: dict[Any, Any] = {}
        groups: dict[Any, list] = {}
        for eqn in jaxpr.eqns if kernels else ():
            held = [not isinstance(v, jex.Literal) and v in kernels for v in eqn.invars]
            name = eqn.primitive.name
            if sum(held) == 1 and name in RULES and RULES[name].moves:
                kernels.update(eqn.outvars)
                self.made_by.update(dict.fromkeys(eqn.outvars, eqn))
            elif name in _SAME_VALUE and len(eqn.invars) == 1:
                v = eqn.invars[0]
                if not isinstance(v, jex.Literal):
                    same = (name, str(eqn.params), values.get(v, v))
                    values[eqn.outvars[0]] = same
            elif name == "dot_general" and sum(held) == 1:
                x = eqn.invars[1 if held[0] else 0]
                if not isinstance(x, jex.Literal):
                    numbers = eqn.params["dimension_numbers"]
                    precision = str(eqn.params["precision"])
                    like = (values.get(x, x), str(numbers), precision, held[0])
                    groups.setdefault(like, []).append(eqn)
        for group in groups.values():
            if len(group) > 1:
                self.groups.update({id(eqn): group for eqn in group})

    def read(self, eqn: Equation, x, kernel_first: bool):
        """What this contraction's adapter reads, if it shares a product."""
        raw = eqn.raw
        if id(raw) in self.parts:
            return self.parts.pop(id(raw))
        group = self.groups.get(id(raw))
        if group is None:
            return None
        ready = {}
        for member in group:
            self.groups.pop(id(member), None)
            w = self._kernel(member.invars[0 if kernel_first else 1])
            if w is not None:
                ready[id(member)] = w
        if len(ready) < 2 or id(raw) not in ready:
            return None
        parts = read_together(list(ready.values()), x, eqn, kernel_first)
        if parts is None:
            return None
        self.parts.update(zip(ready, parts, strict=True))
        return self.parts.pop(id(raw))

    def _kernel(self, v) -> Kernel | None:
        """The kernel that a variable will hold, moved there now if it can be."""
        if v in self.env:
            return self.env[v] if isinstance(self.env[v], Kernel) else None
        eqn = self.made_by.get(v)
        if eqn is None:
            return None
        vals = []
        for u in eqn.invars:
            if isinstance(u, jex.Literal):
                vals.append(u.val)
            elif u in self.made_by:
                vals.append(self._kernel(u))
            else:
                vals.append(self.env.get(u))
        outs = None if any(x is None for x in vals) else self.move(eqn, vals)
        if outs is None:
            return None
        self.env.update(zip(eqn.outvars, outs, strict=True))
        return self.env[v] if isinstance(self.env[v], Kernel) else None
