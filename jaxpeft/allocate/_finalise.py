"""From pruned components to plain low-rank adapters of the ranks that are left."""

import math

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxpeft.allocate._components import Components, component_sites
from jaxpeft.tree import (
    BATCH,
    AdaptedKernel,
    Adapter,
    attach,
    lifted_factors,
    map_nodes,
    nodes,
    structure_of,
)


def _kept(node: AdaptedKernel, site: Components) -> np.ndarray:
    """``[layers, r]``: which components of a site are not 0."""
    weight = np.asarray(node.trainable[site.weight])
    return site.real & (weight.reshape(site.real.shape) != 0)


def kept_ranks(adapted: PyTree) -> dict[str, int | list[int]]:
    """Returns how many components pruning has left at each site.

    Args:
        adapted: an adapted tree, with values.

    Returns:
        ``{path: rank}``, with a list of one rank a layer for stacks: a
        ``rank_pattern`` for ``attach`` where none of them is 0.

    Raises:
        ValueError: no site has weights of its components.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, jp.adalora(rank=3), ["query"], key=jax.random.key(0)
        ... )
        >>> kept_ranks(adapted)  # at the start all weights are 0
        {'query/kernel': 0}
    """
    sites, found = component_sites(adapted), {}
    for node in nodes(adapted):
        if (site := sites.get(node.site.path)) is not None:
            each = [int(n) for n in _kept(node, site).sum(1)]
            found[node.site.path] = each if BATCH in node.site.roles else each[0]
    return found


def finalise(adapted: PyTree, adapter: Adapter, *, key: Key[Array, ""]) -> PyTree:
    """Cuts off what was pruned: plain low-rank adapters of the ranks that are left.

    The result computes the same function, up to the rounding of one product.

    Args:
        adapted: an adapted tree, with values.
        adapter: the plain low-rank method to use, ``jaxpeft.lora()``; its own rank
            and alpha give way to those of each site and layer, where they are equal.
        key: a typed key, for ``attach``; no drawn value is left.

    Returns:
        The tree with ``adapter`` at the sites whose components have weights. A layer
        of which nothing is left has one component of zeros; a site of which nothing
        is left is its plain kernel. Other sites stay as they are.

    Raises:
        ValueError: no site has weights of its components, a site does more than its
            low-rank product, or ``adapter`` is not plain.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, jp.adalora(rank=3), ["query"], key=jax.random.key(0)
        ... )
        >>> node = adapted["query"]["kernel"]
        >>> weights = {"e": jax.numpy.array([2.0, 0.0, 1.0])}
        >>> adapted["query"]["kernel"] = node.replace(
        ...     trainable=node.trainable | weights
        ... )
        >>> plain = finalise(adapted, jp.lora(), key=jax.random.key(0))
        >>> plain["query"]["kernel"].trainable["a"].shape
        (6, 2)
    """
    sites, kept = component_sites(adapted), {}
    before = {n.site.path: n for n in nodes(adapted) if n.site.path in sites}
    for path, node in before.items():
        mask = _kept(node, sites[path])
        if mask.any():
            kept[path] = mask
    plain = map_nodes(lambda n: n.base if n.site.path in sites else n, adapted)
    for path, node in before.items():
        found = structure_of(node)
        if not found.only_adds or len(found.terms) > 1:
            raise ValueError(
                f"site {path!r}: {node.adapter.name!r} does more than a low-rank "
                "product, which a plain low-rank adapter has no place for"
            )
    if not kept:
        return plain
    ranks = {p: [max(1, int(n)) for n in mask.sum(1)] for p, mask in kept.items()}
    result = attach(
        plain,
        adapter,
        lambda path, leaf: path in kept,
        key=key,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        axes={path: " ".join(before[path].site.roles) for path in kept},
    )

    def cut(node):
        path = node.site.path
        return _cut(node, before[path], kept[path]) if path in kept else node

    return map_nodes(cut, result)


def _cut(node: AdaptedKernel, before: AdaptedKernel, kept: np.ndarray):
    """Gives a fresh low-rank node the components that are left of another."""
    if set(node.trainable) != {"a", "b"} or set(node.frozen) != {"scale"}:
        raise ValueError(
            f"`adapter` {node.adapter!r} is not a plain low-rank pair; write "
            "finalise(adapted, jaxpeft.lora(), key=key)"
        )
    (term,), layers = lifted_factors(before).terms, len(kept)
    scale = np.asarray(node.frozen["scale"]).reshape(layers)
    batch = node.site.roles.count(BATCH)
    leaves = {}
    for name, old in (("a", term.a), ("b", term.b)):
        like = node.trainable[name]
        rank_first = name == "b"
        at = batch if rank_first else old.ndim - 1
        # [layers, r, rest] of the old and of the new
        old = np.moveaxis(np.asarray(old), at, batch)
        old = old.reshape(layers, old.shape[batch], -1)
        shape = np.moveaxis(np.empty(like.shape, like.dtype), at, batch).shape
        new = np.zeros(
            (layers, shape[batch], math.prod(shape[batch + 1 :])), like.dtype
        )
        for i in range(layers):
            part = old[i][kept[i]]
            new[i, : len(part)] = part / scale[i] if rank_first else part
        new = np.moveaxis(new.reshape(shape), batch, at)
        leaves[name] = jax.device_put(new, like.sharding)
    return node.replace(trainable=leaves)
