"""Fewer components of a low-rank site: a smaller node that computes the same."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._change import structure
from jaxpeft.tree._lift import leaf_entries, shared_names
from jaxpeft.tree._node import AdaptedKernel, made_like
from jaxpeft.tree._terms import BATCH


def only_adds(adapter: Adapter) -> bool:
    """Whether a method adds thin products, so that it adds nothing where leaves are 0.

    A method that scales the kernel, puts another in its place or has experts does more.
    """
    if adapter.where.layers is not None or adapter.where.rank is None:
        return False
    found = structure(adapter, adapter.where.rank)
    return found.only_adds and not found.experts


def take_components(
    node: AdaptedKernel, kept: Sequence[Sequence[int]]
) -> AdaptedKernel:
    """The node with these components alone, padded with zeros.

    Args:
        node: a fresh adapter, or its shapes.
        kept: of each layer, the numbers of its components. They are not checked.
    """
    site, width = node.site, max(map(len, kept))
    if node.adapter.shared is not None and any(
        list(each) != list(range(len(each))) for each in kept
    ):
        raise ValueError(
            f"site {site.path!r}: {node.adapter.name!r} shares its components between "
            "sites; they cannot be chosen one by one"
        )
    index = np.zeros((len(kept), width), np.int32)
    real = np.zeros((len(kept), width), bool)
    for layer, each in enumerate(kept):
        index[layer, : len(each)], real[layer, : len(each)] = each, True
    batch, axes = site.roles.count(BATCH), leaf_entries(node)
    common = shared_names(node.adapter)

    def own(name, x):
        behind = () if name in common else axes[name]
        if behind.count(None) > 1:
            raise ValueError(
                f"site {site.path!r}: leaf {name!r} of {node.adapter.name!r} mixes "
                "components, which cannot be cut off one by one"
            )
        if None not in behind:
            return x
        at = behind.index(None)  # the axis of components
        if x.shape[at] != site.rank:
            raise ValueError(
                f"site {site.path!r}: leaf {name!r} of {node.adapter.name!r} has "
                f"{x.shape[at]} columns for {site.rank} components"
            )
        shape = x.shape[:batch] + (1,) * (at - batch) + (width,)
        shape += (1,) * (x.ndim - at - 1)
        return made_like(
            x, lambda x: _cut(x, index.reshape(shape), real.reshape(shape), at), x
        )

    ranks = tuple(map(len, kept))
    return node.map_leaves(own).replace(site=dataclasses.replace(site, ranks=ranks))


def _cut(x, index, real, at: int):
    """The leaf with other entries along ``at``, where it lies."""
    taken = jnp.take_along_axis(x, jnp.asarray(index), at)
    made = jnp.where(real, taken, jnp.zeros((), x.dtype))
    if isinstance(x, jax.core.Tracer):
        return made
    return jax.device_put(made, getattr(x, "sharding", None))
