"""Control flow with kernels among its operands, issued again through jax's own API.

A kernel is a pytree, so a scan slices its base and its factors alike, and a
``shard_map`` shards them alike.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpeft.numerics import is_quantised
from jaxpeft.transform import _compat
from jaxpeft.transform._base import placed
from jaxpeft.transform._moved import Kernel, NoRule, same
from jaxpeft.transform._rule import Equation, rule
from jaxpeft.tree import IN


def _is_kernel(x: Any) -> bool:
    return isinstance(x, Kernel)


def _arrays(outs: list, what: str) -> list:
    for x in outs:
        if _is_kernel(x):
            raise NoRule(f"{what} returns the kernel itself")
    return outs


@rule("jit", "pjit", "closed_call", "core_call")
def _inline(eqn: Equation, *vals) -> list:
    """``jit`` and ``closed_call``: their equations, where they stand.

    Shardings that a nested jit was given become constraints; its donation, which is
    for buffers that the outer program owns, is dropped.
    """
    params = eqn.params
    jaxpr, consts = _compat.opened(params.get("jaxpr", params.get("call_jaxpr")))
    vals = _constrained(vals, params.get("in_shardings"))
    with jax.named_scope(params.get("name") or eqn.raw.primitive.name):
        outs = eqn.evaluate(jaxpr, consts, list(vals), eqn.uses)
    return _constrained(outs, params.get("out_shardings"))


def _constrained(vals, shardings):
    if shardings is None or all(map(_compat.is_unspecified, shardings)):
        return vals

    def constrain(x, sharding):
        if _compat.is_unspecified(sharding):
            return x
        put = lambda y: lax.with_sharding_constraint(y, sharding)
        return x.on_base(lambda b: placed(b, put)) if _is_kernel(x) else put(x)

    return [constrain(x, s) for x, s in zip(vals, shardings, strict=True)]


class _Carry:
    """The carry of a loop, less the kernels in it, which no step may change."""

    def __init__(self, init, shared):
        self.kernels = {i: x for i, x in enumerate(init) if _is_kernel(x)}
        arrays = [x for i, x in enumerate(init) if i not in self.kernels]
        held = filter(_is_kernel, (*shared, *self.kernels.values()))
        drops = any(w.key is not None for w in held)
        self.start = (jnp.zeros((), jnp.int32) if drops else None), arrays

    def full(self, state) -> list:
        """All of the carry at a step; with no step number, before or after the loop."""
        step, carry = state[0], list(state[1])
        for i, w in self.kernels.items():
            carry.insert(i, _at_step(w, step))
        return carry

    def next(self, state, full: list, outs: list):
        """The state after a step that began with ``full`` and gave ``outs``."""
        for i in self.kernels:  # a changed one would be no kernel with these factors
            if not same(outs[i], full[i]):
                raise NoRule("the loop changes a kernel in its carry")
        rest = [out for i, out in enumerate(outs) if i not in self.kernels]
        step = None if state[0] is None else state[0] + 1
        return step, _arrays(rest, "the loop's body")


def _at_step(w: Any, step) -> Any:
    """Gives a weight that all steps share another dropout mask in each."""
    if step is None or not _is_kernel(w) or w.key is None:
        return w
    keys = w.key.reshape(-1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return w.replace(key=keys.reshape(w.key.shape))


@rule("scan")
def _scan(eqn: Equation, *vals) -> list:
    params = eqn.params
    n, m = _compat.scan_counts(params)
    consts, xs = vals[:n], vals[n + m :]
    for x in filter(_is_kernel, xs):
        x.check_stacked()
    carry = _Carry(vals[n : n + m], consts)

    def body(state, x):
        held, full = [_at_step(w, state[0]) for w in consts], carry.full(state)
        outs, tapped = eqn.enter(params["jaxpr"], [*held, *full, *x])
        # A kernel that the body returns (NNX returns a module's state) is stacked.
        ys = [
            y.replace(names=(y.grown(), *y.roles)) if _is_kernel(y) else y
            for y in outs[m:]
        ]
        return carry.next(state, full, outs[:m]), (ys, tapped)

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    (_, last), (ys, tapped) = lax.scan(body, carry.start, xs, **how)
    eqn.uses.tapped.extend(tapped.items())
    return [*carry.full((None, last)), *ys]


@rule("while")
def _while(eqn: Equation, *vals) -> list:
    params = eqn.params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    carry = _Carry(vals[n + m :], vals[: n + m])

    def run(jaxpr, weights, state):
        held, full = [_at_step(w, state[0]) for w in weights], carry.full(state)
        outs, tapped = eqn.enter(jaxpr, [*held, *full])
        if tapped:
            raise NoRule(
                "a tap inside a while loop has no fixed number of results; use a scan"
            )
        return full, outs

    def test(state):
        return run(params["cond_jaxpr"], vals[:n], state)[1][0]

    def body(state):
        return carry.next(state, *run(params["body_jaxpr"], vals[n : n + m], state))

    _, last = lax.while_loop(test, body, carry.start)
    return carry.full((None, last))


@rule("cond")
def _cond(eqn: Equation, index, *operands) -> list:
    if _is_kernel(index):
        raise NoRule("a branch is chosen by it")

    def branch(closed, operands):
        outs, tapped = eqn.enter(closed, operands)
        return _arrays(outs, "a branch"), tapped

    def complete(closed, operands):
        outs, tapped = branch(closed, operands)
        return outs, jax.tree.map(jnp.zeros_like, everywhere) | tapped

    each = lambda f: [functools.partial(f, b) for b in eqn.params["branches"]]
    everywhere: dict[str, Any] = {}
    if eqn.uses.tap is not None:  # every branch emits what any branch emits
        for f in each(branch):
            everywhere |= jax.eval_shape(f, operands)[1]
    outs, tapped = lax.switch(index, each(complete), operands)
    eqn.uses.tapped.extend(tapped.items())
    return outs


@rule("remat2", "checkpoint")
def _checkpoint(eqn: Equation, *vals) -> list:
    params = eqn.params
    passed: dict[int, int] = {}

    def f(vals):
        if params.get("differentiated") and params["prevent_cse"]:
            vals = lax.optimization_barrier(vals)
        outs, tapped = eqn.enter(params["jaxpr"], vals)
        # A kernel that only passes through stays the same one (a loop looks at that).
        for i, out in enumerate(outs):
            for j, val in enumerate(vals):
                if _is_kernel(val) and same(out, val):
                    passed[i], outs[i] = j, None
        return outs, tapped

    how = {name: params[name] for name in ("prevent_cse", "policy")}
    outs, tapped = jax.checkpoint(f, **how)(vals)
    outs = [vals[passed[i]] if i in passed else out for i, out in enumerate(outs)]
    eqn.uses.tapped.extend(tapped.items())
    return outs


@rule("shard_map")
def _shard_map(eqn: Equation, *vals) -> list:
    params = eqn.params
    specs, sizes = params["in_specs"], dict(params["mesh"].shape)
    vals = [_divided(x, s, sizes) for x, s in zip(vals, specs, strict=True)]
    in_specs = [
        _specs(x, spec, sizes) if _is_kernel(x) else spec
        for x, spec in zip(vals, specs, strict=True)
    ]

    def f(*vals):
        outs, tapped = eqn.enter(params["jaxpr"], vals)
        if tapped:
            raise NoRule("taps inside a shard_map have no sharding of their own")
        return tuple(_arrays(outs, "the sharded function"))

    outs = jax.shard_map(
        f,
        mesh=params["mesh"],
        in_specs=tuple(in_specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=_compat.manual_axes(params),
        check_vma=params["check_vma"],
    )(*vals)
    return list(outs)


def _divided(x: Any, spec: PartitionSpec, sizes: dict[str, int]) -> Any:
    """A quantised kernel whose blocks divide over the devices."""
    if not _is_kernel(x) or not is_quantised(x.base):
        return x
    each = [n if isinstance(n, tuple) else (n,) for n in spec]
    parts = [math.prod(sizes.get(name, 1) for name in names) for names in each]
    return x.replace(base=x.base.divided(parts))


def _specs(w: Kernel, spec: PartitionSpec, sizes: dict[str, int]) -> Kernel:
    """The kernel's spec, carried over to each factor."""
    entries = tuple(spec) + (None,) * (w.base.ndim - len(spec))
    named = [i for i, entry in enumerate(entries) if entry is not None]
    if w.has_gate and any(w.roles[i] == IN for i in named):
        raise NoRule("its method reads the whole input, which is sharded here")
    if any(term.rows is not None for term in w.terms):
        raise NoRule("rows of its input choose an adapter, and are sharded here")

    def each(x, layout):
        del x
        where = w.positions(layout)
        return PartitionSpec(*(None if i is None else entries[i] for i in where))

    base = w.base.specs(spec, sizes) if is_quantised(w.base) else spec
    return w.mapped(each, base=base)
