"""What is done to a kernel and its factors alike before it meets its input."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.tree import BATCH, IN, OUT, RANK, SLOT, Bound, Factors, dims_of, map_axes


class NoRule(Exception):
    """An equation that the library cannot follow a kernel through; says why."""


_OWN = (RANK, SLOT)  # axes that no axis of the kernel lies behind


def _map_factors(w: Bound, f: Callable[[Any, tuple], Any], **base) -> Bound:
    """Applies ``f(array, axes)`` to every array but the base."""
    rest = lambda tree: jax.tree.map(lambda x: f(x, (BATCH,)), tree)
    return w.replace(
        factors=map_axes(lambda x, axes: f(x, (BATCH, *axes)), w.factors),
        key=rest(w.key),
        leaves=rest(w.leaves),
        mask=rest(w.mask),
        **base,
    )


def _positions(w: Bound, layout) -> list[int | None]:
    """The base's axis behind each axis of a factor; ``None`` for the rank."""
    where: list[int | None] = []
    for role in layout:
        if role in _OWN:
            where.append(None)
        else:
            where += [i for i, r in enumerate(w.roles) if r == role]
    return where


def transpose(w: Bound, permutation: tuple[int, ...]) -> Bound:
    """Permutes the kernel's axes; factors keep batch first, then in or out."""
    names = tuple(w.roles[p] for p in permutation)
    ins = [p for p in permutation if w.roles[p] == IN and w.base.shape[p] > 1]
    if w.leaves is not None and ins != sorted(ins):
        raise NoRule(
            "a tap reads the input in the order of the kernel's in axes, and here they "
            "change places"
        )
    after = {old: new for new, old in enumerate(permutation)}

    def permute(x, layout):
        old = _positions(w, layout)
        spots, at = [], 0
        for role in layout:  # each role's axes, in their new order
            count = 1 if role in _OWN else w.roles.count(role)
            spots += sorted(range(at, at + count), key=lambda i: after.get(old[i], 0))
            at += count
        spots += range(at, x.ndim)  # a leaf's own axes, behind the batch axes
        return x if spots == list(range(x.ndim)) else x.transpose(spots)

    return _map_factors(w, permute, base=w.base.transpose(permutation), names=names)


def _reroled(w: Bound, base, names: tuple[str, ...]) -> Bound:
    """Reshapes every factor to the sizes that a reshaped base gives its roles."""
    dims = {role: dims_of(base.shape, names, role) for role in (BATCH, IN, OUT)}

    def reshape(x, layout):
        shape, at = (), 0
        for role in layout:
            if role in _OWN:
                shape, at = (*shape, x.shape[at]), at + 1
            else:
                shape, at = shape + dims[role], at + w.roles.count(role)
        return x.reshape(shape + x.shape[at:])

    return _map_factors(w, reshape, base=base, names=names)


def reshape(w: Bound, shape: tuple[int, ...]) -> Bound:
    """Splits or joins axes of one role; never mixes two."""
    old, new = w.base.shape, tuple(shape)
    names: list[str] = []
    i = j = 0
    while i < len(old) or j < len(new):
        # The smallest group of old axes that makes a group of new ones.
        i0, j0 = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        roles = {w.roles[k] for k in range(i0, i) if old[k] > 1}
        if len(roles) > 1:
            raise NoRule(f"the reshape {old} -> {new} joins {' and '.join(roles)} axes")
        names += [roles.pop() if roles else BATCH] * (j - j0)
    return _reroled(w, w.base.reshape(new), tuple(names))


def assign(w: Bound, names: tuple[str, ...]) -> Bound:
    """Gives axes of size one another role; refuses for any other axis."""
    for size, mine, theirs in zip(w.base.shape, w.roles, names, strict=True):
        if size > 1 and mine != theirs:
            raise NoRule(
                f"an axis of size {size} is {mine!r}, but is used as {theirs!r}"
            )
    return w if names == w.roles else _reroled(w, w.base, names)


