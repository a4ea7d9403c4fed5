"""Functions that split, join, fold and measure adapted trees."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Key, PyTree

from jaxpeft.tree._attach import site_key
from jaxpeft.tree._biases import scale_bias, scaled_biases
from jaxpeft.tree._bound import Bound, bind, materialise
from jaxpeft.tree._lift import (
    from_matrices,
    layer_leaves,
    leaf_entries,
    lifted_factors,
    matrix_shape,
    padded,
    per_layer,
    to_matrices,
    unpadded_layers,
)
from jaxpeft.tree._node import (
    AdaptedKernel,
    check_key,
    is_node,
    leaves_with_path,
    map_nodes,
    nodes,
    wider,
    working_dtype,
)


def partition(adapted: PyTree) -> tuple[PyTree, PyTree]:
    """Splits an adapted tree into what is trained and what is not.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        ``(trainable, frozen)``: two trees with the structure of ``adapted`` and
        ``None`` (an empty pytree) in the holes, so that ``jax.grad`` and optax work
        on ``trainable`` alone: no gradient and no moment for the base exists.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params = {"q": {"kernel": jnp.ones((3, 5))}, "scale": jnp.ones(5)}
        >>> adapted = jp.attach(params, jp.lora(rank=1), ["q"], key=jax.random.key(0))
        >>> trainable, frozen = jp.partition(adapted)
        >>> [x.shape for x in jax.tree.leaves(trainable)]
        [(3, 1), (1, 5)]
    """

    def trained(x):
        if not is_node(x):
            return None
        return x.replace(base=None, key=None, call=None, frozen=dict.fromkeys(x.frozen))

    def fixed(x):
        return x.replace(trainable=dict.fromkeys(x.trainable)) if is_node(x) else x

    trainable = jax.tree.map(trained, adapted, is_leaf=is_node)
    return trainable, jax.tree.map(fixed, adapted, is_leaf=is_node)


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """Joins the two halves of ``partition`` again.

    Args:
        trainable: a tree with ``None`` where ``frozen`` has a leaf.
        frozen: a tree of the same structure.

    Returns:
        The adapted tree.

    Raises:
        ValueError: the structures differ, or a leaf is in both halves.
    """

    def either(path, x, y):
        if x is not None and y is not None:
            raise ValueError(
                f"leaf {'/'.join(map(str, path))!r} is in both halves given to "
                "`combine`; write combine(trainable, frozen) with the two results of "
                "partition"
            )
        return y if x is None else x

    none = lambda x: x is None
    return jax.tree_util.tree_map_with_path(either, trainable, frozen, is_leaf=none)


def mergeable(adapted: PyTree) -> bool:
    """Whether ``merge`` is possible: no site's method depends on the input."""

    def free(node):
        return not jax.eval_shape(lifted_factors, node).reads_input

    return all(free(node) for node in nodes(adapted))


def merge(adapted: PyTree) -> PyTree:
    r"""Folds every adapter into its kernel: ``D_c (W + a b) D_o``.

    Computed in float32 (float64 over float64), cast once to the kernel's dtype.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        A plain parameter tree.

    Raises:
        ValueError: a site's method depends on the input, so no kernel does it.
    """
    nodes(adapted)  # whole ones only
    scaled = scaled_biases(adapted)
    merged = map_nodes(_merge_node, adapted)
    if not scaled:
        return merged
    paths = [path for path, _ in leaves_with_path(adapted)]
    leaves, treedef = jax.tree.flatten(merged)
    return treedef.unflatten(
        _scale_bias(x, scaled[p]) if p in scaled else x
        for p, x in zip(paths, leaves, strict=True)
    )


_scale_bias = jax.jit(scale_bias)


@jax.jit
def _merge_node(node: AdaptedKernel):
    bound = bind(node.replace(key=None))
    if not isinstance(bound, Bound):
        return bound
    if bound.reads_input:
        raise ValueError(
            f"site {node.site.path!r}: {node.adapter.name!r} depends on the input, so "
            "no kernel has its effect; keep the adapted tree and call it through "
            "jaxpeft.adapt"
        )
    return materialise(bound)


