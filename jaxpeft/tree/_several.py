"""Adapters off a tree, and onto a tree.

Adapters of one base need no container but a dictionary:
``{"french": extract(one), "sql": extract(other)}``, whose keys are their names.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxpeft.tree._attach import fold_base
from jaxpeft.tree._grouped import grouped
from jaxpeft.tree._lift import leaf_entries
from jaxpeft.tree._node import (
    AdaptedKernel,
    is_node,
    leaves_with_path,
    nodes,
    with_leaves,
)
from jaxpeft.tree._paths import nearest
from jaxpeft.tree._places import place_like
from jaxpeft.tree._together import is_several, parts_of, together


def extract(adapted: PyTree, name: str | None = None) -> dict[str, AdaptedKernel]:
    """Takes the adapters off a tree: a small tree without the base.

    N adapters of one base then cost N small trees. A plain dictionary of them, by
    name, is all there is to managing them:

    ==========  ==================================================
    add         ``adapters["french"] = jp.extract(adapted)``
    list        ``list(adapters)``
    switch      ``adapted = jp.graft(params, adapters["french"])``
    disable     run ``params``, which no adapter has changed
    delete      ``del adapters["french"]``
    ==========  ==================================================

    Args:
        adapted: a tree made by ``attach``.
        name: the name of the adapter to take, where kernels have several. What comes
            off is an adapter like any other; ``graft(..., name=)`` puts it back under
            a name. ``None``: all of them as they are.

    Returns:
        ``{path of the kernel: its node without the kernel}``. Entries may be left out
        or brought together from several trees. Dropout keys stay behind.

    Raises:
        ValueError: the tree has no adapters or none of that name, or is one half of a
            partition.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.zeros((4, 6))}}, jax.random.key(0)
        >>> one = jp.attach(params, jp.lora(rank=2), ["query"], key=key)
        >>> adapters = {"one": jp.extract(one)}
        >>> list(adapters["one"])
        ['query/kernel']
        >>> again = jp.graft(params, adapters["one"])
        >>> jax.tree.structure(again) == jax.tree.structure(one)
        True
    """
    found = nodes(adapted)
    if not found:
        raise ValueError(
            "`adapted` has no adapters; give a tree that jaxpeft.attach made, before "
            "merge or detach."
        )
    if name is not None:
        each = [parts_of(node) for node in found]
        known = sorted({n for parts in each for n in parts})
        if name not in known:
            raise ValueError(f"`adapted` has no adapter {name!r}; it has {known}")
        found = [parts[name] for parts in each if name in parts]
    return {node.site.path: node.replace(base=None, call=None) for node in found}


def graft(
    params: PyTree, adapter: Mapping[str, AdaptedKernel], *, name: str | None = None
) -> PyTree:
    """Puts adapters that ``extract`` took off onto a base.

    The base is not copied: trees of several adapters share its arrays. Nothing says
    which base an adapter was trained with; files do (``interop.save_adapter``).

    Args:
        params: the plain parameter tree; it may carry adapters at other sites, or of
            other names.
        adapter: what ``extract`` returned. Leaves may come from a checkpoint; they go
            where their kernels lie.
        name: a name for it, where kernels are to have several; ``None``: the names
            that it has.

    Returns:
        The adapted tree. A method that folds a part of its change into the kernel
        folds it again.

    Raises:
        ValueError: a kernel is not there, has an adapter of that name already or one
            that cannot share it, or has another shape. All are listed, and nothing is
            attached.
    """
    leaves = dict(leaves_with_path(params))
    adapter = {path: _named(node, name) for path, node in adapter.items()}
    problems = sum((_misfits(p, node, leaves) for p, node in adapter.items()), [])
    if problems:
        raise ValueError(
            "`adapter` does not fit `params`; nothing was attached:\n  "
            + grouped(problems)
        )
    made = {path: _grafted(node, leaves[path]) for path, node in adapter.items()}
    return with_leaves(params, made)


def _misfits(path: str, node: AdaptedKernel, leaves) -> list[str]:
    if not is_node(node) or node.base is not None:
        return [f"{path!r} is no adapter off a tree; write adapter=extract(adapted)"]
    kernel, names = leaves.get(path), list(parts_of(node))
    if kernel is None:
        return [f"no leaf {path!r}; nearest: {nearest(path, list(leaves))}"]
    if is_node(kernel):
        had = parts_of(kernel)
        if taken := [had[n].adapter.name for n in names if n in had]:
            how = "detach it first, or graft(..., name='french')"
            return [f"{path!r} already carries {', '.join(map(repr, taken))}; {how}"]
        kernel = kernel.base
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        return [f"{path!r} is {kernel.dtype}; an adapter needs a floating kernel"]
    shape = tuple(kernel.shape)
    if len(shape) != len(node.site.roles):
        roles = " ".join(node.site.roles)
        return [f"{path!r} has shape {shape}, and the adapter's axes are {roles!r}"]
    entries = leaf_entries(node.replace(base=kernel))
    return [
        f"{path!r} has shape {shape}, which the adapter's leaf {name!r} of shape "
        f"{tuple(x.shape)} does not fit"
        for name, x in {**node.frozen, **node.trainable}.items()
        if any(
            i is not None and shape[i] != size
            for i, size in zip(entries[name], x.shape, strict=True)
        )
    ]


def _named(node: AdaptedKernel, name: str | None) -> AdaptedKernel:
    """What was extracted, under a name."""
    if name is None or not is_node(node):
        return node
    if is_several(node):
        raise ValueError(
            f"{node.site.path!r} has adapters {list(parts_of(node))}; graft each of "
            "them alone to give it another name: extract(adapted, name)"
        )
    return together({name: node})


def _grafted(node: AdaptedKernel, kernel) -> AdaptedKernel:
    there = parts_of(kernel) if is_node(kernel) else {}
    base = kernel.base if there else kernel
    node = together(there | parts_of(node.replace(base=base)))
    if node.adapter.folded is not None:  # such a one is alone on its kernel
        node = node.replace(base=fold_base(node, warn=False))
    return place_like(node, base)
