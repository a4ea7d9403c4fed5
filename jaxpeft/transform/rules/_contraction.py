"""Where a kernel meets its input: ``y = ((x c) W + sum of gate((x c) a) b) o``.

Every rule here computes the model's own contraction with the base, as the model
wrote it, and adds two thin ones.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial

from jaxpeft.numerics import dense
from jaxpeft.transform import _compat
from jaxpeft.transform._base import contracted
from jaxpeft.transform._layout import lies_as
from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import Equation, Uses, only_kernel, rule
from jaxpeft.transform._thin import (
    Read,
    labelled_dot,
    precision_of,
    read,
    shown,
    written,
)
from jaxpeft.transform.rules._rows import check_rows, looked_up_changes, row_changes
from jaxpeft.tree import BATCH, IN, OUT, Rows, Term, axes_of, wider

# A remat policy that keeps this name spares recomputing outputs that are scaled: what
# the gradient of their scale reads.
UNSCALED = "jaxpeft_unscaled"


def spread_along(x, labels, out_labels):
    """``x``, if there is one, transposed and reshaped to broadcast along labels."""
    if x is None:
        return None
    order = sorted(range(len(labels)), key=lambda i: out_labels.index(labels[i]))
    x = x.transpose(order)
    sizes = {labels[i]: x.shape[k] for k, i in enumerate(order)}
    return x.reshape(tuple(sizes.get(l, 1) for l in out_labels))


def times(x, scale):
    """Multiplies in the wider dtype, returns ``x``'s own."""
    wide = wider(x.dtype, scale.dtype)
    return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)


def dropped(x, w: Kernel, term: Term, uses: Uses):
    """Inverted dropout on a term's input; the identity at rate 0."""
    if not (rate := term.drop):
        return x
    key = jax.random.fold_in(w.key.reshape(-1)[0], uses.number(w.path))
    if term.salt:  # another adapter of the kernel draws from the same key
        key = jax.random.fold_in(key, term.salt)
    for name in sorted(_compat.varying_axes(x)):  # each shard draws its own
        key = jax.random.fold_in(key, lax.axis_index(name))
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    scaled = x * jnp.asarray(1 / (1 - rate), x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(x))


