"""Equations that move a kernel about without using it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.transform import _moved
from jaxpeft.transform._moved import NoRule
from jaxpeft.tree import BATCH, Bound

# Equations that change the base alone: rule(base, *others) is the equation itself.
ON_BASE = (
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "name",
    "pvary",
    "pcast",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)


def transpose(w: Bound, params: dict) -> Bound:
    return _moved.transpose(w, tuple(params["permutation"]))


def reshape(w: Bound, params: dict) -> Bound:
    if params.get("dimensions") is not None:
        w = _moved.transpose(w, tuple(params["dimensions"]))
    return _moved.reshape(w, tuple(params["new_sizes"]))


def squeeze(w: Bound, params: dict) -> Bound:
    gone = params["dimensions"]
    return _moved.reshape(
        w, tuple(n for i, n in enumerate(w.base.shape) if i not in gone)
    )


def expand_dims(w: Bound, params: dict) -> Bound:
    shape = list(w.base.shape)
    for axis in sorted(params["dimensions"]):
        shape.insert(axis, 1)
    return _moved.reshape(w, tuple(shape))


def broadcast_in_dim(w: Bound, params: dict) -> Bound:
    where = tuple(params["broadcast_dimensions"])
    return _moved.broadcast(w, tuple(params["shape"]), where)


def slice_(w: Bound, params: dict) -> Bound:
    strides = params["strides"] or (1,) * w.base.ndim
    limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, limit, stride) in enumerate(limits):
        if (start, limit, stride) != (0, w.base.shape[axis], 1):
            w = _moved.along(
                w,
                axis,
                lambda x, i, at=(start, limit, stride): lax.slice_in_dim(
                    x, at[0], at[1], at[2], axis=i
                ),
            )
    return w


def dynamic_slice(w: Bound, starts: tuple, params: dict) -> Bound:
    for axis, (start, size) in enumerate(
        zip(starts, params["slice_sizes"], strict=True)
    ):
        if size != w.base.shape[axis]:
            w = _moved.along(
                w,
                axis,
                lambda x, i, start=start, size=size: lax.dynamic_slice_in_dim(
                    x, start, size, axis=i
                ),
            )
    return w


def split(w: Bound, params: dict) -> list[Bound]:
    parts, at = [], 0
    for size in params["sizes"]:
        parts.append(
            _moved.along(
                w,
                params["axis"],
                lambda x, i, at=at, size=size: lax.slice_in_dim(
                    x, at, at + size, axis=i
                ),
            )
        )
        at += int(size)
    return parts


def is_scalar(x: Any) -> bool:
    """Whether an operand scales a whole kernel by one number."""
    return np.size(x) == 1 if isinstance(x, np.generic | float | int) else x.size == 1


def times(w: Bound, factor: Any, divide: bool) -> Bound:
    """``w * factor`` or ``w / factor`` for one number."""
    if not is_scalar(factor):
        raise NoRule("it is multiplied by an array; only a number scales a kernel")
    number = jnp.reshape(factor, ())

    def apply(x):
        value = number.astype(x.dtype)
        return x / value if divide else x * value

    return _moved.scaled(w, apply)


def negate(w: Bound) -> Bound:
    return _moved.scaled(w, lambda x: -x)


def gathered(w: Bound, indices, params: dict, eqn_gather):
    """Splits a gather along one axis into what it means for a kernel.

    Returns:
        ``(axis, take, index_ndim)``: the axis that is indexed, a function that
        gathers along one axis of any array with the index axes in front, and their
        number.
    """
    numbers = params["dimension_numbers"]
    axes = tuple(numbers.start_index_map)
    whole = all(
        size == n
        for i, (size, n) in enumerate(
            zip(params["slice_sizes"], w.base.shape, strict=True)
        )
        if i not in axes
    )
    if (
        len(axes) != 1
        or tuple(numbers.collapsed_slice_dims) != axes
        or tuple(numbers.operand_batching_dims)
        or not whole
    ):
        raise NoRule("the gather takes more than whole slices along one axis")
    index_ndim = indices.ndim - 1

    def take(x, position):
        rest = x.ndim - 1
        sizes = tuple(1 if i == position else n for i, n in enumerate(x.shape))
        return eqn_gather(
            x,
            indices,
            dimension_numbers=lax.GatherDimensionNumbers(
                offset_dims=tuple(range(index_ndim, index_ndim + rest)),
                collapsed_slice_dims=(position,),
                start_index_map=(position,),
            ),
            slice_sizes=sizes,
        )

    return axes[0], take, index_ndim


def gather_order(params: dict, ndim: int) -> tuple[int, ...]:
    """The permutation from index-axes-first to the gather's own layout."""
    offset = tuple(params["dimension_numbers"].offset_dims)
    index = [i for i in range(ndim) if i not in offset]
    places = [*index, *offset]
    return tuple(places.index(i) for i in range(ndim))


def gather_batch(w: Bound, axis: int, take, index_ndim: int) -> Bound:
    """Whole slices along a batch axis (``w[layers]``): a kernel again."""
    if axis != 0:
        order = (axis, *(i for i in range(w.base.ndim) if i != axis))
        w = _moved.transpose(w, order)
    names = (BATCH,) * index_ndim + w.roles[1:]
    return _moved.along(w, 0, take).replace(names=names)


def rev(w: Bound, params: dict) -> Bound:
    """A kernel read backwards, as some transposed convolutions do."""
    for axis in params["dimensions"]:
        w = _moved.along(w, axis, lambda x, i: lax.rev(x, (i,)))
    return w


RELABEL = {
    "transpose": transpose,
    "reshape": reshape,
    "rev": rev,
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
}
