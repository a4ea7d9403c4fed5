"""A kernel on its way to its contraction: base, factors, and the roles of its axes.

``adapt`` binds every adapted kernel once, on entry. What the model then does to the
kernel before it uses it (transpose, reshape, slice, ...) the transform does to the base
and to the factors alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft.numerics import Quantised, dense
from jaxpeft.tree._lift import (
    dims_of,
    from_matrices,
    layer_leaves,
    lifted_factors,
    to_matrices,
)
from jaxpeft.tree._node import AdaptedKernel, trailing, wider
from jaxpeft.tree._terms import BATCH, IN, OUT, Factors, Term

_BoundT = TypeVar("_BoundT", bound="Bound")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A kernel and its factors at one place of a program.

    Attributes:
        base: the kernel, ``roles`` in order.
        factors: batch axes first, then the axes that their fields declare.
        key: dropout keys ``[*batch]``, or ``None``.
        leaves: ``(frozen, trainable)`` for the user's tap, batch axes first, or
            ``None``.
        mask: 0 at positions of the input that are padding, batch axes first, or
            ``None``.
        names: the roles that the base's axes had when it was bound. A slice takes
            leading axes off, and the last ``base.ndim`` names stay right.
        path: the path of the site.
    """

    base: Any
    factors: Factors
    key: Any
    leaves: Any
    mask: Any
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

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

    def replace(self: _BoundT, **changes) -> _BoundT:
        return dataclasses.replace(self, **changes)

    def dims(self, role: str) -> tuple[int, ...]:
        return dims_of(self.base.shape, self.roles, role)


def bind(node: AdaptedKernel, taps: Any = None):
    """Computes a node's factors.

    Args:
        node: the adapted kernel.
        taps: a function of the user's, ``"own"`` for the reports of gates, or ``None``.

    Returns:
        A ``Bound``; or the kernel itself, an array, where nothing is to be computed
        beside it and the user has no tap on it.
    """
    f, call = lifted_factors(node), node.call or {}
    base = node.base if f.kernel is None else f.kernel
    batch = dims_of(base.shape, node.roles, BATCH)
    key = call.get("key")
    terms = [_as_called(t, key is not None, taps == "own") for t in f.terms]
    # A term of rank 0 adds nothing. Those that can be one are joined where they are
    # used: here that would be whole stacks beside the leaves, and their gradients.
    terms = tuple(t for t in terms if t.a.shape[-1])
    # Only a kernel of a contraction has an input that a tap could be shown.
    tapped = callable(taps) and node.adapter.where.leaf == "kernel"
    if not terms and f.c is None and f.o is None and not tapped:
        return base
    own = lambda x: x.reshape(batch + x.shape[1:])
    leaves = jax.tree.map(own, layer_leaves(node)) if tapped else None
    return Bound(
        base=base,
        factors=Factors(terms, f.c, f.o),
        key=key,
        leaves=leaves,
        mask=call.get("mask"),
        names=node.roles,
        path=node.site.path,
    )


def bare(base: Quantised, path: str) -> Bound:
    """A quantised kernel with nothing beside it.

    Args:
        base: the kernel.
        path: where it stands.
    """
    names = base.roles or (BATCH,) * (base.ndim - 2) + (IN, OUT)
    return Bound(base, Factors(), None, None, None, names, path)


def _as_called(term: Term, drops: bool, reports: bool) -> Term:
    """A term without the dropout and the report that a call does not ask for.

    A gate that neither acts nor reports is then left out, and with it its product with
    the input.
    """
    gate = term.gate
    if gate is not None and not reports:
        gate = dataclasses.replace(gate, report=None)
    if gate is not None and gate.apply is None and gate.report is None:
        gate = None
    return dataclasses.replace(term, drop=term.drop if drops else 0.0, gate=gate)


def join_terms(terms: Sequence[Term], rank_axis: int) -> tuple[Term, ...]:
    """Joins the terms that are products and nothing else: one pair of thin matmuls.

    Their pairs are concatenated along the rank, which in ``b [*batch, r, *out]`` is
    the axis behind the batch axes. The joined term stands where the first of them
    stood, and the others keep their order.
    """
    agree = lambda t: not t.drop and t.gate is None and t.rows is None
    alike = [t for t in terms if agree(t)]
    if len(alike) < 2:
        return tuple(terms)
    wide = wider(*(x.dtype for t in alike for x in (t.a, t.b)))
    a = jnp.concatenate([t.a.astype(wide) for t in alike], -1)
    b = jnp.concatenate([t.b.astype(wide) for t in alike], rank_axis)
    first = terms.index(alike[0])
    after = [t for t in terms[first:] if not agree(t)]
    return (*terms[:first], Term(a, b), *after)


def materialise(w: Bound, given: Any = None):
    """The merged kernel ``D_c (W + a b) D_o``.

    Computed in float32 or wider and cast once, to the given dtype, or else the base's.
    ``merge`` calls it; ``adapt`` exists so that a model need not.
    """
    arrays = [w.base, w.c, w.o, *(term.b for term in w.terms)]
    dtype = wider(*(x.dtype for x in arrays if x is not None))
    dtype = wider(dtype, given or dtype)
    matrices = dense(to_matrices(w.base, w.roles), dtype)
    layers, rows, columns = matrices.shape
    for term in join_terms(w.terms, rank_axis=len(w.dims(BATCH))):
        a = term.a.reshape(layers, rows, term.a.shape[-1]).astype(dtype)
        b = term.b.reshape(layers, a.shape[-1], columns).astype(dtype)
        matrices = matrices + jnp.matmul(a, b, precision="highest")
    if w.c is not None:
        matrices = matrices * w.c.reshape(layers, rows, 1).astype(dtype)
    if w.o is not None:
        matrices = matrices * w.o.reshape(layers, 1, columns).astype(dtype)
    matrices = matrices.astype(given or w.base.dtype)
    return from_matrices(matrices, w.base.shape, w.roles)
