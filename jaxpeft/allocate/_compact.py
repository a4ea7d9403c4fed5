"""From chosen components to a smaller tree that holds them alone."""

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxpeft.allocate._allocation import Allocation
from jaxpeft.allocate._kept import keep_components
from jaxpeft.numerics import dense
from jaxpeft.tree import map_nodes, nodes


def compact(adapted: PyTree, allocation: Allocation) -> PyTree:
    """Cuts off the components that were not chosen: less to store, the same function.

    The result is an adapted tree like any other, of the ranks of ``allocation``: it
    can be trained on, ``jaxpeft.interop.save_adapter`` writes the chosen components
    alone, and ``save_peft`` those, as a ``rank_pattern``. What is left out must have no
    share in what the tree computes, as after ``unselected="revert"`` of ``ggm``; what
    ``"keep"`` has left in place is part of the function, and stored with it. PEFT's
    file of a stack leaves out its layers of rank 0, and comes back only into a model
    with ``scan_layers=False``; jaxpeft's own file comes back as it is.

    Args:
        adapted: a tree with the adapters that ``allocation`` chose from.
        allocation: with components, ``ggm``'s.

    Returns:
        The tree. A site of which nothing is chosen is its plain kernel, a layer of a
        stack has rank 0; so is a trained bias its plain one.

    Raises:
        ValueError: ``allocation`` names a site that is not in the tree, or what would
            be left out is not what it was at the start.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.eye(6)[:, :4]}}
        >>> adapted = jp.attach(params, jp.pc(rank=4), ["query"], key=jax.random.key(0))
        >>> chosen = {"query/kernel": jp.allocate.SiteRank(2, 2.0, (0, 3))}
        >>> small = compact(adapted, Allocation.of(chosen))
        >>> small["query"]["kernel"].trainable["a"].shape
        (6, 2)
    """
    biases = allocation.facts.get("biases", {})
    chosen = {
        path: site for path, site in allocation.sites if site.components is not None
    }
    here = {node.site.path for node in nodes(adapted)}
    if missing := sorted((set(chosen) | set(biases)) - here):
        raise ValueError(
            f"`allocation` chooses components of {missing[:3]}, which "
            f"{'is' if len(missing) == 1 else 'are'} not adapted in the tree"
        )

    def cut(node):
        path = node.site.path
        if path in biases and not any(biases[path]):
            (value,) = node.trainable.values()
            if not bool(jnp.all(value == dense(node.base, value.dtype))):
                raise ValueError(
                    f"bias {path!r} was not chosen and is not what it was at the "
                    "start: choose with unselected='revert'"
                )
            return node.base
        if path not in chosen:
            return node
        site = chosen[path]
        kept = site.components if isinstance(site.rank, tuple) else (site.components,)
        return keep_components(node, kept)

    return map_nodes(cut, adapted)
