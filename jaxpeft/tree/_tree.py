"""Functions that split, join, fold and measure adapted trees."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from jaxpeft.numerics import dense, is_quantised, stored_as
from jaxpeft.tree._biases import scale_bias, scaled_biases
from jaxpeft.tree._bound import Bound, bind, materialise
from jaxpeft.tree._call import with_call
from jaxpeft.tree._change import refolded
from jaxpeft.tree._lift import (
    layer_leaves,
    lifted_factors,
    padded,
    per_layer,
    unpadded_layers,
)
from jaxpeft.tree._node import (
    AdaptedKernel,
    is_node,
    is_traced,
    is_whole,
    leaves_with_path,
    map_nodes,
    nodes,
    wider,
    with_leaves,
    working_dtype,
)
from jaxpeft.tree._places import leaf_specs
from jaxpeft.tree._together import is_several, named_parts, parts_of


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
        return x.replace(base=None, call=None, frozen=dict.fromkeys(x.frozen))

    fixed = lambda node: node.replace(trainable=dict.fromkeys(node.trainable))
    trainable = jax.tree.map(trained, adapted, is_leaf=is_whole)
    return trainable, map_nodes(fixed, adapted)


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
    """Whether ``merge`` is possible: no site's method depends on the input.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        False where a site has a router without fixed gates, or slots.
    """
    free = lambda node: not jax.eval_shape(lifted_factors, node).reads_input
    return all(map(free, nodes(adapted)))


def merge(adapted: PyTree, dtype: Any = None, *, requantise: bool = False) -> PyTree:
    r"""Folds every adapter into its kernel: ``D_c (W + a b) D_o``.

    Computed in float32 (float64 over float64), cast once. Quantised kernels, with an
    adapter or without, are dequantised.

    Args:
        adapted: a tree made by ``attach``.
        dtype: a floating dtype for merged and dequantised kernels; ``None``: that of
            each kernel, or that which a quantised one stands for.
        requantise: whether quantised kernels are quantised again as they were, those
            without an adapter bit for bit. Codes are coarse, so most of a small change
            is lost: a warning says how much.

    Returns:
        A plain parameter tree.

    Raises:
        ValueError: a site's method depends on the input, so that no kernel has its
            effect; a kernel is integers; or ``dtype`` is none of floats, or given
            together with ``requantise``.
    """
    _check_merge(adapted, dtype, requantise)
    scaled = scaled_biases(adapted)
    dtype = None if dtype is None else jnp.dtype(dtype)
    lost: dict[str, float] = {}

    def plain(x):
        if is_quantised(x):
            return x if requantise else x.dequantise(dtype)
        if not is_node(x):
            return x
        if not (requantise and is_quantised(x.base)):
            return _merge_node(x, dtype)
        made, part = _requantised_node(x)
        if not is_traced(part):
            lost[x.site.path] = float(part)
        return made

    merged = jax.tree.map(plain, adapted, is_leaf=is_whole)
    if lost:
        worst = max(lost, key=lost.__getitem__)
        mean = sum(lost.values()) / len(lost)
        warnings.warn(
            f"`requantise`: of what the adapters change, {mean:.0%} is lost to the "
            f"codes (mean of {len(lost)} sites), and at {worst!r} {lost[worst]:.0%}; "
            "write merge(adapted, dtype=jnp.bfloat16) to keep it",
            stacklevel=2,
        )
    if not scaled:
        return merged
    by_path = dict(leaves_with_path(merged))
    scaled = {path: _scale_bias(by_path[path], node) for path, node in scaled.items()}
    return with_leaves(merged, scaled)


_scale_bias = jax.jit(scale_bias)


def _check_merge(adapted: PyTree, dtype: Any, requantise: bool) -> None:
    """Raises what ``merge`` objects to in its arguments."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`dtype` must be a floating dtype, got {jnp.dtype(dtype)}: an adapter "
            "rounded to integers is lost. For codes and scales write "
            "merge(adapted, requantise=True)"
        )
    if dtype is not None and requantise:
        raise ValueError(
            "`dtype` and `requantise` exclude each other: quantised kernels have their "
            "own kind; leave one of the two out"
        )
    for node in nodes(adapted):  # whole ones only
        if not jnp.issubdtype(node.base.dtype, jnp.floating):
            raise ValueError(
                f"site {node.site.path!r} has a kernel of {node.base.dtype} without a "
                "scale, and what an adapter adds would be rounded away; keep a "
                "quantised base as jaxpeft.quantise makes it, or give floats"
            )


@jax.jit
def _requantised_node(node: AdaptedKernel):
    """The merged kernel in its base's codes, and which part of the change is lost."""
    wide = working_dtype(node.base.dtype)
    merged, base = _merge_node(node, wide), node.base.dequantise(wide)
    made = stored_as(merged, node.base)
    moved = jnp.linalg.norm(merged - base)
    off = jnp.linalg.norm(made.dequantise(wide) - merged)
    return made, jnp.minimum(off / jnp.where(moved == 0, jnp.inf, moved), 1)


@functools.partial(jax.jit, static_argnums=1)
def _merge_node(node: AdaptedKernel, dtype: Any):
    bound = bind(with_call(node, key=None))  # in evaluation mode
    if not isinstance(bound, Bound):
        return dense(bound, dtype)
    if bound.reads_input:
        raise ValueError(
            f"site {node.site.path!r}: {node.adapter.name!r} depends on the input, so "
            "no kernel has its effect; keep the adapted tree and call it through "
            "jaxpeft.adapt"
        )
    return materialise(bound, dtype)


