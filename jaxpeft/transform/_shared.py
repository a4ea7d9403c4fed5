"""Kernels of one jaxpr that read the same input, so that they share a matmul."""

import contextlib
from collections.abc import Callable
from typing import Any

from jax.extend import core as jex

from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import RULES, Equation
from jaxpeft.tree import BATCH, IN

_SAME_VALUE = ("convert_element_type", "copy", "reshape", "transpose")


class Shared:
    """Finds the contractions of a jaxpr that read the same value, before the walk.

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
        # Variables that hold kernels, as far as one can see without moving them.
        kernels = {v for v, x in env.items() if isinstance(x, Kernel) and x.terms}
        # What a variable is a copy of: models cast or reshape an input anew for each
        # of its kernels.
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

    def mates(self, eqn: Equation, w: Kernel, side: int, summed) -> dict[int, Kernel]:
        """The kernels that read the input of a contraction after it does.

        Args:
            eqn: the contraction.
            w: its own kernel, with its in axes summed.
            side: which operand the kernel is, of each of them.
            summed: the kernel's axes that are summed.

        Returns:
            Those that can share a thin product with ``w``, by their equations, with
            their in axes summed.
        """
        fits = lambda w: bool(w.terms) and not w.dims(BATCH)
        alike = lambda one: (one.dims(IN), one.mask is None)
        found: dict[int, Kernel] = {}
        for member in self.groups.get(id(eqn.raw), ()) if fits(w) else ():
            self.groups.pop(id(member), None)  # whoever is left out reads alone
            other = None if member is eqn.raw else self._kernel(member.invars[side])
            with contextlib.suppress(NoRule):
                other = other and other.oriented(summed, (), eqn)
                if other and fits(other) and alike(other) == alike(w):
                    found[id(member)] = other
        return found

    def _kernel(self, v) -> Kernel | None:
        """The kernel that a variable will hold, moved there now if it can be."""
        if v in self.env or v not in self.made_by:
            known = self.env.get(v)
            return known if isinstance(known, Kernel) else None
        eqn = self.made_by[v]
        value = lambda u: self._kernel(u) if u in self.made_by else self.env.get(u)
        vals = [u.val if isinstance(u, jex.Literal) else value(u) for u in eqn.invars]
        outs = None if any(x is None for x in vals) else self.move(eqn, vals)
        if outs is None:  # it waits for an array, or its rule refuses: in its turn
            return None
        self.env.update(zip(eqn.outvars, outs, strict=True))
        return self.env[v] if isinstance(self.env[v], Kernel) else None
