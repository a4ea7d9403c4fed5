"""How adapters begin where a kernel lies on a mesh: each layer on a device of its own.

The partitioner has no rule for a singular value decomposition: it would hold whole
stacks on every device, and decompose each layer on all of them. Here as many layers
at a time as there are devices are put together, one on each, decomposed there, and
what is made of them, which is thin, is given to all.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.numerics import is_quantised
from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._lift import axes_of, leaf_axes, to_matrices
from jaxpeft.tree._node import working_dtype
from jaxpeft.tree._places import on_mesh, replicated
from jaxpeft.tree._terms import BATCH, IN, OUT


def mesh_to_spread(kernel: Any, adapter: Adapter, roles, rank) -> NamedSharding | None:
    """How a kernel lies whose layers can be shared out; None where they cannot."""
    # A quantised kernel is dequantised a layer at a time, where it lies.
    where = None if is_quantised(kernel) else on_mesh(kernel)
    if where is None or where.mesh.size == 1:
        return None
    if any(kind != AxisType.Auto for kind in where.mesh.axis_types):
        return None
    if any(_entry(where, axis) for axis in axes_of(roles, BATCH)):
        return None
    # A leaf as large as the kernel stays where that lies.
    axes = leaf_axes(adapter, rank)
    if any({IN, OUT} <= set(each) for part in axes for each in part.values()):
        return None
    return where


def _entry(where: NamedSharding, axis: int) -> tuple[str, ...]:
    """The axes of the mesh that cut an axis of the kernel."""
    entry = where.spec[axis] if axis < len(where.spec) else None
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def spread_layers(keys, kernel, alphas, layers: tuple, *, where, **static) -> Any:
    """``init`` of some layers of one method and rank, at most one a device.

    Args:
        keys: one for each layer of the stack.
        kernel: the stack, or a kernel without layers.
        alphas: of each layer, or ``None``.
        layers: which of them.
        where: of ``mesh_to_spread``.
        **static: ``adapter``, ``start``, ``roles`` and ``rank``.

    Returns:
        ``(frozen, trainable)``, every leaf with an axis for these layers in front,
        followed by others where there are more devices than layers.
    """
    more = layers[-1:] * (where.mesh.size - len(layers))
    index = np.asarray(layers + more, np.int32)
    own = None if alphas is None else alphas[index]
    made = _spread(kernel, keys[index], index, own, where=where, **static)
    # Apart from that program, and when all are done: on CPUs who waits for another one
    # in a collective for as long as a large decomposition takes ends the process.
    return jax.device_put(jax.block_until_ready(made), replicated(where))


@functools.partial(
    jax.jit, static_argnames=("adapter", "start", "roles", "rank", "where")
)
def _spread(
    kernel, keys, index, alphas, *, adapter: Adapter, start, roles, rank, where
):
    del start  # adapters that begin differently may be equal: it tells them apart
    batch = axes_of(roles, BATCH)
    rest = tuple(i for i in range(kernel.ndim) if i not in batch)
    cuts = [_entry(where, axis) for axis in rest]
    cutting = [name for entry in cuts for name in reversed(entry)]
    names = [name for name in where.mesh.axis_names if name not in cutting] + cutting
    pieces = math.prod(where.mesh.shape[name] for name in cutting)

    def local(kernel, keys, index, alphas):
        mine = 0
        for name in names:
            mine = mine * where.mesh.shape[name] + lax.axis_index(name)
        # Of the layers that are given to those who share this device's piece, all.
        ours = lax.dynamic_slice_in_dim(index, mine // pieces * pieces, pieces)
        x = kernel.transpose(batch + rest)
        x = x.reshape(-1, *x.shape[len(batch) :])[ours]
        for axis, entry in enumerate(cuts, 1):
            for name in reversed(entry):
                x = lax.all_to_all(x, name, split_axis=0, concat_axis=axis, tiled=True)
        matrix = to_matrices(x, (BATCH, *(roles[i] for i in rest)))[0]
        alpha = None if alphas is None else alphas[mine]
        matrix = matrix.astype(working_dtype(kernel.dtype))
        made = adapter.init(keys[mine], matrix, rank, alpha)
        return jax.tree.map(lambda y: y[None], made)

    whole = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=where.mesh,
        in_specs=(where.spec, whole, whole, whole),
        out_specs=PartitionSpec(tuple(names)),
        check_vma=False,  # branches and callbacks of a method know of no mesh
    )(kernel, keys, index, alphas)
