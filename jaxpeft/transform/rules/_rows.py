"""Many low-rank pairs beside one kernel, a different one for each row of a batch.

What each row adds is computed in one of two ways (``Rows.how``): "gather" takes each
row's pair out of the slots, "ragged" sorts the rows by slot and gives every pair the
rows that are its own. A third, "taken", is "gather" whose pairs were taken out
beforehand.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.tree import Rows, wider


def check_rows(index: jax.Array, shape: tuple[int, ...], path: str) -> None:
    """Raises unless there is one choice for each row of an input."""
    said = index.shape[0]
    if said == shape[0]:
        return
    if not said:
        raise ValueError(
            f"site {path!r} has slots, and nothing says which of them each row takes; "
            "write serving.with_rows(slots.tree, serving.rows(slots, names))"
        )
    raise ValueError(
        f"`index` says which adapter {said} rows take, but the input of site {path!r} "
        f"has shape {list(shape)}: its first axis must be those rows. Give one index "
        "for each row of the batch."
    )


def row_changes(a, b, rows: Rows, x, precision):
    """What each row's pair adds.

    Args:
        a: ``[slots, d_in, r]``.
        b: ``[slots, r, d_out]``.
        rows: which of these pairs each row takes.
        x: ``[rows, tokens, d_in]``.
        precision: of the contractions.

    Returns:
        ``[rows, tokens, d_out]``, float32 or wider. Rows of slot 0 hold anything; rows
        whose index is no slot are NaN.
    """
    how, scale, index = rows.how, rows.scale, rows.index
    if how != "taken":
        index, scale = in_slots(scale, index)
    if how == "gather":
        a, b = (jnp.take(pairs, index, 0, mode="clip") for pairs in (a, b))
    scale = scale.reshape(-1, 1, 1)
    if how == "ragged":
        return _ragged(a, b, scale, index, x, precision)
    h = _each(x, a, precision)
    return _each(h * scale.astype(h.dtype), b, precision)


def looked_up_changes(a, b, chosen: Rows, index_ndim: int):
    """What each row's pair adds to the rows of a table that are looked up.

    Args:
        a: ``[*index, slots, r]``, as looked up in every slot.
        b: ``[slots, r, *out]``.
        chosen: which of the slots each row takes.
        index_ndim: the number of index axes; the first one are the rows.

    Returns:
        ``[*index, *out]``, float32 or wider. Rows of slot 0 hold anything; rows whose
        index is no slot are NaN.
    """
    scale, slot = chosen.scale, chosen.index
    rows, index, out = len(slot), a.shape[:index_ndim], b.shape[2:]
    if chosen.how == "taken":  # a slot is a row's own
        slot = jnp.arange(rows)
    else:
        slot, scale = in_slots(scale, slot)
        b = jnp.take(b, slot, 0)
    own = slot.reshape(rows, *(1,) * (index_ndim + 1))
    h = jnp.take_along_axis(a, own, index_ndim).reshape(rows, -1, a.shape[-1])
    h = h * scale.reshape(-1, 1, 1).astype(h.dtype)
    delta = _each(h, b.reshape(rows, b.shape[1], -1), None)
    return delta.reshape(*index, *out)


def in_slots(scale, index):
    """``index`` within the slots, and each row's scale: NaN where it was not."""
    inside = jnp.clip(index, 0, scale.shape[0] - 1)
    return inside, jnp.where(inside == index, scale[inside], jnp.nan)


def _each(x, w, precision):
    """``x [rows, tokens, n]`` times ``w [rows, n, m]``, row by row."""
    return lax.dot_general(
        x,
        w,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=wider(x.dtype, w.dtype, jnp.float32),
    )


def _ragged(a, b, scale, index, x, precision):
    (rows, tokens, d_in), rank = x.shape, a.shape[-1]
    wide = wider(x.dtype, a.dtype, jnp.float32)
    order = jnp.argsort(index, stable=True)
    sizes = jnp.bincount(index, length=a.shape[0]).astype(jnp.int32) * tokens
    z = x[order].reshape(rows * tokens, d_in).astype(wide)
    h = lax.ragged_dot(z, a.astype(wide), sizes, precision)
    h = h.reshape(rows, tokens, rank) * scale[order].astype(wide)
    h = h.reshape(rows * tokens, rank)
    y = lax.ragged_dot(h, b.astype(wide), sizes, precision)
    back = jnp.argsort(order)
    return y.reshape(rows, tokens, b.shape[-1])[back]
