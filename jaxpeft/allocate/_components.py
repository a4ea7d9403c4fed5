"""The components of low-rank sites, and the trained weight that each may have."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpeft.tree import BATCH, AdaptedKernel, is_node, leaf_axes


class Components(NamedTuple):
    """The trained leaves of one site that its rank axis cuts into components.

    Attributes:
        weight: the leaf with one number for each component.
        leaves: every leaf with one rank axis, and where in it that axis is.
        batch: the number of batch axes in front.
        real: ``[layers, r]``, ``False`` where unequal ranks are padded.
    """

    weight: str
    leaves: dict[str, int]
    batch: int
    real: np.ndarray


def components(node: AdaptedKernel) -> Components | None:
    """A site's components, ``None`` where its method gives them no weights.

    Also of one half of a partition, which has no base.
    """
    if node.site.ranks is None:
        return None
    roles, rank = node.site.roles, max(node.site.ranks)
    found, weights = {}, []
    for name, axes in leaf_axes(node.adapter, rank)[1].items():
        if axes.count(None) != 1:
            continue
        before = axes[: axes.index(None)]
        found[name] = roles.count(BATCH) + sum(roles.count(role) for role in before)
        if axes == (None,):
            weights.append(name)
    if len(weights) != 1:
        return None
    real = np.arange(rank)[None, :] < np.array(node.site.ranks)[:, None]
    return Components(weights[0], found, roles.count(BATCH), real)


def component_sites(tree: Any) -> dict[str, Components]:
    """``{path: components}`` of every site whose components have weights.

    Args:
        tree: an adapted tree, or a half of its partition.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for node in jax.tree.leaves(tree, is_leaf=is_node):
        if is_node(node) and (site := components(node)) is not None:
            found[node.site.path] = site
    if not found:
        raise ValueError(
            "no site has a trained weight for each of its components; attach a method "
            "that does, such as jaxpeft.adalora(rank=12), first"
        )
    return found
