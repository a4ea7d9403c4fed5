"""Equations that move a kernel about without using it."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import Equation, only_kernel, rule
from jaxpeft.transform.rules._contraction import look_up


def _ints(numbers) -> tuple[int, ...]:
    """Parameters without NumPy's scalars, which ``vmap`` leaves in some."""
    return tuple(map(int, numbers))


@rule(
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
    moves=True,
)
def _on_base(eqn: Equation, w: Kernel, *others) -> Kernel:
    """What changes the base alone."""
    return w.on_base(lambda base: eqn.run(base, *others))


@rule("optimization_barrier")
def _barrier(eqn: Equation, *vals) -> list:
    bases = [x.base if isinstance(x, Kernel) else x for x in vals]
    outs = lax.optimization_barrier(bases)
    return [
        x.replace(base=y) if isinstance(x, Kernel) else y
        for x, y in zip(vals, outs, strict=True)
    ]


@rule("transpose", moves=True)
def _transpose(eqn: Equation, w: Kernel) -> Kernel:
    return w.transpose(_ints(eqn.params["permutation"]))


@rule("reshape", moves=True)
def _reshape(eqn: Equation, w: Kernel, *sizes) -> Kernel:
    if eqn.params.get("dimensions") is not None:
        w = w.transpose(_ints(eqn.params["dimensions"]))
    return w.reshape(_ints(eqn.params["new_sizes"]))


@rule("squeeze", moves=True)
def _squeeze(eqn: Equation, w: Kernel) -> Kernel:
    return w.squeeze(_ints(eqn.params["dimensions"]))


@rule("expand_dims", moves=True)
def _expand_dims(eqn: Equation, w: Kernel) -> Kernel:
    shape = list(w.base.shape)
    for axis in sorted(eqn.params["dimensions"]):
        shape.insert(axis, 1)
    return w.reshape(shape)


@rule("broadcast_in_dim", moves=True)
def _broadcast_in_dim(eqn: Equation, w: Kernel, *sizes) -> Kernel:
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return w.broadcast(_ints(shape), _ints(where))


@rule("rev", moves=True)
def _rev(eqn: Equation, w: Kernel) -> Kernel:
    """A kernel read backwards, as some transposed convolutions do."""
    for axis in eqn.params["dimensions"]:
        w = w.along(axis, lambda x, i: lax.rev(x, (i,)))
    return w


@rule("slice", moves=True)
def _slice(eqn: Equation, w: Kernel) -> Kernel:
    params = eqn.params
    strides = params["strides"] or (1,) * w.base.ndim
    limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, limit in enumerate(limits):
        if limit != (0, w.base.shape[axis], 1):
            cut = lambda x, i, limit=limit: lax.slice_in_dim(x, *limit, axis=i)
            w = w.along(axis, cut)
    return w


@rule("dynamic_slice", moves=True)
def _dynamic_slice(eqn: Equation, w: Kernel, *starts) -> Kernel:
    sizes = eqn.params["slice_sizes"]
    for axis, at in enumerate(zip(starts, sizes, strict=True)):
        if at[1] != w.base.shape[axis]:
            cut = lambda x, i, at=at: lax.dynamic_slice_in_dim(x, *at, axis=i)
            w = w.along(axis, cut)
    return w


@rule("split", moves=True)
def _split(eqn: Equation, w: Kernel) -> list[Kernel]:
    ends = _ints(np.cumsum((0, *eqn.params["sizes"])))
    cut = lambda x, i, at: lax.slice_in_dim(x, *at, axis=i)
    return [
        w.along(eqn.params["axis"], functools.partial(cut, at=at))
        for at in itertools.pairwise(ends)
    ]


@rule("mul", "div", moves=True)
def _times(eqn: Equation, left: Any, right: Any) -> Kernel:
    """A kernel times or over one number."""
    at, divide = only_kernel((left, right)), eqn.raw.primitive.name == "div"
    w, factor = (left, right) if at == 0 else (right, left)
    if at and divide:
        raise NoRule("the kernel is used by something that is not a contraction")
    if jnp.size(factor) != 1:
        raise NoRule("it is multiplied by an array; only a number scales a kernel")
    number = jnp.reshape(factor, ())

    def apply(x):
        value = number.astype(x.dtype)
        return x / value if divide else x * value

    return w.scaled(apply)


@rule("neg", moves=True)
def _negate(eqn: Equation, w: Kernel) -> Kernel:
    return w.scaled(lambda x: -x)


@rule("gather")
def _gather(eqn: Equation, w: Kernel, indices) -> Any:
    """Whole slices along one axis: rows of a table, or kernels out of a stack."""
    numbers = eqn.params["dimension_numbers"]
    axes = tuple(numbers.start_index_map)
    whole = all(
        size == n
        for i, (size, n) in enumerate(
            zip(eqn.params["slice_sizes"], w.base.shape, strict=True)
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
    (axis,), index_ndim = axes, indices.ndim - 1

    def take(x, position):
        """Gathers along one axis of any array, with the index axes in front."""
        rest = x.ndim - 1
        return eqn.run(
            x,
            indices,
            dimension_numbers=lax.GatherDimensionNumbers(
                offset_dims=tuple(range(index_ndim, index_ndim + rest)),
                collapsed_slice_dims=(position,),
                start_index_map=(position,),
            ),
            slice_sizes=tuple(1 if i == position else n for i, n in enumerate(x.shape)),
        )

    # From index axes first to the gather's own layout.
    ndim = index_ndim + w.base.ndim - 1
    offset = tuple(numbers.offset_dims)
    places = [*(i for i in range(ndim) if i not in offset), *offset]
    order = [places.index(i) for i in range(ndim)]
    if not w.is_stacked(axis):
        return look_up(eqn, w, axis, take, index_ndim).transpose(order)
    w = w.transpose((axis, *(i for i in range(w.base.ndim) if i != axis)))
    names = (*(w.grown() for _ in range(index_ndim)), *w.roles[1:])
    return w.along(0, take).replace(names=names).transpose(order)
