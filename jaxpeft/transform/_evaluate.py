"""The interpreter: follows kernels through a jaxpr to their contractions.

Equations that touch no kernel are replayed as they stand, in runs.
"""

import contextlib
import dataclasses
import warnings
from typing import Any, Literal

import jax
from jax import lax
from jax.extend import core as jex

from jaxpeft.transform import _compat, _moved, _thin
from jaxpeft.transform._moved import NoRule
from jaxpeft.transform.rules import _contraction as _contract
from jaxpeft.transform.rules import _control
from jaxpeft.transform.rules import _convolution as _convolve
from jaxpeft.transform.rules import _moves as _relabel
from jaxpeft.transform.rules._contraction import Uses
from jaxpeft.tree import BATCH, Bound, materialise

CONTROL = {
    "jit": _control.inline,
    "pjit": _control.inline,
    "closed_call": _control.inline,
    "core_call": _control.inline,
    "scan": _control.scan,
    "while": _control.while_,
    "cond": _control.cond,
    "remat2": _control.checkpoint,
    "checkpoint": _control.checkpoint,
    "shard_map": _control.shard_map,
}

_WAYS_OUT = (
    "jaxpeft.adapt has no rule for that. Two ways out: leave the site out of `targets` "
    "(or name it in `exclude`), or write "
    'jaxpeft.adapt(fn, unsupported="materialise") to form the merged kernel there.'
)