def contract(
    eqn: Equation,
    w: Kernel,
    x: Any,
    dimension_numbers: Any,
    run: Callable[[Any, Any], Any],
    *,
    kernel_first: bool = False,
) -> Any:
    """Contracts a kernel with its input, and adds what its adapter adds.

    What a rule returns where a primitive sums over axes of an input and a kernel.

    Args:
        eqn: the equation that the rule was called with.
        w: the kernel.
        x: the input, an array.
        dimension_numbers: which axes of the two are summed and which are batch axes,
            as in ``lax.dot_general(x, kernel, dimension_numbers)``. The result has the
            batch axes, the other axes of ``x``, and those of the kernel.
        run: ``run(x, base)`` computes this contraction on arrays, as the model does:
            with the primitive itself. The adapter's own two are thin calls of
            ``dot_general``.
        kernel_first: whether the kernel is the left operand, so that the numbers and
            the result have the kernel first. (``run`` has the input first.)

    Returns:
        The result, of the dtype that ``run`` gives.

    Raises:
        NoRule: the kernel's roles do not fit the axes that are summed, or its method
            has no form for this use.
    """
    (left, right), (left_batch, right_batch) = dimension_numbers
    sides = (left, left_batch), (right, right_batch)
    (w_sum, w_batch), (x_sum, x_batch) = sides if kernel_first else sides[::-1]
    w, uses = w.oriented(w_sum, w_batch, eqn), eqn.uses
    # Axes have labels. An axis of the input that goes together with one of the kernel,
    # summed or as a batch axis, has that one's label; the others have their own.
    w_labels = [("w", i) for i in range(w.base.ndim)]
    x_labels = [("x", i) for i in range(x.ndim)]
    for i, j in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        x_labels[i] = w_labels[j]
    shared = [w_labels[i] for i in w_batch]
    x_free = [l for l in x_labels if l not in w_labels]
    w_free = [l for l in w_labels if l not in x_labels]
    out = shared + (w_free + x_free if kernel_first else x_free + w_free)

    ins, outs, batch = (_labels(w, role) for role in (IN, OUT, BATCH))
    precision = precision_of(eqn.params)
    product = functools.partial(labelled_dot, target=uses.target)
    given, x = x, shown(w, x, x_labels)
    rank = [("r", 0)]
    h_labels = batch + x_free + rank

    def thin(columns, how, x=x):
        labels = batch + ins + rank
        return product(x, x_labels, columns, labels, h_labels, how)

    # Before the base: then the bases' gradients of one input are added up first, and a
    # mesh sums them over its devices once, not on both sides of the thin products'.
    known = eqn.shared.parts.pop(id(eqn.raw), None)
    if known is None:
        mates = eqn.shared.mates(eqn, w, 1 - kernel_first, w_sum)
        readers = [k.thin() for k in (w, *mates.values())]
        known, *others = read(readers, thin, precision, uses.target)
        eqn.shared.parts.update(zip(mates, others, strict=True))

    z = given
    if w.c is not None:
        # An expert axis that the input lacks must be spelled out to scale the input.
        spelled = [l for l in batch if l not in x_labels] + x_labels
        z = z.reshape((1,) * (len(spelled) - z.ndim) + z.shape)
        scaled = times(z, spread_along(w.c, batch + ins, spelled))
        z = lies_as(scaled, z) if scaled.shape == z.shape else scaled
        if spelled != x_labels:

            def run(z, base):
                y = labelled_dot(z, spelled, base, w_labels, out, precision)
                return y.astype(eqn.params.get("preferred_element_type") or y.dtype)

    kept = [l for i, l in enumerate(w_labels) if i not in w_sum]
    y = contracted(run, z, w.base, w_sum, lambda s: spread_along(s, kept, out))

    record(uses, w, given, x_labels, batch, ins, known)
    down = lambda x, a: thin(a, precision, x)
    b_labels = batch + rank + outs
    up = lambda h, b: product(h, h_labels, b, b_labels, out, precision)
    changes = changes_of(w, x, known, down, up, uses)
    y = finish(y, changes, spread_along(w.o, batch + outs, out))
    for term in w.thin():
        if term.rows is not None:
            y = _each_row(term, term.rows, w, x, x_labels, y, out, precision)
    return y


def _labels(w: Kernel, role: str) -> list[tuple[str, int]]:
    """The labels of a kernel's axes with a role."""
    return [("w", i) for i in axes_of(w.roles, role)]


def _each_row(term: Term, rows: Rows, w: Kernel, x, x_labels, y, out, precision):
    """Adds to each row of the input, along its first axis, what that row chose."""
    ins, outs, batch = (_labels(w, role) for role in (IN, OUT, BATCH))
    rest = [l for l in x_labels if l not in batch and l not in ins]
    if math.prod(w.dims(BATCH)) != 1 or rest[:1] != [("x", 0)]:
        raise NoRule(
            "rows of its input choose an adapter, but here the input's first axis is "
            "no row, or the kernel is a stack"
        )
    count, rank = rows.scale.shape[-1], term.a.shape[-1]
    a, b = term.a.reshape(count, -1, rank), term.b.reshape(count, rank, -1)
    flat_rows = Rows(rows.index.reshape(-1), rows.scale.reshape(count), rows.how)
    check_rows(flat_rows.index, x.shape, w.path)
    sizes = [x.shape[i] for _, i in rest]
    flat = _rows(x, x_labels, batch, ins)[0]
    flat = flat.reshape(sizes[0], math.prod(sizes[1:]), math.prod(w.dims(IN)))
    delta = row_changes(a, b, flat_rows, flat, precision)
    delta = delta.reshape(*w.dims(BATCH), *sizes, *w.dims(OUT))
    labels = batch + rest + outs
    delta = delta.transpose([labels.index(l) for l in out])
    chosen = (flat_rows.index != 0).reshape([-1 if l == ("x", 0) else 1 for l in out])
    return jnp.where(chosen, finish(y, [delta]), y)


