"""A kernel on its way: what is done to it and its factors alike until it is used."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.numerics import axis_groups
from jaxpeft.transform import _base
from jaxpeft.tree import (
    BATCH,
    IN,
    OUT,
    RANK,
    SLOT,
    Bound,
    Factors,
    Term,
    axes_of,
    join_terms,
    map_axes,
    wider,
)


class NoRule(Exception):
    """An equation that the library cannot follow a kernel through; says why."""


_OWN = (RANK, SLOT)  # axes that no axis of the kernel lies behind


@jax.tree_util.register_dataclass
class Kernel(Bound):
    """What a rule is handed in place of a kernel's array.

    The model sees the array ``base``. Beside it travel its adapter's factors. Each of
    the base's axes has one of the ``roles`` ``"batch"``, ``"in"`` and ``"out"``, and
    the role says which axes of the factors go with it. Every method gives another
    kernel; none changes this one. What a kernel's factors forbid raises ``NoRule``.

    ``infer_axes`` walks with kernels whose roles are still to be learnt. For them
    every move is allowed, and the uses at the end teach what the others check.
    """

    @classmethod
    def of(cls, bound: Bound) -> "Kernel":
        """The same, as a kernel that rules can move."""
        return cls(**vars(bound))

    @property
    def has_gate(self) -> bool:
        """Whether a gate acts, or is reported: it reads all of the input."""
        return any(term.gate is not None for term in self.terms)

    # How the roles of axes that an equation makes follow from those it had.

    def grown(self, role: str | None = None) -> str:
        """The role of an axis that grows out of one of size one, or of nothing."""
        return BATCH

    def regrouped(self, group: Sequence[int], shape: Sequence[int]) -> list[str]:
        """The roles of new axes, of these sizes, which a group of axes becomes."""
        roles = {self.roles[k] for k in group if self.base.shape[k] > 1}
        if len(roles) > 1 and not self.is_bare:
            raise NoRule(f"a reshape joins {' and '.join(sorted(roles))} axes")
        return [roles.pop() if roles else BATCH] * len(shape)

    def check_stacked(self) -> None:
        """Raises where a loop goes over the first axis, and it is no batch axis."""
        if self.roles[0] != BATCH and not self.is_bare:
            raise NoRule(
                f"the scan goes over an {self.roles[0]!r} axis of shape "
                f"{self.base.shape}; a scanned axis is a batch axis, such as "
                "axes={...: 'layer in out'}"
            )

    # Moves.

    @property
    def is_bare(self) -> bool:
        """Whether nothing is beside the base: a quantised kernel without an adapter.

        The roles of its axes then forbid nothing.
        """
        nothing = self.c is None and self.o is None and self.leaves is None
        return nothing and not self.terms

    def on_base(self, f: Callable[[Any], Any]) -> "Kernel":
        """Applies ``f`` to the base alone; the adapter keeps its own dtype."""
        base = f(self.base)
        if not jnp.issubdtype(base.dtype, jnp.floating):
            raise NoRule(f"the kernel becomes {base.dtype}")
        return self.replace(base=base)

    def transpose(self, permutation: Sequence[int]) -> "Kernel":
        """Permutes the kernel's axes; factors keep batch first, then in or out."""
        names = tuple(self.roles[p] for p in permutation)
        shape = self.base.shape
        ins = [p for p in permutation if self.roles[p] == IN and shape[p] > 1]
        if self.leaves is not None and ins != sorted(ins):
            raise NoRule(
                "a tap reads the input in the order of the kernel's in axes, and here "
                "they change places"
            )
        moved = self.replace(base=self.base.transpose(permutation), names=names)

        def permute(x, layout):
            # Axes of the rank and the slots stay; each other one follows the kernel's.
            old, new = self.positions(layout), moved.positions(layout)
            order = [
                k if i is None else old.index(permutation[i]) for k, i in enumerate(new)
            ]
            return x.transpose(*order, *range(len(new), x.ndim))

        return self.mapped(permute, base=moved.base, names=names)

    def reshape(self, shape: Sequence[int]) -> "Kernel":
        """Splits or joins axes of one role; never mixes two."""
        new, names = tuple(shape), []
        for before, after in axis_groups(self.base.shape, new):
            names += self.regrouped(before, [new[j] for j in after])
        return self._reroled(self.base.reshape(new), names)

    def squeeze(self, axes: Sequence[int]) -> "Kernel":
        """Drops axes of size one."""
        kept = [i for i in range(self.base.ndim) if i not in axes]
        base = self.base.reshape([self.base.shape[i] for i in kept])
        return self._reroled(base, [self.roles[i] for i in kept])

    def broadcast(self, shape: Sequence[int], where: Sequence[int]) -> "Kernel":
        """``lax.broadcast_in_dim``: new axes, and axes that grow, are batch axes."""
        old = zip(self.base.shape, self.roles, strict=True)
        before = dict(zip(where, old, strict=True))
        kept, names = [], []  # before axes grow
        for i, n in enumerate(shape):
            size, role = before.get(i, (1, None))
            kept.append(size)
            names.append(role if role and size == n else self.grown(role))
        grown = self._reroled(self.base.reshape(kept), names)

        def widen(x, layout):
            now = grown.positions(layout)
            full = [x.shape[k] if i is None else shape[i] for k, i in enumerate(now)]
            return jnp.broadcast_to(x, (*full, *x.shape[len(now) :]))

        return grown.mapped(widen, base=_base.broadcast(grown.base, shape))

    def along(self, axis: int, f: Callable[[Any, int], Any]) -> "Kernel":
        """Applies ``f(array, position)`` to the base and all that follow one axis."""
        if self.roles[axis] == IN and self.has_gate:
            raise NoRule(
                "its method reads the whole input, but the kernel's input is cut"
            )

        def cut(x, layout):
            where = self.positions(layout)
            return f(x, where.index(axis)) if axis in where else x

        return self.mapped(cut, base=_base.along(self.base, axis, f))

    def scaled(self, factor: Any, f: Callable[[Any, Any], Any]) -> "Kernel":
        """Applies a linear ``f(array, factor)``; the factor has the kernel's axes.

        A factor along out or batch axes, or a number, leaves ``c``, ``o`` and what is
        between the factors as they are: it scales the base and ``b``. One along in
        axes scales ``a``, which a gate forbids.
        """
        roles = {r for r, n in zip(self.roles, factor.shape, strict=True) if n > 1}
        if {IN, OUT} <= roles and not self.is_bare:
            raise NoRule("it is multiplied along in and out axes at once")
        if IN in roles and self.has_gate:
            raise NoRule("its method reads the input, and its in axes are scaled")
        own = (IN, RANK) if IN in roles else (RANK, OUT)  # the axes of `a`, or of `b`

        def scale(x, axes):
            if axes[-2:] != own:
                return x
            where = self.positions((BATCH, *axes))
            order = [i for i in where if i is not None]
            # The factor has size one along every axis that this side does not have.
            order += [i for i in range(factor.ndim) if i not in order]
            seen = [1 if i is None else factor.shape[i] for i in where]
            return f(x, factor.transpose(order).reshape(seen).astype(x.dtype))

        factors = map_axes(scale, self.factors)
        base = _base.scaled(self.base, factor, f)
        return self.replace(base=base, factors=factors)

    def beside(self, others: Sequence, starts: Sequence, axis: int, base) -> "Kernel":
        """This kernel and others as parts of one, concatenated along an axis.

        Args:
            others: the other kernels.
            starts: where on the axis each of them begins, this one first.
            axis: an in or out axis.
            base: the whole base, which may have plain parts, too.

        Returns:
            One kernel: ``a`` and ``b`` of the parts side by side, 0 where a part is
            not. Parts that drop entries of their input drop the same ones.
        """
        parts, terms = (self, *others), []
        for w, start in zip(parts, starts, strict=True):
            if w.roles != self.roles or w.roles[axis] == BATCH:
                roles = " and ".join(sorted({" ".join(w.roles) for w in parts}))
                raise NoRule(
                    f"kernels {roles!r} are concatenated along axis {axis}; their "
                    "roles must agree, and the axis be an in or out axis"
                )
            if w.c is not None or w.o is not None or w.has_gate or w.reads_input:
                raise NoRule(
                    f"kernels are concatenated, and the method of site {w.path!r} "
                    "scales its input or output, or has a gate or rows"
                )
            end = base.shape[axis] - start - w.base.shape[axis]

            def pad(x, position, ends=(start, end, 0)):
                by = [ends if i == position else (0, 0, 0) for i in range(x.ndim)]
                return lax.pad(x, jnp.zeros((), x.dtype), by)

            terms += w.along(axis, pad).terms
        if sum(w.leaves is not None for w in parts) > 1:
            raise NoRule("tapped kernels are concatenated")
        # One call gives all parts their key and mask, and at most one has leaves.
        given = lambda name: (x for w in parts if (x := getattr(w, name)) is not None)
        first = {name: next(given(name), None) for name in ("key", "leaves", "mask")}
        factors = Factors(join_terms(terms, len(self.dims(BATCH))))
        path = " + ".join(w.path for w in parts)
        return self.replace(base=base, factors=factors, path=path, **first)

    # Uses: a contraction says what the axes are, and the roles must agree.

    def assigned(self, words: Sequence[str], eqn: Any) -> "Kernel":
        """The kernel with these roles, which differ from its own in axes of size one.

        Args:
            words: ``"in"``, ``"out"`` or a word for batch axes, for each axis.
            eqn: the equation that uses the kernel so.
        """
        names = tuple(w if w in (IN, OUT) else BATCH for w in words)
        for size, mine, theirs in zip(self.base.shape, self.roles, names, strict=True):
            if size > 1 and mine != theirs and not self.is_bare:
                raise NoRule(
                    f"an axis of size {size} is {mine!r}, but is used as {theirs!r}"
                )
        return self if names == self.roles else self._reroled(self.base, names)

    def oriented(self, summed, batch, eqn: Any) -> "Kernel":
        """The kernel with its in axes summed, turned round for a transposed use."""
        w, shape = self, self.base.shape
        # An axis of size one may have any role: summed or kept, it is the same.
        big = lambda axes: {i for i in axes if shape[i] > 1}
        have = {role: big(axes_of(w.roles, role)) for role in (IN, OUT, BATCH)}
        if self.is_bare:
            have = {IN: big(summed), BATCH: big(batch), OUT: set()}
        if big(summed) == have[OUT] != have[IN] and not big(batch) - have[BATCH]:
            w = w.swapped()
        elif big(summed) != have[IN]:
            raise NoRule(
                f"axes {tuple(summed)} of shape {shape} are summed, but its roles "
                f"are {' '.join(w.roles)!r}: all of its in axes must be, and no other"
            )
        if big(batch) - have[BATCH]:
            raise NoRule(
                f"axes {tuple(batch)} of shape {shape} are batch axes of the "
                f"contraction, but its roles are {' '.join(w.roles)!r}"
            )
        names = [
            IN if i in summed else BATCH if i in batch or r == BATCH else OUT
            for i, r in enumerate(w.roles)
        ]
        return w.assigned(names, eqn)

    def is_table(self, axis: int, mapped: Sequence[int]) -> bool:
        """Whether picking along an axis gives rows of a table, rather than kernels.

        Args:
            axis: the axis that is picked along.
            mapped: axes that ``vmap`` goes over together with the indices.
        """
        if self.roles[axis] == BATCH and any(self.roles[i] != BATCH for i in mapped):
            raise NoRule("a kernel is picked for each of its in or out axes")
        return self.roles[axis] != BATCH

    def as_table(self, axis: int, mapped: Sequence[int], eqn: Any) -> "Kernel":
        """The kernel with the axis along which rows are looked up as its in axis."""
        w = self.swapped() if self.roles[axis] == OUT else self
        only = axes_of(w.roles, IN) == (axis,)
        fits = only and axes_of(w.roles, BATCH) == tuple(mapped)
        if not fits and not self.is_bare:
            raise NoRule(
                f"rows are looked up along axis {axis}, but its roles are "
                f"{' '.join(w.roles)!r}: a table is 'in out', or a stack of those "
                "under vmap"
            )
        return w

    def swapped(self) -> "Kernel":
        """The same kernel for its transposed use: in and out change places."""
        if self.reads_input or self.has_gate:
            raise NoRule("its method depends on the input and is used transposed")
        n = len(self.dims(BATCH))

        def turn(term):
            a, b = jnp.moveaxis(term.b, n, -1), jnp.moveaxis(term.a, -1, n)
            return dataclasses.replace(term, a=a, b=b)

        other = {IN: OUT, OUT: IN, BATCH: BATCH}
        return self.replace(
            factors=Factors(tuple(map(turn, self.terms)), c=self.o, o=self.c),
            names=tuple(other[r] for r in self.roles),
        )

    # The factors beside the base.

    def thin(self) -> tuple[Term, ...]:
        """The terms with the scale of the input inside them.

        ``(x c) a`` is ``x (c a)``: then only the base has an input of its own, and
        kernels that read one input share a product, whatever their scales.
        """
        if self.c is None:
            return self.terms

        def fold(term):
            slot = (1,) * (term.rows is not None)
            c = self.c.reshape(*self.dims(BATCH), *slot, *self.dims(IN), 1)
            wide = wider(term.a.dtype, c.dtype)
            return dataclasses.replace(term, a=term.a.astype(wide) * c.astype(wide))

        return tuple(map(fold, self.terms))

    def joined(self) -> "Kernel":
        """The kernel with one term in place of all that are products alone."""
        terms = join_terms(self.terms, rank_axis=len(self.dims(BATCH)))
        return self.replace(factors=dataclasses.replace(self.factors, terms=terms))

    def mapped(self, f: Callable[[Any, tuple], Any], **base) -> "Kernel":
        """Applies ``f(array, roles of its axes)`` to every array but the base.

        Behind the axes that have a role an array may have some of its own.
        """
        own = lambda x, axes: f(x, (BATCH, *axes))
        rest = self.key, self.leaves, self.mask
        key, leaves, mask = map_axes(own, rest)
        factors = map_axes(own, self.factors)
        return self.replace(factors=factors, key=key, leaves=leaves, mask=mask, **base)

    def positions(self, layout: Sequence[str]) -> list[int | None]:
        """The base's axis behind each axis of a factor; ``None`` for rank and slot."""
        where: list[int | None] = []
        for role in layout:
            where += [None] if role in _OWN else axes_of(self.roles, role)
        return where

    def _reroled(self, base, names: Sequence[str]) -> "Kernel":
        """Reshapes every factor to the sizes that a reshaped base gives its roles."""
        new = self.replace(base=base, names=tuple(names))

        def reshape(x, layout):
            old = self.positions(layout)
            # The rank and the slots keep their sizes, in their order.
            own = iter(n for n, i in zip(x.shape, old, strict=False) if i is None)
            now = [
                next(own) if i is None else base.shape[i] for i in new.positions(layout)
            ]
            return x.reshape(*now, *x.shape[len(old) :])

        return self.mapped(reshape, base=base, names=new.names)


def same(x: Any, y: Kernel) -> bool:
    """Whether a loop gave back the kernel that it was given."""
    if not isinstance(x, Kernel) or x.base is not y.base:
        return False
    leaves = zip(jax.tree.leaves(x.factors), jax.tree.leaves(y.factors), strict=True)
    return all(one is other for one, other in leaves)