def broadcast(w: Bound, shape: tuple[int, ...], where: tuple[int, ...]) -> Bound:
    """``lax.broadcast_in_dim``: new axes, and axes that grow, become batch axes."""
    kept = tuple(
        w.base.shape[where.index(i)] if i in where else 1 for i in range(len(shape))
    )
    names = tuple(
        w.roles[where.index(i)] if i in where and kept[i] == n else BATCH
        for i, n in enumerate(shape)
    )
    grown = _reroled(_dropped_ones(w), w.base.reshape(kept), names)
    sizes = dict(enumerate(shape))

    def widen(x, layout):
        now = _positions(grown, layout)
        full = tuple(x.shape[k] if i is None else sizes[i] for k, i in enumerate(now))
        return jnp.broadcast_to(x, full + x.shape[len(now) :])

    return _map_factors(grown, widen, base=jnp.broadcast_to(grown.base, shape))


def _dropped_ones(w: Bound) -> Bound:
    """The kernel without its axes of size one."""
    shape = tuple(n for n in w.base.shape if n > 1)
    names = tuple(r for n, r in zip(w.base.shape, w.roles, strict=True) if n > 1)
    return _reroled(w, w.base.reshape(shape), names)


def along(w: Bound, axis: int, f: Callable[[Any, int], Any]) -> Bound:
    """Applies ``f(array, position)`` to the base and all that follow one axis."""
    role = w.roles[axis]
    if role == IN and any(term.gate is not None for term in w.terms):
        raise NoRule("its method reads the whole input, but the kernel's input is cut")

    def cut(x, layout):
        where = _positions(w, layout)
        return f(x, where.index(axis)) if axis in where else x

    return _map_factors(w, cut, base=f(w.base, axis))


def scaled(w: Bound, f: Callable[[Any], Any]) -> Bound:
    """Applies a linear ``f`` (times a number, negation) to the kernel."""
    terms = tuple(dataclasses.replace(t, b=f(t.b)) for t in w.terms)
    return w.replace(
        base=f(w.base), factors=dataclasses.replace(w.factors, terms=terms)
    )


def swapped(w: Bound) -> Bound:
    """The same kernel for its transposed use: in and out change places."""
    if w.reads_input or any(term.gate is not None for term in w.terms):
        raise NoRule("its method depends on the input and is used transposed")
    n = len(w.dims(BATCH))

    def turn(term):
        a, b = jnp.moveaxis(term.b, n, -1), jnp.moveaxis(term.a, -1, n)
        return dataclasses.replace(term, a=a, b=b)

    other = {IN: OUT, OUT: IN, BATCH: BATCH}
    return w.replace(
        factors=Factors(tuple(map(turn, w.terms)), c=w.o, o=w.c),
        names=tuple(other[r] for r in w.roles),
    )


def same(x: Any, y: Bound) -> bool:
    """Whether a loop gave back the kernel that it was given."""
    if not isinstance(x, Bound) or x.base is not y.base:
        return False
    leaves = zip(jax.tree.leaves(x.factors), jax.tree.leaves(y.factors), strict=True)
    return all(one is other for one, other in leaves)


def with_base(w: Bound, f: Callable[[Any], Any]) -> Bound:
    """Applies ``f`` to the base alone; the adapter keeps its own dtype."""
    base = f(w.base)
    if not jnp.issubdtype(base.dtype, jnp.floating):
        raise NoRule(f"the kernel becomes {base.dtype}")
    return w.replace(base=base)


def map_layout(w: Bound, f: Callable[[list], Any], base: Any) -> Bound:
    """A tree like ``w`` with ``f(base axis behind each axis)`` for each factor."""

    def each(x, layout):
        where = _positions(w, layout)
        return f(where + [None] * (x.ndim - len(where)))

    return _map_factors(w, each, base=base)
