"""Equations that move a kernel about without using it."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.numerics import dense, is_quantised
from jaxpeft.transform import _compat
from jaxpeft.transform._base import carried, placed
from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import Equation, only_kernel, rule
from jaxpeft.transform.rules._contraction import look_up


def _ints(numbers) -> tuple[int, ...]:
    """Parameters without NumPy's scalars, which ``vmap`` leaves in some."""
    return tuple(map(int, numbers))


@rule("copy", "copy_p", "name", "stop_gradient", moves=True)
def _carried(eqn: Equation, w: Kernel, *others) -> Kernel:
    """What leaves every number of the base as it is."""
    return w.on_base(lambda base: carried(base, lambda x: eqn.run(x, *others)))


@rule("device_put", "reshard", "sharding_constraint", moves=True)
def _placed(eqn: Equation, w: Kernel) -> Kernel:
    return w.on_base(lambda base: placed(base, eqn.run))


@rule("convert_element_type", moves=True)
def _convert(eqn: Equation, w: Kernel) -> Kernel:
    new = eqn.params["new_dtype"]
    stays = is_quantised(w.base) and jnp.issubdtype(new, jnp.floating)
    return w.on_base(lambda base: base.astype(new) if stays else eqn.run(dense(base)))


@rule("reduce_precision", moves=True)
def _reduce_precision(eqn: Equation, w: Kernel) -> Kernel:
    return w.on_base(lambda base: eqn.run(dense(base)))


@rule("pvary", "pcast", moves=True)
def _varying(eqn: Equation, w: Kernel) -> Any:
    """A kernel's arrays all differ along an axis of the mesh from here on.

    So their gradients are added up over it here, and not at each use in a loop.
    """
    before, after = (
        _compat.varying_axes(of[0].aval) for of in (eqn.raw.invars, eqn.raw.outvars)
    )
    grown = w.mapped(lambda x, _: _compat.as_varying(x, after - before))
    # In jax 0.7 this primitive has a list of results, of one.
    alone = lambda x: _compat.only(eqn.run(x))
    moved = grown.on_base(lambda base: carried(base, alone))
    return [moved] if eqn.raw.primitive.multiple_results else moved


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
def _dynamic_slice(eqn: Equation, w: Any, *starts) -> Kernel:
    if only_kernel((w, *starts)) != 0:
        raise NoRule("it says where a slice begins")
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
    """A kernel times or over a number, or an array along out, batch or in axes."""
    at = only_kernel((left, right))
    w, factor = (left, right) if at == 0 else (right, left)
    divides = eqn.raw.primitive.name == "div"
    if at and divides:
        raise NoRule("something is divided by it")
    apply = lambda x, factor: x / factor if divides else x * factor
    if jnp.size(factor) == 1:
        factor = jnp.reshape(factor, (1,) * w.base.ndim).astype(w.base.dtype)
    elif eqn.raw.outvars[0].aval.shape != w.base.shape:
        raise NoRule("it is multiplied by an array with more entries")
    return w.scaled(factor, apply)


@rule("neg", moves=True)
def _negate(eqn: Equation, w: Kernel) -> Kernel:
    return w.scaled(jnp.ones((1,) * w.base.ndim), lambda x, _: -x)


@rule("concatenate")
def _concatenate(eqn: Equation, *parts) -> Kernel:
    """Kernels side by side, as in recurrent cells and fused projections."""
    axis, starts, kernels, at = eqn.params["dimension"], [], [], 0
    bases = [dense(x.base) if isinstance(x, Kernel) else x for x in parts]
    for x, base in zip(parts, bases, strict=True):
        if isinstance(x, Kernel):
            kernels.append(x)
            starts.append(at)
        at += base.shape[axis]
    return kernels[0].beside(kernels[1:], starts, axis, eqn.run(*bases))


@rule("gather")
def _gather(eqn: Equation, w: Any, indices) -> Any:
    """Whole slices along one axis: rows of a table, or kernels out of a stack.

    What ``vmap`` makes of an index, in any nesting, is one too: its slices keep the
    axis with size one, there are indices for axes that are taken whole, and the
    kernel's first axes may be mapped together with axes of the indices.
    """
    if only_kernel((w, indices)) != 0:
        raise NoRule("it says which slices are taken")
    params, shape = eqn.params, w.base.shape
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    indexed, mapped = numbers.start_index_map, numbers.operand_batching_dims
    cut = [i for i, n in enumerate(shape) if sizes[i] != n and i not in mapped]
    axis = int((cut or indexed)[0])
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if (
        axis not in indexed
        or sizes[axis] != 1
        or len(cut) > 1
        or (fills and len(indexed) > 1)  # else the index of a whole axis can only be 0
        or tuple(mapped) != tuple(range(len(mapped)))
    ):
        raise NoRule("the gather takes more than whole slices along one axis")
    column = list(indexed).index(axis)
    ids, index_ndim = indices[..., column : column + 1], indices.ndim - 1
    paired = _ints(numbers.start_indices_batching_dims)
    fill = params["fill_value"]
    if fill is None:
        fill = np.nan if jnp.issubdtype(w.base.dtype, jnp.floating) else 0

    def take(x, position):
        """Gathers along one axis of any array, with the index axes in front."""
        ones = (*range(len(mapped)), position)
        return eqn.run(
            x,
            ids,
            dimension_numbers=lax.GatherDimensionNumbers(
                offset_dims=tuple(range(index_ndim, index_ndim + x.ndim - len(ones))),
                collapsed_slice_dims=(position,),
                start_index_map=(position,),
                operand_batching_dims=ones[:-1],
                start_indices_batching_dims=paired,
            ),
            slice_sizes=tuple(1 if i in ones else n for i, n in enumerate(x.shape)),
            mode=lax.GatherScatterMode.CLIP if fills else params["mode"],
            unique_indices=params["unique_indices"] and len(indexed) == 1,
        )

    def filled(x):
        """Fills in for what is out of bounds, once the adapter is at work."""
        inside = (ids >= 0) & (ids < shape[axis])
        inside = inside.reshape(inside.shape[:-1] + (1,) * (x.ndim - index_ndim))
        return jnp.where(inside, x, jnp.asarray(fill, x.dtype)) if fills else x

    def laid_out(x):
        """From index axes first to the gather's own layout, with axes of size one."""
        sizes, offset = eqn.raw.outvars[0].aval.shape, _ints(numbers.offset_dims)
        places = [*(i for i in range(len(sizes)) if i not in offset), *offset]
        x = x.reshape([sizes[i] for i in places])
        return x.transpose([places.index(i) for i in range(len(sizes))])

    if w.is_table(axis, _ints(mapped)):
        return laid_out(filled(look_up(eqn, w, axis, take, index_ndim, paired)))
    if fills and not np.isnan(fill):
        raise NoRule(f"{fill} is filled in for kernels that are not in the stack")
    kept = (r for i, r in enumerate(w.roles) if i != axis and i not in mapped)
    names = (*(w.grown() for _ in range(index_ndim)), *kept)
    w = w.along(axis, take).replace(names=names)
    # Codes that were out of bounds are those of another row: the scale makes them NaN.
    fill_in = lambda base: base.replace(scale=filled(base.scale))
    base = fill_in(w.base) if is_quantised(w.base) else filled(w.base)
    return laid_out(w.replace(base=base))
