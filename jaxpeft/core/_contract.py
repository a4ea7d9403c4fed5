"""Where a kernel meets its input: ``y = ((x c) W + phi((x c) a) b) o``.

Every rule here computes the model's own contraction with the base, as the model
wrote it, and adds two thin ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.core import _compat
from jaxpeft.core._bound import Bound, NoRule, along, swapped
from jaxpeft.core._node import BATCH, IN, OUT, wider
from jaxpeft.core._rows import check_rows, looked_up_changes, row_changes
from jaxpeft.core._thin import (
    Read,
    joins_axes,
    labelled_dot,
    oriented,
    precision_of,
    read,
    shown,
)

# A remat policy that keeps this name spares recomputing outputs that are scaled.
UNSCALED = "jaxpeft_unscaled"


@dataclasses.dataclass
class Uses:
    """What one call of an adapted function gathers at its sites.

    Attributes:
        tap: the user's function, ``"own"`` for each method's, or ``None``.
        target: the platform that the program is for.
        numbers: the uses of each site, by the equations that lead to them; shared by
            all bodies of one trace, so that tracing a body twice changes nothing.
        tapped: ``(path, statistics)`` in order.
        trail: the equations that lead here, outermost first.
    """

    tap: Callable[..., Any] | str | None
    target: str
    numbers: dict[str, dict[tuple[int, ...], int]]
    tapped: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    trail: tuple[Any, ...] = ()

    def at(self, eqn) -> "Uses":
        """The same gathering, one equation further in."""
        return dataclasses.replace(self, trail=(*self.trail, eqn))

    def child(self) -> "Uses":
        """For the body of a loop or branch, whose statistics come out on their own."""
        return dataclasses.replace(self, tapped=[])

    def tap_of(self, w: Bound) -> Callable[..., Any] | None:
        """The function that is evaluated at this kernel, if one is."""
        tap = w.observe if self.tap == "own" else self.tap
        return None if w.leaves is None else tap

    def record(self, path: str, statistics: Any) -> None:
        """Keeps what the tap gave at a site, if it gave anything."""
        if jax.tree.leaves(statistics):
            self.tapped.append((path, statistics))

    def number(self, path: str) -> int:
        """Which use of the site this is, in the order of the program."""
        seen = self.numbers.setdefault(path, {})
        return seen.setdefault(tuple(map(id, self.trail)), len(seen))


def spread_along(x, labels, out_labels):
    """Transposes and reshapes ``x`` so that it broadcasts along ``out_labels``."""
    order = sorted(range(len(labels)), key=lambda i: out_labels.index(labels[i]))
    x = x.transpose(order)
    sizes = {labels[i]: x.shape[k] for k, i in enumerate(order)}
    return x.reshape(tuple(sizes.get(l, 1) for l in out_labels))


def times(x, scale):
    """Multiplies in the wider dtype, returns ``x``'s own."""
    wide = wider(x.dtype, scale.dtype)
    shape = jnp.broadcast_shapes(x.shape, scale.shape)
    scale = jnp.broadcast_to(scale.astype(wide), shape)
    return (jnp.broadcast_to(x, shape).astype(wide) * scale).astype(x.dtype)


def dropped(x, w: Bound, uses: Uses):
    """Inverted dropout on the low-rank path's input; the identity without a key."""
    if w.key is None or not w.dropout:
        return x
    key = jax.random.fold_in(w.key.reshape(-1)[0], uses.number(w.path))
    for name in sorted(_compat.varying_axes(x)):  # each shard draws its own
        key = jax.random.fold_in(key, lax.axis_index(name))
    keep = jax.random.bernoulli(key, 1 - w.dropout, x.shape)
    scaled = x * jnp.asarray(1 / (1 - w.dropout), x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(x))