def changes_of(w: Kernel, x, known: list[Read], down, up, uses: Uses) -> list:
    """What terms add to ``x W``: the sum of ``gate(x, drop(x) c a) b``.

    Args:
        w: the kernel.
        x: the input as its adapter sees it, not scaled.
        known: what each term has read of it already.
        down: ``down(x, a)``, in the layout of this use.
        up: ``up(h, b)``, in that of the result.
        uses: what the call gathers.
    """
    pairs: dict[Any, list] = {}
    rank_axis = len(w.dims(BATCH))
    for term, (h, seen) in zip(w.thin(), known, strict=True):
        if term.rows is not None:
            continue
        if h is None:
            h = down(dropped(x, w, term, uses), term.a)
        if term.gate is not None and term.gate.apply is not None:
            h = _by_layer(term.gate.apply, rank_axis, seen, h)
        pairs.setdefault((h.dtype, term.b.dtype), []).append((h, term.b))
    together = lambda made: written(up, rank_axis, *zip(*made, strict=True))
    return [together(x) if len(x) > 1 else up(*x[0]) for x in pairs.values()]


def finish(y, changes: list, o=None):
    """Adds what terms change and scales, wide; rounds once to ``y``'s dtype.

    Args:
        y: the model's own result.
        changes: arrays that are added.
        o: the scale of the output, which broadcasts with ``y``, or ``None``.
    """
    dtype = y.dtype
    if changes:
        delta = functools.reduce(operator.add, changes)
        wide = wider(dtype, delta.dtype)
        y = y.astype(wide) + delta.astype(wide)
    return y.astype(dtype) if o is None else _scaled(dtype, y, o)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scaled(dtype, y, o):
    """``y o``, rounded once to ``dtype``.

    The gradient of ``o`` sums ``y``, which then lay beside ``y o`` throughout the
    backward pass. It is had back from ``y o``, and only where ``o`` is 0 kept itself.
    """
    return jnp.where(o == 0, jnp.zeros((), dtype), _kept(dtype, y, o))


def _kept(dtype, y, o):
    wide = wider(y.dtype, o.dtype)
    y, o = y.astype(wide), o.astype(wide)
    return checkpoint_name(jnp.where(o == 0, y, y * o).astype(dtype), UNSCALED)


@_scaled.defjvp
def _scaled_jvp(dtype, primals, tangents):
    (y, o), (y_dot, o_dot) = primals, tangents
    kept, wide = _kept(dtype, y, o), wider(y.dtype, o.dtype)
    out = jnp.where(o == 0, jnp.zeros((), dtype), kept)
    share = o_dot / jnp.where(o == 0, jnp.ones_like(o), o)
    dot = y_dot.astype(wide) * o.astype(wide) + kept.astype(wide) * share.astype(wide)
    return out, dot.astype(dtype)


def _rows(x, labels, batch, ins):
    """``x`` as ``[*shared batch, rest..., d_in]``, and which batch axes it has."""
    shared = [l for l in batch if l in labels]
    rest = [l for l in labels if l not in batch and l not in ins]
    x = x.transpose([labels.index(l) for l in shared + rest + ins])
    flat = x.shape[: len(shared) + len(rest)]
    width = math.prod(x.shape[len(flat) :])
    return x.reshape(*flat, width), [l in labels for l in batch]


def _by_layer(of_gate: Partial, batch_axes: int, *given):
    """Calls a gate's function for each entry of its batch axes, which come first."""
    each = lambda f, *own: f(*own)
    for _ in range(batch_axes):
        each = jax.vmap(each)
    return each(of_gate, *given)


def record(uses: Uses, w: Kernel, x, x_labels, batch, ins, known: list[Read]):
    """Keeps what the gates and a tap of the user's say of an input.

    A kernel has reports, or leaves for the tap, only where a call asks for them.
    """
    for term, (_, seen) in zip(w.terms, known, strict=True):
        if term.gate is not None and term.gate.report is not None:
            uses.record(w.path, _by_layer(term.gate.report, len(batch), seen))
    tap = uses.tap
    if w.leaves is None or not callable(tap):
        return
    rows, present = _rows(x, x_labels, batch, ins)
    apply = lambda x, leaves: tap(x, *leaves)
    for here, size in reversed(list(zip(present, w.dims(BATCH), strict=True))):
        in_axes = (0 if here else None, 0)
        apply = jax.vmap(apply, in_axes=in_axes, axis_size=size)
    uses.record(w.path, apply(rows, w.leaves))


