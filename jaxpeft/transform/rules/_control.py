"""Control flow with kernels among its operands, issued again through jax's own API.

A kernel is a pytree, so a scan slices its base and its factors alike, and a
``shard_map`` shards them alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxpeft.transform import _compat
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
        return x.on_base(put) if _is_kernel(x) else put(x)

    return [constrain(x, s) for x, s in zip(vals, shardings, strict=True)]


@rule("scan")
def _scan(eqn: Equation, *vals) -> list:
    params = eqn.params
    jaxpr, jaxpr_consts = _compat.opened(params["jaxpr"])
    n, m = _compat.scan_counts(params)
    consts, init, xs = vals[:n], vals[n : n + m], vals[n + m :]
    for x in filter(_is_kernel, xs):
        x.check_stacked()
    carried = {i: x for i, x in enumerate(init) if _is_kernel(x)}
    shared = [*consts, *carried.values()]

    def body(state, x):
        step, carry = state
        inside = eqn.uses.child()
        held = [_at_step(w, step) for w in shared]
        full = _inserted(carry, dict(zip(carried, held[n:], strict=True)))
        outs = eqn.evaluate(jaxpr, jaxpr_consts, [*held[:n], *full, *x], inside)
        kept = _kept(outs[:m], full, carried)
        # A kernel that the body returns (NNX returns a module's state) is stacked.
        ys = [
            y.replace(names=(y.grown(), *y.roles)) if _is_kernel(y) else y
            for y in outs[m:]
        ]
        kept = _arrays(kept, "the scan's carry")
        return (_next(step), kept), (ys, joined(inside.tapped))

    start = [x for i, x in enumerate(init) if i not in carried]
    (_, carry), (ys, tapped) = lax.scan(
        body,
        (_first_step(shared), start),
        xs,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    eqn.uses.tapped.extend(tapped.items())
    return [*_inserted(carry, carried), *ys]


def _inserted(carry, kernels: dict[int, Any]) -> list:
    """A loop's full carry, with the kernels that stay outside of the real one."""
    carry = list(carry)
    for i, w in kernels.items():
        carry.insert(i, w)
    return carry


def _kept(outs: list, full: list, carried) -> list:
    """What a loop's body carries on, after a look at its kernels."""
    for i in carried:
        if not same(outs[i], full[i]):
            raise NoRule("the loop changes a kernel in its carry")
    return [out for i, out in enumerate(outs) if i not in carried]


def _first_step(shared: list):
    """A step counter, where a weight with dropout is used anew in each step."""
    drops = any(_is_kernel(w) and w.key is not None for w in shared)
    return jnp.zeros((), jnp.int32) if drops else None


def _next(step):
    return None if step is None else step + 1