def dot_general(
    w: Bound,
    x,
    params: dict,
    kernel_first: bool,
    uses: Uses,
    run,
    known: Read | None = None,
):
    """A ``dot_general`` of a kernel with an input.

    Args:
        w: the kernel.
        x: the other operand.
        params: the equation's parameters.
        kernel_first: whether the kernel is the left operand.
        uses: what the call gathers.
        run: ``run(x, base)`` issues the model's own contraction.
        known: what the adapter reads of the input, where that is known already.
    """
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    sides = (left, left_batch), (right, right_batch)
    (w_sum, w_batch), (x_sum, x_batch) = sides if kernel_first else sides[::-1]
    w = oriented(w, w_sum, w_batch)
    n = w.base.ndim
    w_labels = [("w", i) for i in range(n)]
    x_labels: list[tuple[str, int]] = [("x", i) for i in range(x.ndim)]
    for i, j in zip((*x_sum, *x_batch), (*w_sum, *w_batch), strict=True):
        x_labels[i] = w_labels[j]
    shared = [w_labels[i] for i in w_batch]
    x_free = [l for l in x_labels if l[0] == "x"]
    w_free = [w_labels[i] for i in range(n) if i not in (*w_sum, *w_batch)]
    out = shared + (w_free + x_free if kernel_first else x_free + w_free)

    ins, outs, batch = (
        [w_labels[i] for i, r in enumerate(w.roles) if r == role]
        for role in (IN, OUT, BATCH)
    )
    precision, given = precision_of(params), (x, x_labels)
    product = functools.partial(labelled_dot, joined=joins_axes(uses.target))
    if w.c is not None:
        # An expert axis that the input lacks must be spelled out to scale the input.
        spelled = [l for l in batch if l not in x_labels] + x_labels
        x = x.reshape((1,) * (len(spelled) - x.ndim) + x.shape)
        x = times(x, spread_along(w.c, batch + ins, spelled))
        if spelled == x_labels:
            y = run(x, w.base)
        else:
            y = labelled_dot(x, spelled, w.base, w_labels, out, precision)
            y = y.astype(params["preferred_element_type"] or y.dtype)
        x_labels = spelled
    else:
        y = run(x, w.base)

    x = shown(w, x, x_labels)
    rank = [("r", 0)]
    h_labels = batch + x_free + rank

    def thin(columns, how, x=x):
        labels = batch + ins + rank
        return product(x, x_labels, columns, labels, h_labels, how)

    if known is None:
        known = read([w], thin, precision, uses.target)[0]
    h, routed = known
    record(uses, w, *given, batch, ins, routed)
    delta = None
    if w.a is not None:
        if h is None:
            h = thin(w.a, precision, dropped(x, w, uses))
        if w.phi is not None:
            h = gated(w.phi, *_seen(x, x_labels, batch, ins, routed), h)
        delta = product(h, h_labels, w.b, batch + rank + outs, out, precision)
    if w.fixed is not None:
        a, b = w.fixed
        h = product(x, x_labels, a, batch + ins + rank, h_labels, precision)
        more = product(h, h_labels, b, batch + rank + outs, out, precision)
        delta = more if delta is None else delta + more
    y = finish(y, delta, w.o, lambda o: spread_along(o, batch + outs, out))
    if w.rows is not None:
        y = _each_row(w, x, x_labels, y, out, precision)
    return y


def _each_row(w: Bound, x, x_labels, y, out, precision):
    """Adds to each row of the input, along its first axis, what that row chose."""
    ins, outs, batch = (
        [("w", i) for i, r in enumerate(w.roles) if r == role]
        for role in (IN, OUT, BATCH)
    )
    rest = [l for l in x_labels if l not in batch and l not in ins]
    if math.prod(w.dims(BATCH)) != 1 or rest[:1] != [("x", 0)]:
        raise NoRule(
            "rows of its input choose an adapter, but here the input's first axis is "
            "no row, or the kernel is a stack"
        )
    count, rank = w.rows.scale.shape[-1], w.rows.a.shape[-1]
    factors = dataclasses.replace(
        w.rows,
        a=w.rows.a.reshape(count, -1, rank),
        b=w.rows.b.reshape(count, rank, -1),
        scale=w.rows.scale.reshape(count),
        index=w.rows.index.reshape(-1),
    )
    check_rows(factors, x.shape, w.path)
    rows = x.shape[0]
    tokens = math.prod(x.shape[i] for _, i in rest[1:])
    flat = _rows(x, x_labels, batch, ins)[0]
    flat = flat.reshape(rows, tokens, math.prod(w.dims(IN)))
    delta = row_changes(factors, flat, precision)
    labels = batch + rest + outs
    delta = delta.reshape(
        [1] * len(batch) + [x.shape[i] for _, i in rest] + list(w.dims(OUT))
    )
    delta = delta.transpose([labels.index(l) for l in out])
    chosen = (factors.index != 0).reshape([-1 if l == ("x", 0) else 1 for l in out])
    return jnp.where(chosen, finish(y, delta, None, None), y)


def finish(y, delta, o, spread):
    """Adds the low-rank part and scales, wide; rounds once to ``y``'s dtype."""
    if delta is None and o is None:
        return y
    dtype = y.dtype
    if delta is not None:
        wide = wider(dtype, delta.dtype)
        y = y.astype(wide) + delta.astype(wide)
    if o is not None:
        y = checkpoint_name(y, UNSCALED)
        y = times(y, spread(o))
    return y.astype(dtype)


def _rows(x, labels, batch, ins):
    """``x`` as ``[*shared batch, rest..., d_in]``, and which batch axes it has."""
    shared = [l for l in batch if l in labels]
    rest = [l for l in labels if l not in batch and l not in ins]
    x = x.transpose([labels.index(l) for l in shared + rest + ins])
    flat = x.shape[: len(shared) + len(rest)]
    width = math.prod(x.shape[len(flat) :])
    return x.reshape(*flat, width), [l in labels for l in batch]


def _seen(x, x_labels, batch, ins, routed):
    """``_rows`` of what phi reads: of the input, or of ``x router`` in its place."""
    if routed is None:
        return _rows(x, x_labels, batch, ins)
    return routed, [True] * len(batch)


