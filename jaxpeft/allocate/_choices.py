"""The parts of adapted trees that may train or rest: components, and biases.

A node is one component of a low-rank site (one column of ``a``, one row of ``b``), or
one bias that is trained by itself. Their order is that of the sites in the tree, its
layers and its components; biases come after all components.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree import (
    BATCH,
    alpha_of,
    is_node,
    leaf_axes,
    map_nodes,
    module_path,
    wider,
)


class NodeSite(NamedTuple):
    """The nodes of one site."""

    leaves: dict[str, int | None]  # where the rank axis is; a bias has none
    batch: int  # leading axes that count layers
    real: np.ndarray  # [layers, r]; False where unequal ranks are padded
    adapter: Any = None
    scales: Any = None  # of each layer; None: the scale is 1

    def alpha(self, layer: int, rank: int) -> float:
        """Alpha of that rank with the scale that the layer has now."""
        if self.scales is None or not rank:
            return float(rank)
        scale = np.asarray(jax.device_get(self.scales)).reshape(-1)[layer]
        return alpha_of(self.adapter, rank, scale)


def node_sites(tree: Any) -> dict[str, NodeSite]:
    """Every site with nodes, components before biases, each in the tree's order."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]
    components, biases, stacks = {}, {}, {}
    for node in found:
        path, roles, ranks = node.site.path, node.site.roles, node.site.ranks
        if node.adapter.where.leaf == "kernel":
            stacks[module_path(path)] = roles.count(BATCH)
        if ranks is None:
            continue
        leaves, batch = {}, roles.count(BATCH)
        for name, axes in leaf_axes(node.adapter, max(ranks))[1].items():
            if axes.count(None) == 1:
                before = axes[: axes.index(None)]
                leaves[name] = batch + sum(roles.count(role) for role in before)
        if leaves:
            real = np.arange(max(ranks))[None, :] < np.array(ranks)[:, None]
            scales = node.frozen.get("scale")
            components[path] = NodeSite(leaves, batch, real, node.adapter, scales)
    for node in found:
        if node.adapter.where.leaf == "bias":
            # A bias does not say which of its axes are layers; its kernel does.
            batch = stacks.get(module_path(node.site.path), 0)
            (name,) = node.trainable
            layers = math.prod(node.trainable[name].shape[:batch])
            real = np.ones((layers, 1), bool)
            biases[node.site.path] = NodeSite({name: None}, batch, real)
    if not components and not biases:
        raise ValueError(
            "no site has components or biases to choose from; attach a low-rank "
            "method, such as jaxpeft.pc(rank=10), first"
        )
    return components | biases


def pick(tree: Any, sites: Mapping[str, NodeSite]) -> Any:
    """The nodes' leaves alone, wide."""

    def each(node):
        site = sites.get(node.site.path)
        mine = site.leaves if site else ()
        wide = lambda x: x.astype(wider(x.dtype, jnp.float32))
        leaves = node.trainable.items()
        return node.replace(trainable={n: wide(x) for n, x in leaves if n in mine})

    return map_nodes(each, tree)


def by_node(tree: Any, sites: Mapping[str, NodeSite]) -> jax.Array:
    """Of a number for each entry: the mean over each leaf of a node, then of those."""
    found = {x.site.path: x for x in jax.tree.leaves(tree, is_leaf=is_node)}
    result = []
    for path, site in sites.items():
        total = 0.0
        for name, at in site.leaves.items():
            x = found[path].trainable[name]
            x = x if at is None else jnp.moveaxis(x, at, site.batch)
            total = total + jnp.mean(x.reshape(*site.real.shape, -1), axis=-1)
        mean = (total / len(site.leaves)).reshape(-1)
        result.append(mean[np.flatnonzero(site.real)].astype(jnp.float32))
    return jnp.concatenate(result)


def choose_leaves(
    keep: Mapping[str, Any], sites: Mapping[str, NodeSite], new: Any, old: Any
) -> Any:
    """``new`` where a node is kept and outside of nodes, ``old`` elsewhere."""

    def each(one, other):
        site, leaves = sites.get(one.site.path), dict(one.trainable)
        for name, at in site.leaves.items() if site else ():
            x, mask = leaves[name], keep[one.site.path]
            layers = x.shape[: site.batch]
            if at is None:
                shape = layers + (1,) * (x.ndim - site.batch)
            else:
                shape = layers + (1,) * (at - site.batch) + (x.shape[at],)
                shape += (1,) * (x.ndim - at - 1)
            rest = other.trainable[name].astype(x.dtype)
            leaves[name] = jnp.where(mask.reshape(shape), x, rest)
        return one.replace(trainable=leaves)

    return map_nodes(each, new, old)


def node_sizes(trainable: Any, sites: Mapping[str, NodeSite]) -> tuple[np.ndarray, int]:
    """Parameters of each node, and of all leaves that are outside of nodes."""
    found = {x.site.path: x for x in jax.tree.leaves(trainable, is_leaf=is_node)}
    each, inside = [], 0
    for path, site in sites.items():
        size = sum(found[path].trainable[name].size for name in site.leaves)
        inside += size
        each += [size // site.real.size] * int(site.real.sum())
    return np.array(each), sum(x.size for x in jax.tree.leaves(trainable)) - inside


def node_masks(
    chosen: np.ndarray, sites: Mapping[str, NodeSite]
) -> dict[str, np.ndarray]:
    """``{path: [layers, r]}`` of indices of nodes."""
    masks, at = {}, 0
    for path, site in sites.items():
        places = np.argwhere(site.real)
        masks[path] = np.zeros(site.real.shape, bool)
        for i, (layer, component) in enumerate(places):
            masks[path][layer, component] = at + i in chosen
        at += len(places)
    return masks