def _at_step(w: Any, step) -> Any:
    """Gives a weight that all steps share another dropout mask in each."""
    if step is None or not _is_kernel(w) or w.key is None:
        return w
    keys = w.key.reshape(-1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return w.replace(key=keys.reshape(w.key.shape))


def joined(tapped: list[tuple[str, Any]]) -> dict[str, Any]:
    """``{site: statistics}``; several uses of a site are stacked on a first axis."""
    by_site: dict[str, list] = {}
    for path, statistics in tapped:
        by_site.setdefault(path, []).append(statistics)
    return {
        path: each[0]
        if len(each) == 1
        else jax.tree.map(lambda *x: jnp.stack(x), *each)
        for path, each in by_site.items()
    }


@rule("while")
def _while(eqn: Equation, *vals) -> list:
    params = eqn.params
    test_jaxpr, test_consts = _compat.opened(params["cond_jaxpr"])
    step_jaxpr, step_consts = _compat.opened(params["body_jaxpr"])
    n, m = params["cond_nconsts"], params["body_nconsts"]
    for_test, for_step, init = vals[:n], vals[n : n + m], vals[n + m :]
    carried = {i: x for i, x in enumerate(init) if _is_kernel(x)}

    def run(jaxpr, consts, args):
        inside = eqn.uses.child()
        outs = eqn.evaluate(jaxpr, consts, args, inside)
        if inside.tapped:
            raise NoRule(
                "a tap inside a while loop has no fixed number of results; use a scan"
            )
        return outs

    def held(weights, step):
        return [_at_step(w, step) for w in weights]

    def full(state):
        step, carry = state
        kernels = held(carried.values(), step)
        return _inserted(carry, dict(zip(carried, kernels, strict=True)))

    def body(state):
        step, _ = state
        before = full(state)
        outs = run(step_jaxpr, step_consts, [*held(for_step, step), *before])
        return _next(step), _arrays(_kept(outs, before, carried), "the loop's body")

    def test(state):
        return run(test_jaxpr, test_consts, [*held(for_test, state[0]), *full(state)])[
            0
        ]

    start = [x for i, x in enumerate(init) if i not in carried]
    first = _first_step([*for_test, *for_step, *carried.values()])
    _, carry = lax.while_loop(test, body, (first, start))
    return _inserted(carry, carried)


@rule("cond")
def _cond(eqn: Equation, index, *operands) -> list:

    def branch(closed):
        jaxpr, consts = _compat.opened(closed)

        def run(operands):
            inside = eqn.uses.child()
            outs = eqn.evaluate(jaxpr, consts, operands, inside)
            return _arrays(outs, "a branch"), joined(inside.tapped)

        return run

    branches = [branch(b) for b in eqn.params["branches"]]
    everywhere: dict[str, Any] = {}
    if eqn.uses.tap is not None:  # every branch emits what any branch emits
        for f in branches:
            everywhere |= jax.eval_shape(f, operands)[1]

    def complete(f):
        def run(operands):
            outs, tapped = f(operands)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), everywhere)
            return outs, zeros | tapped

        return run

    outs, tapped = lax.switch(index, [complete(f) for f in branches], operands)
    eqn.uses.tapped.extend(tapped.items())
    return outs


@rule("remat2", "checkpoint")
def _checkpoint(eqn: Equation, *vals) -> list:
    params = eqn.params
    jaxpr, consts = _compat.opened(params["jaxpr"])

    passed: dict[int, int] = {}

    def f(vals):
        if params.get("differentiated") and params["prevent_cse"]:
            vals = lax.optimization_barrier(vals)
        inside = eqn.uses.child()
        outs = eqn.evaluate(jaxpr, consts, vals, inside)
        # A kernel that only passes through stays the same one (a loop looks at that).
        for i, out in enumerate(outs):
            for j, val in enumerate(vals):
                if _is_kernel(val) and same(out, val):
                    passed[i], outs[i] = j, None
        return outs, joined(inside.tapped)

    again = jax.checkpoint(
        f, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    outs, tapped = again(vals)
    outs = [vals[passed[i]] if i in passed else out for i, out in enumerate(outs)]
    eqn.uses.tapped.extend(tapped.items())
    return outs


@rule("shard_map")
def _shard_map(eqn: Equation, *vals) -> list:
    params = eqn.params
    jaxpr, consts = _compat.opened(params["jaxpr"])
    in_specs = [
        _specs(x, spec) if _is_kernel(x) else spec
        for x, spec in zip(vals, params["in_specs"], strict=True)
    ]

    def f(*vals):
        inside = eqn.uses.child()
        outs = eqn.evaluate(jaxpr, consts, list(vals), inside)
        if inside.tapped:
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


def _specs(w: Kernel, spec: PartitionSpec) -> Kernel:
    """The kernel's spec, carried over to each factor."""
    entries = tuple(spec) + (None,) * (w.base.ndim - len(spec))
    if any(term.gate is not None for term in w.terms):
        for role, entry in zip(w.roles, entries, strict=True):
            if role == IN and entry is not None:
                raise NoRule("its method reads the whole input, which is sharded here")
    each = lambda where: PartitionSpec(
        *(None if i is None else entries[i] for i in where)
    )
    return w.with_layouts(each, base=spec)
