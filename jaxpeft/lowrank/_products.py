"""The low-rank change that an adapter makes to each layer of a kernel."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpeft.numerics import dense
from jaxpeft.tree import (
    IN,
    OUT,
    AdaptedKernel,
    Adapter,
    change,
    gathered,
    layer_leaves,
    leaf_axes,
    number_leaves,
    padded,
    shared_names,
    structure,
    structure_of,
    to_matrices,
    unpadded_layers,
    working_dtype,
)


@functools.cache
def is_plain(adapter: Adapter) -> bool:
    """Whether a method is ``W + scale a b`` with trained ``a`` and ``b``, no more."""
    if adapter.where.leaf != "kernel" or adapter.folded or adapter.shared:
        return False
    frozen, trainable = leaf_axes(adapter, adapter.where.rank)
    return frozen == {"scale": ()} and trainable == {"a": (IN, None), "b": (None, OUT)}


@functools.cache
def strength_leaf(adapter: Adapter) -> str | None:
    """The name of a leaf that the change of a kernel is a multiple of; ``None``: none.

    It is the scale, or of a method without one the only up-projection, if doubling it
    doubles the change; a small kernel is tried.
    """
    if is_plain(adapter):
        return "scale"
    where = adapter.where
    alone = not (adapter.folded or adapter.shared or where.layers)
    if where.leaf != "kernel" or where.rank is None or not alone:
        return None
    if not structure(adapter, where.rank).only_adds:
        return None
    frozen_axes, axes = leaf_axes(adapter, where.rank)
    ups = [name for name, each in axes.items() if each[-1:] == (OUT,)]
    leaf = "scale" if "scale" in frozen_axes else ups[0] if len(ups) == 1 else None
    with jax.ensure_compile_time_eval():
        kernel = jax.random.normal(jax.random.key(0), (4 * where.rank, 6 * where.rank))
        frozen, trainable = adapter.init(
            jax.random.key(1), kernel, where.rank, where.alpha
        )
        frozen |= number_leaves(adapter, kernel.dtype)
        trainable = {name: x + 0.1 for name, x in trainable.items()}

        def total(times):
            scaled = lambda part: part | {n: times * part[n] for n in part if n == leaf}
            terms = change(adapter, kernel, scaled(frozen), scaled(trainable)).terms
            return sum(jnp.matmul(t.a, t.b, precision="highest") for t in terms)

        doubles = jnp.allclose(total(2), 2 * total(1), rtol=1e-4)
    return leaf if doubles else None


def not_low_rank(node: AdaptedKernel) -> str:
    """Says why a kernel's change is no product of thin factors; "": it is one."""
    found = structure_of(node)
    where = f"{node.site.path!r}: {node.adapter.name!r}"
    if found.reads_input or "gates" in (node.call or {}):
        return f"{where} depends on the input, so its change is no matrix"
    if found.factors.kernel is not None or node.adapter.where.leaf != "kernel":
        return f"{where} trains the leaf itself, not a low-rank change of it; {_LEAVE}"
    if found.scales:
        return f"{where} scales the kernel, so its change has full rank; {_LEAVE}"
    return ""


_LEAVE = (
    "leave the site out: jaxpeft.graft(params, {path: node for path, node in "
    "jaxpeft.extract(adapted).items() if ...})"
)


def _product_of(node: AdaptedKernel):
    """``(kernel, frozen, trainable) -> (a, b, scale)``, of one layer of a site.

    The product is what the layer's adapter changes of the original kernel.
    """
    adapter, dtype = node.adapter, working_dtype(node.base.dtype)
    shared = {name: node.frozen[name] for name in shared_names(adapter)}

    def product(kernel, frozen, trainable):
        # Where factors are joined, a plain method's scale is spread over both of them.
        if is_plain(adapter):
            parts = trainable["a"], trainable["b"], frozen["scale"]
        else:
            terms = change(adapter, dense(kernel), frozen | shared, trainable).terms
            a = jnp.concatenate([term.a for term in terms], 1)
            b = jnp.concatenate([term.b for term in terms], 0)
            parts = a, b, jnp.ones(())
        return tuple(x.astype(dtype) for x in parts)

    return product


def layer_products(nodes: Sequence[AdaptedKernel]) -> list[list[tuple]]:
    """The products of several adapters of one kernel, as groups of layers.

    Without padding all layers are one group. With it each layer is a group of its own.

    Args:
        nodes: each adapter's node, none of which ``not_low_rank`` objects to.

    Returns:
        The groups, in the order of layers; of each group for each adapter ``(a [layers,
        d_in, r_i], b [layers, r_i, d_out], scale [layers])``.
    """
    nodes = [_nameless(node) for node in nodes]
    if not any(padded(node) for node in nodes):
        return [[_stacked(node) for node in nodes]]
    return [list(each) for each in zip(*map(_apart, nodes), strict=True)]


def _nameless(node: AdaptedKernel) -> AdaptedKernel:
    """The node without its name, so that sites of one shape share a compiled program.

    On an explicit mesh its leaves, which are thin, are gathered. The kernel is gathered
    only where several of its axes become one.
    """
    joins = node.roles.count(IN) > 1 or node.roles.count(OUT) > 1
    return node.replace(
        base=gathered(node.base) if joins else node.base,
        frozen={name: gathered(x) for name, x in node.frozen.items()},
        trainable={name: gathered(x) for name, x in node.trainable.items()},
        call=None,
        site=dataclasses.replace(node.site, path="", pattern=""),
    )


@jax.jit  # a kernel that no factor depends on is not read
def _stacked(node: AdaptedKernel):
    matrices = to_matrices(node.base, node.roles)
    return jax.vmap(_product_of(node))(matrices, *layer_leaves(node))


@jax.jit
def _apart(node: AdaptedKernel) -> list[tuple]:
    """One layer at a time, without the padding of unequal ranks."""
    if not padded(node):
        whole = _stacked(node)
        count = len(whole[0])
        return [tuple(x[i : i + 1] for x in whole) for i in range(count)]
    matrices, product = to_matrices(node.base, node.roles), _product_of(node)
    of_layer = lambda i: jax.tree.map(lambda x: x[i], matrices)
    return [
        tuple(x[None] for x in product(of_layer(i), *leaves))
        for i, leaves in enumerate(unpadded_layers(node))
    ]