def gated(phi, rows, present, h):
    """Applies phi to ``(x, h)`` for each batch entry; see ``_rows``."""
    apply = lambda p, x, h: p(x, h)
    for here in reversed(present):
        apply = jax.vmap(apply, in_axes=(0, 0 if here else None, 0))
    return apply(phi, rows, h)


def record(uses: Uses, w: Bound, x, x_labels, batch, ins, routed):
    """Keeps the tap's statistics of ``(x, leaves)`` for each batch entry, if any."""
    tap = uses.tap_of(w)
    if tap is None:
        return
    own = routed if uses.tap == "own" else None
    rows, present = _seen(x, x_labels, batch, ins, own)
    apply = lambda x, leaves: tap(x, *leaves)
    for here, size in reversed(list(zip(present, w.dims(BATCH), strict=True))):
        in_axes = (0 if here else None, 0)
        apply = jax.vmap(apply, in_axes=in_axes, axis_size=size)
    uses.record(w.path, apply(rows, w.leaves))


def look_up(
    w: Bound,
    axis: int,
    take: Callable[[Any, int], Any],
    index_ndim: int,
    uses: Uses,
):
    """Rows of an embedding table: rows of the base and of ``a``.

    Args:
        w: the table.
        axis: the axis that is indexed.
        take: ``take(array, position)`` gathers along one axis of an array and puts
            the index axes first.
        index_ndim: the number of index axes.
        uses: what the call gathers.

    Returns:
        ``[*index, *rest]``.
    """
    if w.roles[axis] == OUT:
        w = swapped(w)
    if w.roles[axis] != IN or w.roles.count(IN) != 1 or w.dims(BATCH):
        raise NoRule(
            f"rows are looked up along axis {axis}, but its roles are "
            f"{' '.join(w.roles)!r}: a table is 'in out'"
        )
    if w.phi is not None:
        raise NoRule("its method depends on the input, and a look-up has none")
    if w.rows is not None and not index_ndim:
        raise NoRule("rows choose an adapter, and here one id is looked up alone")
    rows = along(w, axis, lambda x, position: take(x, position))
    y, delta = rows.base, None
    out = y.ndim - index_ndim
    if rows.c is not None:
        c = rows.c.reshape(rows.c.shape + (1,) * out)
        y = times(y, c)
    for pair in ((rows.a, rows.b), rows.fixed or (None, None)):
        if pair[0] is None:
            continue
        a, b = pair
        if rows.c is not None:
            a = times(a, rows.c[..., None])
        index = [("x", i) for i in range(index_ndim)]
        rest = [("w", i) for i in range(1, b.ndim)]
        more = labelled_dot(
            *(a, [*index, ("r", 0)], b, [("r", 0), *rest], index + rest),
            joined=joins_axes(uses.target),
        )
        delta = more if delta is None else delta + more
    if rows.rows is not None:  # slots: nothing else is beside the table
        check_rows(rows.rows, y.shape, w.path)
        chosen = (rows.rows.index != 0).reshape(-1, *(1,) * (y.ndim - 1))
        delta = looked_up_changes(rows.rows, index_ndim)
        return jnp.where(chosen, finish(y, delta, None, None), y)
    return finish(y, delta, rows.o, lambda o: o.reshape((1,) * index_ndim + o.shape))


def ragged_dot(w: Bound, x, group_sizes, params, run):
    """``lax.ragged_dot`` over experts: ``x [m, k]``, kernel ``[g, k, n]``."""
    numbers = params["ragged_dot_dimension_numbers"]
    contract = tuple(map(tuple, numbers.dot_dimension_numbers[0]))
    if (
        contract != ((1,), (1,))
        or any(numbers.dot_dimension_numbers[1])
        or tuple(numbers.rhs_group_dimensions) != (0,)
        or w.roles != (BATCH, IN, OUT)
    ):
        raise NoRule(
            f"ragged_dot needs a kernel 'expert in out' and its plain form; roles are "
            f"{' '.join(w.roles)!r}"
        )
    if w.reads_input or w.key is not None or w.leaves is not None:
        raise NoRule("phi, rows, dropout and taps have no form in a ragged_dot")
    rows = x.shape[0]
    expert = jnp.repeat(
        jnp.arange(w.base.shape[0]), group_sizes, total_repeat_length=rows
    )
    if w.c is not None:
        x = times(x, w.c[expert])
    y, delta, precision = run(x, w.base, group_sizes), None, precision_of(params)
    for a, b in ((w.a, w.b), w.fixed or (None, None)):
        if a is not None:
            z = x.astype(wider(x.dtype, a.dtype))
            h = lax.ragged_dot(z, a.astype(z.dtype), group_sizes, precision)
            more = lax.ragged_dot(h, b.astype(h.dtype), group_sizes, precision)
            delta = more if delta is None else delta + more
    return finish(y, delta, w.o, lambda o: o[expert])
