"""Attaching what a file says: a method by leaf, with the file's values."""

import warnings
from typing import NamedTuple

import jax
import numpy as np

from jaxpeft.interop._format import whole_leaf
from jaxpeft.interop._load import place_leaves, put_leaf
from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._tensors import TensorFile
from jaxpeft.interop.peft._sites import reordered
from jaxpeft.parts import form_of
from jaxpeft.tree import (
    AdaptedKernel,
    Adapter,
    attach,
    is_node,
    leaf_axes,
    matrix_shape,
)


class Found(NamedTuple):
    """One module's adapter in the file."""

    module: Module
    adapter: Adapter
    rank: int | None
    alpha: float | None
    keys: dict[str, str]  # end of the key: key


def attach_sites(
    tree, adapter: Adapter, sites: dict[str, list[Found]], file, axes, config
):
    """Attaches one method and puts the file's values into its trained leaves."""

    def from_peft(path, leaf):
        return path in sites

    per_site = {}
    if adapter.where.rank is not None:
        rank = {p: tuple(s.rank for s in each) for p, each in sites.items()}
        per_site["rank_pattern"] = rank
    if adapter.where.alpha is not None:
        alpha = {p: tuple(s.alpha for s in each) for p, each in sites.items()}
        per_site["alpha_pattern"] = alpha
    key = jax.random.key(0)  # every leaf that is drawn is replaced below
    with warnings.catch_warnings():  # the file's choices are not the reader's
        warnings.simplefilter("ignore")
        tree = attach(tree, adapter, from_peft, key=key, axes=axes, **per_site)

    form, shared = form_of(adapter), {}

    def filled(node):
        if not is_node(node) or node.site.path not in sites:
            return node
        layers = []
        for site in sites[node.site.path]:
            leaves = {end: read_leaf(file, key) for end, key in site.keys.items()}
            if form.arrange is not None:
                leaves = form.arrange(config, site.module.name, leaves)
            made = form.from_leaves(leaves, site.module.kind)
            layers.append(_in_our_order(node, site, made))
        if form.shared and not shared:  # one array for all sites
            shared.update(
                {
                    ours: put_leaf(read_leaf(file, key).T, node.base, (None, None))
                    for ours, key in form.shared.items()
                }
            )
        return node.replace(
            frozen=node.frozen | shared,
            trainable=place_leaves(node, _stacked(node, layers)),
        )

    return jax.tree.map(filled, tree, is_leaf=is_node)


def read_leaf(file: TensorFile, key: str) -> np.ndarray:
    """A leaf in float32, whatever the file has; PEFT does the same."""
    return np.asarray(file.read(key), np.float32)


def _in_our_order(node: AdaptedKernel, site: Found, leaves):
    """Leaves of one layer with output features in our order."""
    d_out = matrix_shape(node.base.shape, node.roles)[2]
    back = np.argsort(site.module.order(d_out))
    axes = leaf_axes(node.adapter, site.rank)[1]
    return {n: reordered(np.asarray(x), axes[n], back) for n, x in leaves.items()}


def _stacked(node: AdaptedKernel, layers: list[dict[str, np.ndarray]]):
    """One layer's two-dimensional leaves each -> the node's trained leaves."""
    made = {}
    for name, like in node.trainable.items():
        each = [np.asarray(layer[name]) for layer in layers]
        top = np.max([x.shape for x in each], axis=0)
        wide = np.zeros((len(each), *top), each[0].dtype)
        for place, x in zip(wide, each, strict=True):
            place[tuple(slice(n) for n in x.shape)] = x
        made[name] = wide.reshape(like.shape).astype(like.dtype)
    return made


def attach_whole(tree, table: Table, whole, file):
    """Attaches full training to leaves that the file has whole."""
    if not whole:
        return tree

    def from_peft(path, leaf):
        return path in whole

    tree = attach(tree, whole_leaf(), from_peft, key=jax.random.key(0))

    def filled(node):
        if not is_node(node) or node.site.path not in whole:
            return node
        modules, parts, keys = zip(*whole[node.site.path], strict=True)
        value = table.leaf(modules, parts[0], [read_leaf(file, key) for key in keys])
        ((name, like),) = node.trainable.items()
        return node.replace(
            trainable=place_leaves(node, {name: value.astype(like.dtype)})
        )

    return jax.tree.map(filled, tree, is_leaf=is_node)
