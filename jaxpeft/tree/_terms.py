"""The one formula: a kernel and a sum of thin terms, and what gates and scales them."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import Partial

# What an axis of a kernel is, and the axes of factors that no axis of a kernel is
# behind: the rank's, and that of the slots which rows choose among.
BATCH, IN, OUT = "batch", "in", "out"
RANK, SLOT = "rank", "slot"


_T = TypeVar("_T")


def _along(*axes: str, default: Any = dataclasses.MISSING) -> Any:
    """A field whose arrays have these axes, then any of their own."""
    return dataclasses.field(default=default, metadata={"axes": axes})


@dataclass_transform(frozen_default=True, field_specifiers=(_along,))
def _record(cls: type[_T]) -> type[_T]:
    """A frozen dataclass and pytree; fields that declare no axes are static."""
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    arrays = [f.name for f in fields if "axes" in f.metadata]
    static = [f.name for f in fields if "axes" not in f.metadata]
    return jax.tree_util.register_dataclass(cls, arrays, static)


@_record
class Gate:
    r"""What acts between the two factors of a term, in rank space.

    .. math:: h' = g(x\, w, h), \qquad h = x a

    Attributes:
        reads: w ``[d_in, n]``: ``x w`` is all of the input that the gate sees. Dropout
            does not touch it, and it is computed at the highest precision. ``None``:
            the gate sees nothing of the input.
        apply: ``(x w [..., n] or None, h [..., r]) -> [..., r']``, with ``r'`` the
            width of ``b``; a ``jax.tree_util.Partial`` whose bound arrays belong to
            this kernel. A term with one cannot be merged. ``None``: the gate is only
            reported.
        report: ``(x w [..., n]) -> pytree``, what ``adapt(fn, taps="own")`` gathers;
            a ``Partial`` too, or ``None``.
        names: of the parts that the gate weighs, in the order of the gates.
    """

    reads: Any = _along(IN, RANK, default=None)
    apply: Partial | None = _along(default=None)
    report: Partial | None = _along(default=None)
    names: tuple[str, ...] = ()


@_record
class Rows:
    """Which pair of a term with several each row of the input takes.

    Pair 0 stands for none: those rows are ``x W``, bit for bit.

    Attributes:
        index: ``[rows]`` of k, integers; empty while it has not been said.
        scale: ``[S]``, of each pair.
        how: ``"gather"`` or ``"ragged"``, two ways to the same numbers.
    """

    index: Any = _along()
    scale: Any = _along()
    how: str = "gather"


@_record
class Term:
    r"""A thin product beside a kernel.

    .. math:: \mathrm{gate}\big(x, \mathrm{drop}(x c)\, a\big)\, b

    Attributes:
        a: ``[d_in, r]``, the down-projection; with ``rows`` ``[S, d_in, r]``.
        b: ``[r', d_out]``, the up-projection, with all scale factors inside; with
            ``rows`` ``[S, r', d_out]``.
        drop: probability of dropping an entry of this term's input, where a call has
            a key. Static.
        gate: what acts between the two, or ``None``.
        rows: which of S pairs each row takes, or ``None``.
        salt: what tells its dropout from that of another adapter of the same kernel.
            Static.
    """

    a: Any = _along(IN, RANK)
    b: Any = _along(RANK, OUT)
    drop: float = 0.0
    gate: Gate | None = _along(default=None)
    rows: Rows | None = _along(default=None)
    salt: int = 0

    @property
    def gated(self) -> bool:
        """Whether a gate acts, rather than being reported alone."""
        return self.gate is not None and self.gate.apply is not None

    @property
    def is_matrix(self) -> bool:
        """Whether the term is the product ``a b``, whatever the input."""
        return not self.gated and self.rows is None


@_record
class Factors:
    r"""What an adapter makes of one kernel, in the one formula of the library.

    .. math:: y = \Big((x c) W + \sum_t \mathrm{gate}_t\big(x,
              \mathrm{drop}(x c)\, a_t\big)\, b_t\Big) o

    Attributes:
        terms: the thin products; those that agree are computed as one.
        c: ``[d_in]``, scale of the input, or ``None``.
        o: ``[d_out]``, scale of the output, or ``None``.
        kernel: ``[d_in, d_out]``, takes the place of the base kernel, or ``None``.
    """

    terms: tuple[Term, ...] = _along(default=())
    c: Any = _along(IN, default=None)
    o: Any = _along(OUT, default=None)
    kernel: Any = _along(IN, OUT, default=None)

    @property
    def reads_input(self) -> bool:
        """Whether the change depends on the input, so that no kernel has its effect."""
        return not all(term.is_matrix for term in self.terms)


def map_axes(f: Callable[[Any, tuple[str, ...]], Any], x: Any, axes=()) -> Any:
    """Applies ``f(array, its declared axes)`` to every array of a record.

    An array may have axes of its own behind the declared ones.
    """
    if isinstance(x, tuple) and not dataclasses.is_dataclass(x):
        return tuple(map_axes(f, each, axes) for each in x)
    if not isinstance(x, Factors | Term | Gate | Rows):
        return jax.tree.map(lambda leaf: f(leaf, axes), x)
    slot = (SLOT,) if isinstance(x, Term) and x.rows is not None else ()
    changes = {}
    for field in dataclasses.fields(x):
        if "axes" in field.metadata:
            own = field.metadata["axes"]
            own = (*slot, *own) if field.name in ("a", "b") else own
            changes[field.name] = map_axes(f, getattr(x, field.name), own)
    return dataclasses.replace(x, **changes)