class UnsupportedError(NotImplementedError):
    """The model does something to an adapted kernel that ``adapt`` has no rule for."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates jaxprs in one mode.

    Attributes:
        unsupported: ``"error"`` or ``"materialise"``.
        ways_out: what the error advises.
        warned: places that were warned about in this call.
    """

    unsupported: Literal["error", "materialise"]
    ways_out: str = _WAYS_OUT
    warned: set = dataclasses.field(default_factory=set)

    def __call__(self, jaxpr: Any, consts: list, args: list, uses: Uses) -> list:
        """Evaluates an open jaxpr on arrays and kernels.

        Args:
            jaxpr: the open jaxpr.
            consts: values of its constants.
            args: arrays or ``Bound`` kernels.
            uses: gathers what happens at the sites.

        Returns:
            The outputs; a kernel that came through untouched is still a kernel.
        """
        env: dict[Any, Any] = {}
        variables = (*jaxpr.constvars, *jaxpr.invars)
        env.update(zip(variables, (*consts, *args), strict=True))
        last = _last_uses(jaxpr)
        shared = _Shared(self, jaxpr, env, uses)
        run: list = []

        def read(v):
            return v.val if isinstance(v, jex.Literal) else env[v]

        def flush(at: int) -> None:
            if run:
                env.update(_replay(run, env, lambda v: last.get(v, -1) >= at))
                run.clear()

        for at, eqn in enumerate(jaxpr.eqns):
            touched = any(
                isinstance(env.get(v), Bound)
                for v in eqn.invars
                if not isinstance(v, jex.Literal)
            )
            if not touched:
                run.append(eqn)
                continue
            if all(v in env for v in eqn.outvars):
                continue  # moved before its turn, for a shared down-projection
            flush(at)
            vals = [read(v) for v in eqn.invars]
            with eqn.ctx.manager, _scope(eqn):
                outs = self._touched(eqn, vals, uses.at(eqn), shared)
            env.update(zip(eqn.outvars, outs, strict=True))
        flush(len(jaxpr.eqns))
        return [read(v) for v in jaxpr.outvars]

    def _touched(self, eqn, vals, uses: Uses, shared: "_Shared") -> list:
        try:
            return self.apply(eqn, vals, uses, shared)
        except NoRule as e:
            reason = str(e)
        name, place = eqn.primitive.name, _compat.place(uses.trail)
        vals = [self.arrays(x, name, place, reason) for x in vals]
        outs = _issue(eqn, *vals)
        return list(outs) if eqn.primitive.multiple_results else [outs]

    def arrays(self, x: Any, primitive: str, place: str, reason: str) -> Any:
        """The merged kernel where that was asked for; else the error."""
        if not isinstance(x, Bound):
            return x
        what = f"site {x.path!r} reaches `{primitive}` at {place}: {reason}."
        if self.unsupported == "error":
            raise UnsupportedError(f"{what} {self.ways_out}")
        if x.reads_input:
            raise UnsupportedError(
                f"{what} Its method depends on the input, so it cannot be materialised."
            )
        if what not in self.warned:
            self.warned.add(what)
            dropout = "" if x.key is None else ", without its dropout"
            warnings.warn(
                f"{what} Its merged kernel is formed there{dropout}.", stacklevel=2
            )
        return materialise(x)

    def apply(self, eqn, vals, uses: Uses, shared: "_Shared") -> list:
        """One equation with kernels among its operands; raises ``NoRule``."""
        name, params = eqn.primitive.name, eqn.params
        if name in CONTROL:
            return CONTROL[name](eqn, vals, uses, self)
        if name == "optimization_barrier":
            return _barrier(vals)
        first = vals[0]
        others = [x for x in vals[1:] if isinstance(x, Bound)]
        if isinstance(first, Bound) and not others:
            if name in _relabel.ON_BASE:
                issue = lambda base: _issue(eqn, base, *vals[1:])
                return [_moved.with_base(first, issue)]
            if name in _relabel.RELABEL:
                return [_relabel.RELABEL[name](first, params)]
            match name:
                case "split":
                    return _relabel.split(first, params)
                case "dynamic_slice":
                    return [_relabel.dynamic_slice(first, tuple(vals[1:]), params)]
                case "gather":
                    return [self._gather(eqn, first, vals[1], params, uses)]
                case "mul" | "div":
                    return [_relabel.times(first, vals[1], name == "div")]
                case "neg":
                    return [_relabel.negate(first)]
        if name == "mul" and len(others) == 1 and not isinstance(first, Bound):
            return [_relabel.times(others[0], first, False)]
        if isinstance(first, Bound) and others:
            raise NoRule("two adapted kernels meet")
        match name:
            case "dot_general":
                return [self._dot(eqn, vals, uses, shared)]
            case "ragged_dot_general" if len(others) == 1:
                issue = lambda *xs: _issue(eqn, *xs)
                return [_contract.ragged_dot(others[0], first, vals[2], params, issue)]
            case "conv_general_dilated" if others:
                return [self._convolution(eqn, others[0], first, params, uses)]
        raise NoRule("the kernel is used by something that is not a contraction")

    def _dot(self, eqn, vals, uses: Uses, shared: "_Shared"):
        kernel_first = isinstance(vals[0], Bound)
        w, x = vals if kernel_first else vals[::-1]

        def issue(x, base):
            return _issue(eqn, *((base, x) if kernel_first else (x, base)))

        known = shared.read(eqn, x, kernel_first)
        return _contract.dot_general(w, x, eqn.params, kernel_first, uses, issue, known)

    def _gather(self, eqn, w: Bound, indices, params, uses: Uses):
        def issue(x, indices, **changes):
            return eqn.primitive.bind(x, indices, **(params | changes))

        axis, take, n = _relabel.gathered(w, indices, params, issue)
        order = _relabel.gather_order(params, n + w.base.ndim - 1)
        if w.roles[axis] == BATCH:
            rows = _relabel.gather_batch(w, axis, take, n)
            return _moved.transpose(rows, order)
        return _contract.look_up(w, axis, take, n, uses).transpose(order)

    def _convolution(self, eqn, w: Bound, x, params, uses):
        changes = {"preferred_element_type": None}

        def run_with(x, a):
            return eqn.primitive.bind(x, a, **(params | changes))

        issue = lambda x, base: _issue(eqn, x, base)
        return _convolve.convolution(w, x, params, uses, issue, run_with)