def look_up(
    eqn: Equation,
    w: Kernel,
    axis: int,
    take: Callable[[Any, int], Any],
    index_ndim: int,
    paired: Sequence[int] = (),
) -> Any:
    """Takes rows of an embedding table: rows of the base and of ``a``.

    What a rule returns where a primitive picks rows of a kernel by their numbers. A
    look-up has no input, so it has no dropout and nothing is tapped at it.

    Args:
        eqn: the equation that the rule was called with.
        w: the table.
        axis: the axis that is indexed.
        take: ``take(array, position)`` gathers along one axis of an array and puts
            the index axes first.
        index_ndim: the number of index axes.
        paired: the index axes that the table's first axes go together with, one each:
            ``vmap`` over tables and indices at once. ``take`` does that, too.

    Returns:
        ``[*index, *rest]``, ``rest`` the table's axes that are neither indexed nor
        paired.

    Raises:
        NoRule: the table's roles do not fit, or its method reads its input.
    """
    w = w.as_table(axis, range(len(paired)), eqn).joined()
    if w.has_gate:
        raise NoRule("its method depends on the input, and a look-up has none")
    if (paired or not index_ndim) and any(t.rows is not None for t in w.terms):
        what = "tables are mapped with ids" if paired else "one id is looked up alone"
        raise NoRule(f"rows choose an adapter, and here {what}")
    rows = w.along(axis, take)
    y, changes = dense(rows.base), []
    batch, index = [("x", i) for i in paired], [("x", i) for i in range(index_ndim)]
    rest, rank = [("w", i) for i in range(y.ndim - index_ndim)], [("r", 0)]
    up = functools.partial(labelled_dot, target=eqn.uses.target)
    if rows.c is not None:
        y = times(y, spread_along(rows.c, index, index + rest))
    for term in rows.terms:
        a, b = term.a, term.b
        if term.rows is not None:  # slots: nothing else is beside the table
            check_rows(term.rows.index, y.shape, w.path)
            chosen = (term.rows.index != 0).reshape(-1, *(1,) * (y.ndim - 1))
            change = looked_up_changes(a, b, term.rows, index_ndim)
            return jnp.where(chosen, finish(y, [change]), y)
        if rows.c is not None:
            a = times(a, rows.c[..., None])
        changes.append(up(a, index + rank, b, batch + rank + rest, index + rest))
    return finish(y, changes, spread_along(rows.o, batch + rest, index + rest))


@rule("dot_general")
def _dot_general(eqn: Equation, left, right):
    kernel_first = only_kernel((left, right)) == 0
    w, x = (left, right) if kernel_first else (right, left)
    run = lambda x, base: eqn.run(*((base, x) if kernel_first else (x, base)))
    numbers = eqn.params["dimension_numbers"]
    return contract(eqn, w, x, numbers, run, kernel_first=kernel_first)


@rule("ragged_dot_general")
def _ragged_dot(eqn: Equation, x, w, group_sizes):
    """``lax.ragged_dot`` over experts: ``x [m, k]``, kernel ``[g, k, n]``."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    summed = tuple(map(tuple, numbers.dot_dimension_numbers[0]))
    if (
        only_kernel((x, w, group_sizes)) != 1
        or summed != ((1,), (1,))
        or any(numbers.dot_dimension_numbers[1])
        or tuple(numbers.rhs_group_dimensions) != (0,)
    ):
        raise NoRule("ragged_dot needs a kernel 'expert in out' and its plain form")
    w = w.assigned(("expert", IN, OUT), eqn).joined()
    special = w.has_gate or w.reads_input
    if special or w.key is not None or w.leaves is not None:
        raise NoRule("gates, rows, dropout and taps have no form in a ragged_dot")
    rows = x.shape[0]
    expert = jnp.repeat(
        jnp.arange(w.base.shape[0]), group_sizes, total_repeat_length=rows
    )
    given = x
    if w.c is not None:
        x = times(x, w.c[expert])
    run = lambda x, base: eqn.run(x, base, group_sizes)
    y = contracted(run, x, w.base, (1,), lambda scale: scale[expert])
    changes = []
    precision = precision_of(eqn.params)
    for term in w.thin():
        z = given.astype(wider(x.dtype, term.a.dtype))
        h = lax.ragged_dot(z, term.a.astype(z.dtype), group_sizes, precision)
        b = term.b.astype(h.dtype)
        changes.append(lax.ragged_dot(h, b, group_sizes, precision))
    return finish(y, changes, None if w.o is None else w.o[expert])
