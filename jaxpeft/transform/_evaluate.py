"""The walker: follows kernels through a jaxpr to where they are used.

Equations that touch no kernel are replayed as they stand, in runs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jaxpeft.transform import _compat
from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import Equation, Uses
from jaxpeft.transform._shared import Shared


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Walks through jaxprs.

    Attributes:
        without_rule: ``without_rule(eqn, operands, reason)``: the results of an
            equation that no rule follows a kernel through, or an error.
    """

    without_rule: Callable[[Equation, list, str], list]

    def __call__(
        self, jaxpr: Any, consts: Sequence, args: Sequence, uses: Uses
    ) -> list:
        """Evaluates an open jaxpr on arrays and kernels.

        Args:
            jaxpr: the open jaxpr.
            consts: values of its constants.
            args: arrays or kernels.
            uses: gathers what happens at the sites.

        Returns:
            The outputs; a kernel that came through untouched is still a kernel.
        """
        variables = (*jaxpr.constvars, *jaxpr.invars)
        env: dict[Any, Any] = dict(zip(variables, (*consts, *args), strict=True))
        not_yet = lambda *_: None
        move = lambda eqn, vals: self._apply(eqn, vals, uses, shared, not_yet)
        shared = Shared(jaxpr, env, move)
        run: list = []

        def read(v):
            return v.val if isinstance(v, jex.Literal) else env[v]

        def flush() -> None:
            if run:
                env.update(_replay(run, env))
                run.clear()

        for eqn in jaxpr.eqns:
            touched = any(
                isinstance(env.get(v), Kernel)
                for v in eqn.invars
                if not isinstance(v, jex.Literal)
            )
            if not touched:
                run.append(eqn)
                continue
            # What has only an effect, such as a print, has no results to look for.
            if eqn.outvars and all(v in env for v in eqn.outvars):
                continue  # moved before its turn, for a shared down-projection
            flush()
            vals = [read(v) for v in eqn.invars]
            outs = self._apply(eqn, vals, uses, shared, self.without_rule)
            env.update(zip(eqn.outvars, outs, strict=True))
        flush()
        return [read(v) for v in jaxpr.outvars]

    def _apply(self, raw, vals: list, uses: Uses, shared: Shared, without_rule):
        """One equation with kernels among its operands."""
        eqn = Equation(raw, self, uses.at(raw), shared)
        # The mesh and the like that the model had set where it wrote this equation.
        with raw.ctx.manager, _scope(raw):
            try:
                return eqn.apply(vals)
            except NoRule as e:
                reason = str(e)
            return without_rule(eqn, vals, reason)


def _scope(eqn):
    stack = str(eqn.source_info.name_stack)
    return jax.named_scope(stack) if stack else contextlib.nullcontext()


def _replay(eqns: list, env: dict) -> dict:
    """Runs equations that touch no kernel; returns the variables that they make."""
    made, read = {}, {}
    for eqn in eqns:
        for v in eqn.invars:
            if not isinstance(v, jex.Literal) and v not in made:
                read[v] = None
        for v in eqn.outvars:
            if not _compat.is_dropped(v):
                made[v] = None
    jaxpr = _compat.closed(list(read), list(made), list(eqns))
    outs = jex.jaxpr_as_fun(jaxpr)(*(env[v] for v in read))
    return dict(zip(made, outs, strict=True))