def _issue(eqn, *vals):
    """Binds one equation on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # (functions, parameters) in some versions
        functions, params = params
        return eqn.primitive.bind(*functions, *vals, **params)
    return eqn.primitive.bind(*vals, **params)


def _barrier(vals: list) -> list:
    bases = [x.base if isinstance(x, Bound) else x for x in vals]
    outs = lax.optimization_barrier(bases)
    return [
        x.replace(base=y) if isinstance(x, Bound) else y
        for x, y in zip(vals, outs, strict=True)
    ]


def _scope(eqn):
    stack = str(eqn.source_info.name_stack)
    return jax.named_scope(stack) if stack else contextlib.nullcontext()


def _last_uses(jaxpr) -> dict[Any, int]:
    """For each variable the index of the last equation that reads it."""
    last = {}
    for at, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                last[v] = at
    for v in jaxpr.outvars:
        if not isinstance(v, jex.Literal):
            last[v] = len(jaxpr.eqns)
    return last


def _replay(eqns: list, env: dict, wanted) -> dict:
    """Runs equations that touch no kernel; returns the variables still needed."""
    made, read = {}, {}
    for eqn in eqns:
        for v in eqn.invars:
            if not isinstance(v, jex.Literal) and v not in made:
                read[v] = None
        for v in eqn.outvars:
            if not isinstance(v, jex.DropVar):
                made[v] = None
    outvars = [v for v in made if wanted(v)]
    jaxpr = _compat.closed(list(read), outvars, list(eqns))
    return dict(
        zip(outvars, jex.jaxpr_as_fun(jaxpr)(*(env[v] for v in read)), strict=True)
    )


# Equations that may be evaluated before their turn: they move a kernel about and
# depend on little else.
_MOVES = frozenset(
    (
        *_relabel.ON_BASE,
        *_relabel.RELABEL,
        "split",
        "dynamic_slice",
        "mul",
        "div",
        "neg",
    )
)
_SAME_VALUE = ("convert_element_type", "copy", "reshape", "transpose")


class _Shared:
    """Kernels of one jaxpr that read the same input, so that they share a matmul.

    Which contractions read the same value is seen beforehand; their kernels are
    brought up to their contractions when the first of them is reached.
    """

    def __init__(self, evaluate: "Evaluator", jaxpr, env: dict, uses: Uses):
        self.evaluate, self.env, self.uses = evaluate, env, uses
        self.made_by: dict[Any, Any] = {}
        self.groups: dict[int, list] = {}
        self.parts: dict[int, Any] = {}
        kernels = {v for v, x in env.items() if isinstance(x, Bound)}
        values: dict[Any, Any] = {}
        groups: dict[Any, list] = {}
        for eqn in jaxpr.eqns if kernels else ():
            held = [not isinstance(v, jex.Literal) and v in kernels for v in eqn.invars]
            name = eqn.primitive.name
            if name in _MOVES and sum(held) == 1:
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

    def read(self, eqn, x, kernel_first: bool):
        """What this contraction's adapter reads, if it shares a product."""
        if id(eqn) in self.parts:
            return self.parts.pop(id(eqn))
        group = self.groups.get(id(eqn))
        if group is None:
            return None
        ready = {}
        for member in group:
            self.groups.pop(id(member), None)
            w = self._kernel(member.invars[0 if kernel_first else 1])
            if w is not None:
                ready[id(member)] = w
        if len(ready) < 2 or id(eqn) not in ready:
            return None
        kernels = list(ready.values())
        target = self.uses.target
        parts = _thin.read_together(kernels, x, eqn.params, kernel_first, target)
        if parts is None:
            return None
        self.parts.update(zip(ready, parts, strict=True))
        return self.parts.pop(id(eqn))

    def _kernel(self, v) -> Bound | None:
        """The kernel that a variable will hold, moved there now if it can be."""
        if v in self.env:
            return self.env[v] if isinstance(self.env[v], Bound) else None
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
        if any(x is None for x in vals):
            return None
        try:
            with eqn.ctx.manager, _scope(eqn):
                outs = self.evaluate.apply(eqn, vals, self.uses.at(eqn), self)
        except NoRule:
            return None
        self.env.update(zip(eqn.outvars, outs, strict=True))
        return self.env[v]
