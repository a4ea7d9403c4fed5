"""Fewer components of a low-rank site: a smaller node that computes the same."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._change import structure
from jaxpeft.tree._lift import leaf_axes
from jaxpeft.tree._node import AdaptedKernel
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
    batch, parts = site.roles.count(BATCH), []
    top = max(site.ranks or (0,))
    axes = leaf_axes(node.adapter, top)
    for part, names in zip((node.frozen, node.trainable), axes, strict=True):
        leaves = {}
        for name, x in part.items():
            roles = names.get(name, ())
            if roles.count(None) > 1:
                raise ValueError(
                    f"site {site.path!r}: leaf {name!r} of {node.adapter.name!r} mixes "
                    "components, which cannot be cut off one by one"
                )
            if None not in roles:
                leaves[name] = x
                continue
            # `at`: the axis of components, behind the kernel's own axes.
            before = roles[: roles.index(None)]
            at = batch + sum(site.roles.count(role) for role in before)
            if x.shape[at] != top:
                raise ValueError(
                    f"site {site.path!r}: leaf {name!r} of {node.adapter.name!r} has "
                    f"{x.shape[at]} columns for {top} components"
                )
            shape = x.shape[:batch] + (1,) * (at - batch) + (width,)
            shape += (1,) * (x.ndim - at - 1)
            cut = functools.partial(
                _cut, index=index.reshape(shape), real=real.reshape(shape), at=at
            )
            if isinstance(x, jax.ShapeDtypeStruct):
                leaves[name] = jax.eval_shape(cut, x)
            elif isinstance(x, jax.core.Tracer):
                leaves[name] = cut(x)
            else:
                leaves[name] = jax.device_put(cut(x), getattr(x, "sharding", None))
        parts.append(leaves)
    ranks = tuple(map(len, kept))
    return node.replace(
        frozen=parts[0],
        trainable=parts[1],
        site=dataclasses.replace(site, ranks=ranks),
    )


def _cut(x, index, real, at: int):
    taken = jnp.take_along_axis(x, jnp.asarray(index), at)
    return jnp.where(real, taken, jnp.zeros((), x.dtype))