def detach(adapted: PyTree) -> PyTree:
    """Drops every adapter.

    Args:
        adapted: a tree made by ``attach``.

    Returns:
        The plain parameter tree with the original kernels, bit for bit. Methods
        that folded something into a kernel give it back to within rounding: of a
        quantised one, to within that of its codes.
    """

    def original(node):
        if node.adapter.folded is None:
            return node.base
        return stored_as(refolded(node, sign=-1.0), node.base)

    nodes(adapted)  # whole ones only
    return map_nodes(original, adapted)


def penalty(adapted: PyTree, seen: Mapping[str, Any] | None = None) -> Array:
    """The methods' own penalties, to be added to the task loss.

    Args:
        adapted: a tree made by ``attach``.
        seen: what gates reported, the second result of ``adapt(fn, taps="own")``: with
            it, the losses of routers are in the sum.

    Returns:
        A float32 scalar (float64 over float64): for each method the sum over its
        sites, or their mean where its ``Penalty`` says so. Each layer of a stack is
        a site, and the padding of layers of unequal rank is never seen.
    """

    def of_leaves(node):
        f = node.adapter.penalty.of_leaves
        return None if f is None else per_layer(node, f)

    total = _over_sites(adapted, of_leaves)
    return total if not seen else total + seen_penalty(adapted, seen)


def seen_penalty(adapted: PyTree, seen: Mapping[str, Any]) -> Array:
    """The part of ``penalty`` that depends on what gates reported.

    It is computed in every micro-batch, and the rest once a step.

    Args:
        adapted: the tree that was run.
        seen: the second result of ``adapt(fn, taps="own")``.

    Returns:
        A scalar, as ``penalty`` does.
    """

    def of_seen(node):  # for each layer and each use of the kernel
        f = node.adapter.penalty.of_seen
        if f is None or node.site.path not in seen:
            return None
        first = {name: x[0] for name, x in layer_leaves(node)[0].items()}
        return jnp.ravel(f(first, seen[node.site.path]))

    return _over_sites(adapted, of_seen)


def _over_sites(
    adapted: PyTree, penalty_of: Callable[[AdaptedKernel], Array | None]
) -> Array:
    """Joins the penalties of sites, for each adapter's name and method by itself."""
    found: dict[tuple[str, str, str], list[Array]] = {}
    for name, part in named_parts(adapted):
        if (x := penalty_of(part)) is not None:
            like = name, part.adapter.name, part.adapter.penalty.joined
            found.setdefault(like, []).append(x)
    result = jnp.zeros((), jnp.float32)
    for (_, _, joined), each in found.items():
        dtype = wider(result.dtype, *(x.dtype for x in each))
        sites = jnp.concatenate([x.astype(dtype) for x in each])
        total = jnp.mean(sites) if joined == "mean" else jnp.sum(sites)
        result = result.astype(dtype) + total
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
    leaves = jax.tree.leaves(adapted, is_leaf=is_whole)
    base = sum(math.prod(x.shape) for x in leaves if hasattr(x, "shape"))
    return trained, base + trained


def trainable_size(node: AdaptedKernel) -> int:
    """Number of trained values at one site, without padding."""
    if is_several(node):
        return sum(map(trainable_size, parts_of(node).values()))
    if not padded(node):
        return sum(math.prod(x.shape) for x in node.trainable.values())
    each = jax.eval_shape(unpadded_layers, node)
    layers = zip(node.site.ranks or (), each, strict=True)
    return sum(
        math.prod(x.shape) for rank, (_, part) in layers if rank for x in part.values()
    )


def inherit_specs(
    adapted: PyTree, specs: PyTree, sizes: Mapping[str, int] | None = None
) -> PyTree:
    """Gives every leaf of an adapted tree the sharding of its kernel.

    Args:
        adapted: a tree made by ``attach``, or its shapes.
        specs: a tree like the plain parameters with a ``PartitionSpec`` per leaf; one
            for a quantised kernel.
        sizes: of the mesh's axes, ``dict(mesh.shape)``: then the scales of a quantised
            kernel are whole along an axis that their number does not divide.

    Returns:
        A tree like ``adapted`` with a ``PartitionSpec`` for each leaf: entries of
        batch, in and out axes carry over, rank axes are replicated.
    """
    is_spec = lambda x: isinstance(x, PartitionSpec)

    own_specs = lambda x, spec: x.specs(spec, sizes) if is_quantised(x) else spec

    def each(node, spec):
        if not is_node(node):
            return own_specs(node, spec)
        along = leaf_specs(node, spec)
        call = jax.tree.map(lambda _: PartitionSpec(), node.call)
        own = node.map_leaves(lambda n, x: None if x is None else along[n])
        return own.replace(base=own_specs(node.base, spec), call=call)

    flat, treedef = jax.tree.flatten(adapted, is_leaf=is_whole)
    flat_specs = jax.tree.leaves(specs, is_leaf=is_spec)
    if len(flat) != len(flat_specs):
        raise ValueError(
            f"`specs` has {len(flat_specs)} leaves, the tree has {len(flat)}; give one "
            "PartitionSpec per parameter"
        )
    return treedef.unflatten(map(each, flat, flat_specs))


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
    missing = sorted(set(names) - set(leaves))
    surplus = sorted(set(leaves) - set(names))
    if missing or surplus:
        raise ValueError(
            f"`leaves` does not fit the tree: missing {missing}, left over {surplus}"
        )
    return jax.tree.structure(like).unflatten([leaves[n] for n in names])
