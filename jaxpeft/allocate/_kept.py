"""Fewer components of a low-rank site: a smaller node that computes the same."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.tree import (
    BATCH,
    AdaptedKernel,
    lifted_factors,
    only_adds,
    take_components,
)


def keep_components(node: AdaptedKernel, kept: Sequence[Sequence[int]]) -> Any:
    """Cuts a site's leaves down to some of its components.

    Args:
        node: a site, with values.
        kept: for each layer the components that stay, rising; of a kernel alone, one.

    Returns:
        The node with as many ranks as are kept; the kernel where none is. Each layer's
        scale stays, and its alpha is the one that gives it.

    Raises:
        ValueError: a component is not there, the method's components are not apart from
            one another, or one that would go has a share in what the site computes.
    """
    site, name = node.site, node.adapter.name
    where = f"site {site.path!r}"
    shares = node.adapter.shared is not None
    apart = site.ranks is not None and only_adds(node.adapter) and not shares
    if not apart or node.adapter.folded is not None:
        raise ValueError(
            f"{where}: {name!r} has no components that can be cut off one by one; a "
            "method that folds nothing into the kernel, shares nothing between sites "
            "and only adds has"
        )
    if len(kept) != len(site.ranks):
        raise ValueError(
            f"{where} has {len(site.ranks)} layers, and components of {len(kept)} are "
            "kept"
        )
    for layer, (rank, each) in enumerate(zip(site.ranks, kept, strict=True)):
        if list(each) != sorted(set(each)) or not all(0 <= i < rank for i in each):
            raise ValueError(
                f"{where} keeps components {tuple(each)} of layer {layer}; they must "
                f"rise, from 0 to {rank - 1}"
            )
    gone = [
        [i for i in range(rank) if i not in each]
        for rank, each in zip(site.ranks, kept, strict=True)
    ]
    if any(gone) and bool(_acts(take_components(node, gone))):
        raise ValueError(
            f"{where}: a component that is not kept has a share in what the site "
            "computes. Choose with unselected='revert' (jaxpeft.allocate.ggm), or keep "
            "all."
        )
    return take_components(node, kept) if any(map(len, kept)) else node.base


@jax.jit
def _acts(node: AdaptedKernel):
    """Whether a product of a site's factors has a part that is not 0."""
    f, batch = lifted_factors(node), node.roles.count(BATCH)
    found = []
    for term in f.terms:
        down = jnp.any(term.a != 0, axis=tuple(range(batch, term.a.ndim - 1)))
        up = jnp.any(term.b != 0, axis=tuple(range(batch + 1, term.b.ndim)))
        found.append(jnp.any(down & up))
    return jnp.any(jnp.stack(found))
