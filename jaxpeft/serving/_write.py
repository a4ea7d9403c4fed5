"""From an adapter to slots: what fits, and the writing of it."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.interop import on_host
from jaxpeft.lowrank import is_plain, layer_products, not_low_rank
from jaxpeft.tree import (
    BATCH,
    IN,
    OUT,
    AdaptedKernel,
    dims_of,
    expand_leaf,
    module_path,
    rebuild,
    structure_of,
)

PAIR = ("a", "b", "scale")


def misfits(
    own: Mapping[str, AdaptedKernel], node: AdaptedKernel, paths: Collection[str]
) -> list[str]:
    """Why a site of an adapter cannot go into a slot of its kernel.

    Args:
        own: the kernels with slots, by path.
        node: the site.
        paths: of all leaves of the base with slots.
    """
    path = node.site.path
    if path not in paths:
        return [
            f"{path!r} is no leaf of the slots' base. If that ties its head to its "
            "embedding and the adapter is on one of the two, make slots over "
            "jaxpeft.interop.untie(params, names=model.names)"
        ]
    if path not in own:
        return [
            f"{path!r} has no slots; make them there too: serving.slots(params, "
            f"targets=[..., {module_path(path)!r}])"
        ]
    if wrong := not_low_rank(node):
        return [f"{wrong}. {_way_out(node)}"]
    slot = own[path]
    if (node.shape, node.roles) != (slot.shape, slot.roles):
        return [
            f"{path!r} has shape {tuple(node.shape)} and axes "
            f"{' '.join(node.roles)!r}; the slots' kernel has {tuple(slot.shape)} and "
            f"{' '.join(slot.roles)!r}"
        ]
    rank, most = change_rank(node), slot.frozen["a"].shape[-1]
    if rank > most:
        return [
            f"{path!r}: its change has rank {rank}, and the slots have room for "
            f"{most}; make them with serving.slots(..., rank={rank}), or convert the "
            f'adapter: jaxpeft.weighted([adapted], [1.0], "svd", rank={most}, '
            "into=jaxpeft.lora())"
        ]
    return []


def _way_out(node: AdaptedKernel) -> str:
    """What to do with a site whose change is no product of thin factors."""
    experts = structure_of(node).experts
    if not experts:
        return "Or serve this adapter alone: jaxpeft.merge(adapted)"
    last = (*(0.0,) * (len(experts) - 1), 1.0)
    try:
        alone = node.replace(adapter=rebuild(node.adapter, gates=last), call=None)
        folds = not not_low_rank(alone)
    except ValueError:  # numbers of experts that differ, or a folded universal expert
        folds = False
    if folds:
        return (
            "Under fixed gates it is one: serving.load(slots, name, "
            f"jaxpeft.mixtures.fix_gates(adapted, {{{experts[-1]!r}: 1.0}}))"
        )
    return (
        "Serve its tree alone: jaxpeft.mixtures.with_gates(adapted, names) gives each "
        "row of a batch an expert of its own"
    )


def change_rank(node: AdaptedKernel) -> int:
    """The rank of a site's change, as the room that it needs in a slot.

    Args:
        node: an adapted kernel; of a stack the largest rank of its layers counts.

    Returns:
        The rank: twice the method's where it began as a part of the kernel.
    """
    if is_plain(node.adapter):
        return node.trainable["a"].shape[-1]
    groups = jax.eval_shape(lambda n: layer_products([n]), _abstract(node))
    return max(products[0][0].shape[-1] for products in groups)


def _abstract(node: AdaptedKernel) -> AdaptedKernel:
    """The node's shapes, wherever its leaves lie."""
    bare = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(bare, node.replace(call=None))


def pairs(node: AdaptedKernel, slot: AdaptedKernel) -> dict[str, np.ndarray]:
    """A site's change in the layout of one slot, padded with zeros, on the host.

    Nothing is compiled for plain low-rank methods, whatever their rank and alpha.
    """
    rank, layers = (
        slot.frozen["a"].shape[-1],
        len(dims_of(node.shape, node.roles, BATCH)),
    )
    if is_plain(node.adapter):
        parts = {**node.trainable, "scale": node.frozen["scale"]}
    else:
        parts = _product(node)
    parts = {name: on_host(parts[name]) for name in PAIR}
    more = rank - parts["a"].shape[-1]
    parts["a"] = _pad(parts["a"], -1, more)
    parts["b"] = _pad(parts["b"], layers, more)
    return parts


def _product(node: AdaptedKernel) -> dict[str, Any]:
    """The change as ``a``, ``b`` and ``scale`` in the layout of a plain method."""
    groups = [products[0] for products in layer_products([node])]
    top = max(a.shape[-1] for a, _, _ in groups)
    each = []
    for a, b, scale in groups:
        more = top - a.shape[-1]
        a, b, scale = (np.asarray(on_host(x)) for x in (a, b, scale))
        each.append((_pad(a, -1, more), _pad(b, 1, more), scale))
    a, b, scale = (np.concatenate(x) for x in zip(*each, strict=True))
    dims = [dims_of(node.shape, node.roles, role) for role in (BATCH, IN, OUT)]
    return {
        "a": expand_leaf(a, (IN, None), *dims),
        "b": expand_leaf(b, (None, OUT), *dims),
        "scale": expand_leaf(scale, (), *dims),
    }


def _pad(x: np.ndarray, axis: int, more: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return np.pad(x, widths)


def written(node: AdaptedKernel, pair: Mapping[str, np.ndarray], slot: int):
    """The node with a pair in a slot."""
    axis = node.frozen["scale"].ndim - 1
    new = {n: _write(node.frozen[n], x, np.int32(slot), axis) for n, x in pair.items()}
    return _replaced(node, new)


def cleared(node: AdaptedKernel, slot: int) -> AdaptedKernel:
    """The node with zeros in a slot."""
    axis = node.frozen["scale"].ndim - 1
    new = {n: _clear(node.frozen[n], np.int32(slot), axis) for n in PAIR}
    return _replaced(node, new)


def _replaced(node: AdaptedKernel, new: dict[str, Any]) -> AdaptedKernel:
    """The node with new arrays, where the old ones lay."""
    new = {n: jax.device_put(x, node.frozen[n].sharding) for n, x in new.items()}
    return node.replace(frozen=node.frozen | new)


# The slot is an argument, so that writing another one compiles nothing.
@functools.partial(jax.jit, static_argnames="axis")
def _write(leaf, value, slot, axis: int):
    value = jnp.expand_dims(value.astype(leaf.dtype), axis)
    return jax.lax.dynamic_update_slice_in_dim(leaf, value, slot, axis)


@functools.partial(jax.jit, static_argnames="axis")
def _clear(leaf, slot, axis: int):
    shape = (*leaf.shape[:axis], 1, *leaf.shape[axis + 1 :])
    value = jnp.zeros(shape, leaf.dtype)
    return jax.lax.dynamic_update_slice_in_dim(leaf, value, slot, axis)