def detach(adapted: PyTree) -> PyTree:
    """Drops every adapter.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        The plain parameter tree with the original kernels, bit for bit. Methods
        that folded something into a kernel give it back to within rounding.
    """

    def original(node):
        if node.adapter.unfold is None:
            return node.base
        roles, wide = node.roles, working_dtype(node.base.dtype)
        matrices = to_matrices(node.base, roles).astype(wide)
        whole = jax.vmap(node.adapter.unfold)(matrices, layer_leaves(node)[0])
        return from_matrices(whole.astype(node.base.dtype), node.base.shape, roles)

    nodes(adapted)  # whole ones only
    return map_nodes(original, adapted)


def penalty(adapted: PyTree) -> Array:
    """The methods' own penalties, to be added to the task loss.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        A float32 scalar (float64 over float64): for each method the sum over its
        sites, or their mean where its ``reduction`` says so. Each layer of a stack is
        a site, and the padding of layers of unequal rank is never seen.
    """
    sums: dict[tuple[str, str], list] = {}
    for node in nodes(adapted):
        per_site = per_layer(node, node.adapter.penalty)
        method = (node.adapter.name, node.adapter.reduction)
        sums.setdefault(method, []).append(per_site)
    result = jnp.zeros((), jnp.float32)
    for (_, reduction), each in sums.items():
        dtype = wider(result.dtype, *(x.dtype for x in each))
        sites = jnp.concatenate([x.astype(dtype) for x in each])
        joined = jnp.mean(sites) if reduction == "mean" else jnp.sum(sites)
        result = result.astype(dtype) + joined
    return result


def count(adapted: PyTree) -> tuple[int, int]:
    """Counts parameters; padding of unequal ranks is not counted.

    Args:
        adapted: a tree made by ``attach``, or its shapes under ``jax.eval_shape``.

    Returns:
        ``(trainable, total)``: the trained numbers, and the base's numbers plus the
        trained ones.
    """
    trained = sum(trainable_size(node) for node in nodes(adapted))
    base = sum(
        math.prod(x.base.shape if is_node(x) else x.shape)
        for x in jax.tree.leaves(adapted, is_leaf=is_node)
        if is_node(x) or hasattr(x, "shape")
    )
    return trained, base + trained


def trainable_size(node: AdaptedKernel) -> int:
    """Number of trained values at one site, without padding."""
    if not padded(node):
        return sum(math.prod(x.shape) for x in node.trainable.values())
    layers = zip(node.site.ranks, jax.eval_shape(unpadded_layers, node), strict=True)
    return sum(
        math.prod(x.shape) for rank, (_, part) in layers if rank for x in part.values()
    )


def with_dropout(
    adapted: PyTree,
    key: Key[Array, ""],
    *,
    leaves_key: Key[Array, ""] | None = None,
) -> PyTree:
    """Turns dropout on, for one step.

    Args:
        adapted: a tree made by ``attach``.
        key: this step's key; each site and each layer gets a part of its own.
        leaves_key: for methods that drop entries of their own leaves, whose mask is
            one for all micro-batches of a step; ``None``: ``key``.

    Returns:
        The tree with a key leaf in each node whose method has dropout. Without one
        a tree is in evaluation mode.

    Note:
        A model that differentiates itself (forces from energies) contracts with a
        kernel in both passes, and each draws a mask of its own.
    """
    leaves_key = key if leaves_key is None else leaves_key
    for given in (key, leaves_key):
        check_key(given)
    nodes(adapted)  # whole ones only
    keys = {"input": key, "leaves": leaves_key}

    def add(node):
        if not node.adapter.dropout:
            return node
        layers = matrix_shape(node.base.shape, node.roles)[0]
        own = site_key(keys[node.adapter.dropout_on], node.site.path)
        entries = leaf_entries(node)["key"]
        batch = tuple(node.base.shape[i] for i in entries)
        if not batch:
            return node.replace(key=own)
        return node.replace(key=jax.random.split(own, layers).reshape(batch))

    return map_nodes(add, adapted)


