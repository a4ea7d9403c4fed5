"""A kernel on its way to its contraction: base, factors, and the roles of its axes.

``adapt`` binds every adapted kernel once, on entry. What the model then does to the
kernel before it uses it (transpose, reshape, slice, ...) is done here to the base and
to the factors alike.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core._lift import dims_of, layer_leaves, lifted_factors
from jaxpeft.core._node import BATCH, IN, OUT, AdaptedKernel, trailing, wider
from jaxpeft.core._terms import RANK, SLOT, Factors, Term, map_axes


class NoRule(Exception):
    """An equation that the library cannot follow a kernel through; says why."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A kernel and its factors at one place of a program.

    Attributes:
        base: the kernel, ``roles`` in order.
        factors: batch axes first, then the axes that their fields declare.
        key: dropout keys ``[*batch]``, or ``None``.
        leaves: ``(frozen, trainable)`` for a tap of the user's, batch axes first, or
            ``None``.
        mask: 0 at positions of the input that are padding, batch axes first, or
            ``None``.
        names: the roles of the base's axes when it was bound; slicing a leading axis
            leaves the last ``base.ndim`` of them valid.
        path: the site.
    """

    base: Any
    factors: Factors
    key: Any
    leaves: Any
    mask: Any
    names: tuple[str, ...]
    path: str

    def tree_flatten(self):
        arrays = (self.base, self.factors, self.key, self.leaves, self.mask)
        return arrays, (self.names, self.path)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        return cls(*arrays, *static)

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.factors.terms

    @property
    def c(self):
        return self.factors.c

    @property
    def o(self):
        return self.factors.o

    @property
    def reads_input(self) -> bool:
        """Whether no kernel has the effect of this one and its factors."""
        return self.factors.reads_input

    @property
    def roles(self) -> tuple[str, ...]:
        return trailing(self.names, self.base.ndim)

    def replace(self, **changes) -> "Bound":
        return dataclasses.replace(self, **changes)

    def dims(self, role: str) -> tuple[int, ...]:
        return dims_of(self.base.shape, self.roles, role)


def bind(node: AdaptedKernel, taps: Any = None):
    """Computes a node's factors; returns a ``Bound`` or, where it suffices, an array.

    Args:
        node: the adapted kernel.
        taps: a function of the user's, ``"own"`` for the reports of gates, or ``None``.
            A site with nothing to add is followed all the same where the user taps it.
    """
    f = lifted_factors(node)
    base = node.base if f.kernel is None else f.kernel
    batch = dims_of(base.shape, node.roles, BATCH)
    key = node.key if node.adapter.dropout_on == "input" else None
    terms = [_as_called(t, key is not None, taps == "own") for t in f.terms]
    terms = _joined(terms, rank_axis=len(batch))
    tapped = callable(taps) and node.adapter.leaves == "kernel"
    if not terms and f.c is None and f.o is None and not tapped:
        return base
    leaves = None
    if tapped:
        leaves = jax.tree.map(
            lambda x: x.reshape(batch + x.shape[1:]), layer_leaves(node)
        )
    return Bound(
        base=base,
        factors=Factors(terms, f.c, f.o),
        key=key,
        leaves=leaves,
        mask=(node.call or {}).get("mask"),
        names=node.roles,
        path=node.site.path,
    )


def _as_called(term: Term, drops: bool, reports: bool) -> Term:
    """A term without the dropout and the report that a call does not ask for."""
    gate = term.gate
    if gate is not None and not reports:
        gate = dataclasses.replace(gate, report=None)
    if gate is not None and gate.apply is None and gate.report is None:
        gate = None
    return dataclasses.replace(term, drop=term.drop if drops else 0.0, gate=gate)


def _joined(terms: list[Term], rank_axis: int) -> tuple[Term, ...]:
    """Terms of which nothing but their pairs differs as one: one pair of thin matmuls.

    It stands where the first of them stood.
    """
    agree = lambda t: not t.drop and t.gate is None and t.rows is None
    alike = [t for t in terms if agree(t)]
    if len(alike) < 2:
        return tuple(terms)
    wide = wider(*(x.dtype for t in alike for x in (t.a, t.b)))
    a = jnp.concatenate([t.a.astype(wide) for t in alike], -1)
    b = jnp.concatenate([t.b.astype(wide) for t in alike], rank_axis)
    first = terms.index(alike[0])
    rest = [t for t in terms[first:] if not agree(t)]
    return (*terms[:first], Term(a, b), *rest)


def materialise(w: Bound):
    """The merged kernel ``D_c (W + a b) D_o``: float32, cast once to the base's dtype.

    ``merge`` is this; in a model it is what ``adapt`` exists to avoid.
    """
    arrays = [w.base, w.c, w.o, *(term.b for term in w.terms)]
    dtype = wider(*(x.dtype for x in arrays if x is not None))
    batch, d_in, d_out = w.dims(BATCH), w.dims(IN), w.dims(OUT)
    rows, columns = math.prod(d_in), math.prod(d_out)
    order = _order(w.roles)
    matrix = w.base.transpose(order).reshape(*batch, rows, columns).astype(dtype)
    for term in w.terms:
        a = term.a.reshape(*batch, rows, term.a.shape[-1]).astype(dtype)
        b = term.b.reshape(*batch, a.shape[-1], columns).astype(dtype)
        matrix = matrix + jnp.matmul(a, b, precision="highest")
    if w.c is not None:
        matrix = matrix * w.c.reshape(*batch, rows, 1).astype(dtype)
    if w.o is not None:
        matrix = matrix * w.o.reshape(*batch, 1, columns).astype(dtype)
    matrix = matrix.reshape(batch + d_in + d_out).astype(w.base.dtype)
    return matrix.transpose(tuple(order.index(i) for i in range(len(order))))


def _order(roles) -> tuple[int, ...]:
    """The base's axes, batch first, then in, then out."""
    return sum(
        (tuple(i for i, r in enumerate(roles) if r == x) for x in (BATCH, IN, OUT)), ()
    )


# --- the axes of each factor --------------------------------------------------------

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