_READ = ("mask", "gates")  # what methods with experts look for


def with_inputs(adapted: PyTree, **inputs: Array | None) -> PyTree:
    """Adds arrays that methods with experts read beside the input, for one call.

    Args:
        adapted: a tree made by ``attach``.
        **inputs: arrays by name, each for all sites; ``None`` takes one off again.
            ``"mask"`` and ``"gates"`` are read (see ``jaxpeft.mixtures``). Where the
            mask is 0 an adapter sees 0, and adds nothing, whatever the input holds.

    Returns:
        The tree with them in each node whose method has experts, repeated for each
        layer of a stack. They are no part of the adapter: partitions keep them with
        the frozen half, files and checkpoints leave them out.

    Raises:
        ValueError: an input of another name, which no method would read.
    """
    if unknown := sorted(set(inputs) - set(_READ)):
        raise ValueError(f"inputs are {' and '.join(_READ)}, got {', '.join(unknown)}")
    nodes(adapted)  # whole ones only

    def add(node):
        if not node.adapter.experts:
            return node
        batch = tuple(node.base.shape[i] for i in leaf_entries(node)["key"])
        call = {n: x for n, x in (node.call or {}).items() if n not in inputs}
        call |= {
            name: jnp.broadcast_to(x, batch + x.shape)
            for name, x in inputs.items()
            if x is not None
        }
        return node.replace(call=call or None)

    return map_nodes(add, adapted)


def inherit_specs(adapted: PyTree, specs: PyTree) -> PyTree:
    """Gives every leaf of an adapted tree the sharding of its kernel.

    Args:
        adapted: a tree made by ``attach``, or its shapes.
        specs: a tree like the plain parameters with a ``PartitionSpec`` per leaf.

    Returns:
        A tree like ``adapted`` with a ``PartitionSpec`` for each leaf: entries of
        batch, in and out axes carry over, rank axes are replicated.
    """
    is_spec = lambda x: isinstance(x, PartitionSpec)

    def leaf_specs(node, spec):
        if not is_node(node):
            return spec
        entries = leaf_entries(node)
        full = tuple(spec) + (None,) * (node.base.ndim - len(spec))
        along = lambda name: PartitionSpec(
            *(None if i is None else full[i] for i in entries[name])
        )
        return node.replace(
            base=spec,
            key=None if node.key is None else along("key"),
            call=jax.tree.map(lambda _: PartitionSpec(), node.call),
            frozen={n: None if x is None else along(n) for n, x in node.frozen.items()},
            trainable={
                n: None if x is None else along(n) for n, x in node.trainable.items()
            },
        )

    flat, treedef = jax.tree.flatten(adapted, is_leaf=is_node)
    flat_specs = jax.tree.leaves(specs, is_leaf=is_spec)
    if len(flat) != len(flat_specs):
        raise ValueError(
            f"`specs` has {len(flat_specs)} leaves, the tree has {len(flat)}; give one "
            "PartitionSpec per parameter"
        )
    return treedef.unflatten(map(leaf_specs, flat, flat_specs))


def flat(tree: PyTree) -> dict[str, Any]:
    """A tree as ``{"path/of/leaf": leaf}``; holes (``None``) are left out.

    An adapted kernel's leaves appear under its path: ``.../kernel/base``,
    ``.../kernel/a``.
    """
    return dict(leaves_with_path(tree, is_leaf=None))


def unflat(like: PyTree, leaves: dict[str, Any]) -> PyTree:
    """Puts the leaves of ``flat`` back into a tree like ``like``.

    Raises:
        ValueError: names are missing or left over; all of them are listed.
    """
    names = list(flat(like))
    missing, surplus = (
        sorted(set(names) - set(leaves)),
        sorted(set(leaves) - set(names)),
    )
    if missing or surplus:
        raise ValueError(
            f"`leaves` does not fit the tree: missing {missing}, left over {surplus}"
        )
    return jax.tree.structure(like).unflatten([leaves[n] for n in names])
