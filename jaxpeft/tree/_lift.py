"""From one two-dimensional kernel to kernels with more axes, and to stacks.

A method's functions see ``kernel [d_in, d_out]``. Here its leaves get the kernel's
own in and out axes in place of ``d_in`` and ``d_out`` and its batch axes in front,
and layers of unequal rank are padded with zeros to a common shape.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.numerics import dense, is_quantised
from jaxpeft.tree._adapter import Adapter, Call, rebuild
from jaxpeft.tree._node import AdaptedKernel, working_dtype
from jaxpeft.tree._terms import BATCH, IN, OUT, Factors, map_axes

# [d_in, d_out] that no real kernel has. `init` is traced on an abstract kernel of this
# shape, and an axis of a leaf that is as long as d_in is d_in; so with d_out. Small
# numbers and powers of two divide both, for methods with groups or blocks.
_EVEN = 2**10 * 3**2 * 5 * 7
PROBE = 11 * _EVEN, 13 * _EVEN


def axes_of(roles: tuple[str, ...], role: str) -> tuple[int, ...]:
    """Positions of the axes with a role."""
    return tuple(i for i, r in enumerate(roles) if r == role)


def dims_of(shape: tuple[int, ...], roles: tuple[str, ...], role: str):
    """Sizes of the axes with a role."""
    return tuple(shape[i] for i in axes_of(roles, role))


def matrix_shape(shape: tuple[int, ...], roles: tuple[str, ...]):
    """``(number of layers, d_in, d_out)`` of a kernel."""
    return tuple(math.prod(dims_of(shape, roles, role)) for role in (BATCH, IN, OUT))


def _order(roles: tuple[str, ...]) -> tuple[int, ...]:
    """A kernel's axes, batch first, then in, then out."""
    return sum((axes_of(roles, role) for role in (BATCH, IN, OUT)), ())


def to_matrices(kernel, roles: tuple[str, ...]):
    """A kernel as ``[layers, d_in, d_out]``."""
    return kernel.transpose(_order(roles)).reshape(matrix_shape(kernel.shape, roles))


def from_matrices(matrices, shape: tuple[int, ...], roles: tuple[str, ...]):
    """The inverse of ``to_matrices``."""
    order = _order(roles)
    inverse = tuple(order.index(i) for i in range(len(order)))
    return matrices.reshape(tuple(shape[i] for i in order)).transpose(inverse)


@functools.cache
def leaf_axes(adapter: Adapter, rank: int | None):
    """Which axes of the leaves of one two-dimensional kernel are in or out axes.

    Returns:
        ``(frozen, trainable)``: two dicts from a leaf's name to a tuple with
        ``"in"``, ``"out"`` or ``None`` for each axis. ``None`` is any other axis:
        mostly the rank, but also experts, or a tuple of numbers.
    """
    shapes = init_shapes(adapter, *PROBE, rank, jnp.dtype(jnp.float32))
    label = dict(zip(PROBE, (IN, OUT), strict=True))
    return tuple(
        {name: tuple(label.get(d) for d in leaf.shape) for name, leaf in part.items()}
        for part in shapes
    )


@functools.cache
def shared_names(adapter: Adapter) -> tuple[str, ...]:
    """Names of the frozen leaves that all sites of an adapter have in common."""
    return tuple(shared_shapes(adapter, adapter.where.rank))


def shared_shapes(adapter: Adapter, rank: int | None) -> dict:
    """Shapes of the leaves that sites share, beside a kernel of the shape ``PROBE``."""
    shared = adapter.shared
    if shared is None:
        return {}
    probe = lambda key: shared(key, *PROBE, rank, jnp.dtype(jnp.float32))
    return jax.eval_shape(lambda: probe(jax.random.key(0)))


@functools.cache
def init_shapes(adapter: Adapter, d_in: int, d_out: int, rank, dtype):
    """Shapes of one layer's ``(frozen, trainable)``, by an abstract trace.

    At rank 0 they are those of rank 1 whose axes that are neither in nor out have
    size 0.
    """
    if rank == 0:  # which no method is asked for

        def empty(x, roles):
            sizes = zip(x.shape, roles, strict=True)
            shape = tuple(0 if role is None else size for size, role in sizes)
            return jax.ShapeDtypeStruct(shape, x.dtype)

        parts = init_shapes(adapter, d_in, d_out, 1, dtype)
        return tuple(
            {name: empty(x, axes[name]) for name, x in part.items()}
            for part, axes in zip(parts, leaf_axes(adapter, 1), strict=True)
        )

    def init(kernel):
        # Shapes do not depend on alpha, so the method's own serves for every site.
        key, alpha = jax.random.key(0), adapter.where.alpha
        frozen, trainable = adapter.init(key, kernel, rank=rank, alpha=alpha)
        return frozen | number_leaves(adapter, dtype), trainable

    return jax.eval_shape(init, jax.ShapeDtypeStruct((d_in, d_out), dtype))


def number_leaves(adapter: Adapter, dtype) -> dict:
    """The numbers of a method that are leaves, for one layer."""
    given = {name: adapter.options[name] for name in adapter.options.numbers}
    # One that is exactly 0 has no leaf: what it weighs is left out of the program.
    there = {n: v for n, v in given.items() if v is not None and np.any(v)}
    return {name: jnp.asarray(value, dtype) for name, value in there.items()}


def site_numbers(adapter: Adapter, kernel, roles: tuple[str, ...]) -> dict:
    """The numbers of a method that are leaves, for a kernel with its batch axes."""
    batch = dims_of(kernel.shape, roles, BATCH)
    each = number_leaves(adapter, working_dtype(kernel.dtype))
    return {name: jnp.broadcast_to(x, batch + x.shape) for name, x in each.items()}


def expand_leaf(leaf, axes, batch, in_dims, out_dims):
    """A leaf ``[layers, ...]`` in the layout of ``AdaptedKernel``.

    Layers become the kernel's batch axes, ``d_in`` its in axes, ``d_out`` its out axes.
    """
    shape = list(batch)
    # The last axes are the method's own; the one in front of them is the layers'.
    for size, role in zip(leaf.shape[leaf.ndim - len(axes) :], axes, strict=True):
        shape += {IN: in_dims, OUT: out_dims}.get(role, (size,))
    return leaf.reshape(tuple(shape))


def _flatten(leaf, axes, roles, layers=True):
    """The inverse of ``expand_leaf``: ``[layers, ...]`` with d_in and d_out.

    Without ``layers`` (a kernel without batch axes) the first axis is left out.
    """
    counts = {r: len(axes_of(roles, r)) for r in (BATCH, IN, OUT)}
    shape, at = [], counts[BATCH]  # `at`: the next axis of the leaf to be read
    if layers:
        shape.append(math.prod(leaf.shape[:at]))
    for role in axes:
        width = counts.get(role, 1)
        shape.append(math.prod(leaf.shape[at : at + width]))
        at += width
    # A reshape to the same shape is an equation all the same where there are no axes.
    return leaf.reshape(tuple(shape)) if leaf.shape != tuple(shape) else leaf


def leaf_entries(node: AdaptedKernel) -> dict[str, tuple]:
    """For each leaf, the axis of the kernel that each of its axes follows.

    Returns:
        ``{leaf name: (kernel axis or None, ...)}``; ``None`` for all other axes.
    """
    roles = node.roles
    where = {r: axes_of(roles, r) for r in (BATCH, IN, OUT)}
    entries = {"base": tuple(range(len(roles)))}
    for names in leaf_axes(node.adapter, node.site.rank):
        for name, axes in names.items():
            own = (where.get(role, (None,)) for role in axes)
            entries[name] = sum(own, where[BATCH])
    for name in shared_names(node.adapter):
        if name in node.frozen:
            entries[name] = (None,) * node.frozen[name].ndim
    return entries


def layer_leaves(node: AdaptedKernel, layers: bool = True):
    """The node's ``(frozen, trainable)`` with one leading axis of layers.

    Leaves that sites share are not among them. Without ``layers`` see ``_flatten``.
    """
    axes = leaf_axes(node.adapter, node.site.rank)
    return tuple(
        {
            name: _flatten(x, names[name], node.roles, layers)
            for name, x in part.items()
            if name in names  # shared leaves have no layers
        }
        for part, names in zip((node.frozen, node.trainable), axes, strict=True)
    )


def layer_call(node: AdaptedKernel, layers: bool = True) -> Call:
    """What a call added to the node, with one leading axis of layers."""
    batch = len(axes_of(node.roles, BATCH))
    own = lambda x: _flatten(x, (None,) * (x.ndim - batch), node.roles, layers)
    return Call(**{name: own(x) for name, x in (node.call or {}).items()})


def layer_methods(adapter: Adapter, layers: int) -> tuple[Adapter, ...]:
    """The method of each layer of a stack: one, unless its layers differ."""
    if adapter.where.layers is None:
        return (adapter,) * layers
    return tuple(rebuild(adapter, **its) for its in adapter.where.layers(layers))


def layer_settings(adapter: Adapter, layers: int, ranks) -> list[tuple]:
    """``(method, rank)`` of each layer; rank ``None`` for methods without one."""
    methods = layer_methods(adapter, layers)
    return list(zip(methods, ranks or (None,) * layers, strict=True))


def padded(node: AdaptedKernel) -> bool:
    """Whether leaves hold padding: layers have unequal ranks, or differ otherwise.

    At a site with several adapters it says no: ask each part of ``parts_of``.
    """
    ranks = node.site.ranks
    return bool(ranks) and len(set(layer_settings(node.adapter, len(ranks), ranks))) > 1


def unpadded_layers(node: AdaptedKernel) -> list[tuple[dict, dict]]:
    """Each layer's own ``(frozen, trainable)``, two-dimensional, without padding."""
    parts = layer_leaves(node)
    layers, d_in, d_out = matrix_shape(node.base.shape, node.roles)
    ranks = node.site.ranks or ()
    # A slice of a stack, or stacked adapters: the ranks are those of all layers.
    if layers != len(ranks):
        raise ValueError(
            f"site {node.site.path!r} was attached to {len(ranks)} layers of "
            f"unequal sizes and now has {layers}: which ones they are is not known. "
            "Take penalties and counts of the whole stack."
        )
    result, settings = [], layer_settings(node.adapter, layers, ranks)
    for i, (adapter, rank) in enumerate(settings):
        shapes = init_shapes(adapter, d_in, d_out, rank, jnp.dtype(jnp.float32))
        # Padding is at the end of each axis, so a layer's own part is the corner.
        frozen, trainable = (
            {n: p[n][i][tuple(slice(s) for s in x.shape)] for n, x in like.items()}
            for p, like in zip(parts, shapes, strict=True)
        )
        result.append((frozen, trainable))
    return result


def per_layer(node: AdaptedKernel, f):
    """Calls ``f(frozen, trainable)`` for each layer; stacks the results on axis 0.

    Layers of rank 0 are left out, and ``f`` never sees padding.
    """
    if padded(node):
        each = zip(node.site.ranks or (), unpadded_layers(node), strict=True)
        each = [f(*leaves) for rank, leaves in each if rank]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)
    return jax.vmap(f)(*layer_leaves(node))


@functools.cache
def reads_kernel(adapter: Adapter, rank: int | None) -> bool:
    """Whether a method's factors depend on the entries of its kernel."""
    dtype = jnp.dtype(jnp.float32)
    frozen, trainable = init_shapes(adapter, *PROBE, rank, dtype)
    frozen = frozen | shared_shapes(adapter, rank)

    def made(kernel, *leaves):
        return jax.tree.leaves(adapter.factors(kernel, *leaves, Call()))

    kernel = jax.ShapeDtypeStruct(PROBE, dtype)
    jaxpr = jax.make_jaxpr(made)(kernel, frozen, trainable).jaxpr
    used = [*jaxpr.outvars, *(v for eqn in jaxpr.eqns for v in eqn.invars)]
    return any(v is jaxpr.invars[0] for v in used)


def per_layer_factors(node: AdaptedKernel) -> Factors:
    """``adapter.factors`` of each layer, stacked; of one kernel without a layer axis.

    Padding goes in as well: it is 0 in both factors, and adds 0.
    """
    shared = {name: node.frozen[name] for name in shared_names(node.adapter)}
    quantised = is_quantised(node.base)
    entries = lambda kernel: kernel
    if quantised:
        entries = dense
        if not (reads := reads_kernel(node.adapter, node.site.rank)):
            entries = lambda kernel: jnp.zeros(kernel.shape, kernel.dtype)

    def of_layer(kernel, frozen, trainable, call):
        return node.adapter.factors(entries(kernel), frozen | shared, trainable, call)

    factors, each = of_layer, jax.vmap(of_layer)
    if quantised and reads:
        # Layer by layer, and again in the backward pass: no stack of floats is made.
        factors = jax.checkpoint(of_layer)
        each = lambda *args: jax.lax.map(lambda own: factors(*own), args)
    if BATCH in node.roles:
        matrices = to_matrices(node.base, node.roles)
        return each(matrices, *layer_leaves(node), layer_call(node))
    # Nothing to map over: a plain kernel and its leaves go in without a reshape.
    sides = matrix_shape(node.base.shape, node.roles)[1:]
    matrix = node.base.transpose(_order(node.roles)).reshape(sides)
    return factors(matrix, *layer_leaves(node, False), layer_call(node, False))


def lifted_factors(node: AdaptedKernel) -> Factors:
    """The node's factors with the kernel's own axes.

    ``a [*batch, *in, r]``, ``b [*batch, r, *out]``, and so on, as the fields declare.
    """
    roles, shape = node.roles, node.base.shape
    batch, in_dims, out_dims = (dims_of(shape, roles, r) for r in (BATCH, IN, OUT))
    flat, layers = per_layer_factors(node), BATCH in roles

    def expand(x, axes):
        more = x.ndim - layers - len(axes)  # axes of its own behind the declared ones
        return expand_leaf(x, (*axes, *(None,) * more), batch, in_dims, out_dims)

    kernel = flat.kernel  # apart from the rest: its axes may be in any order
    if kernel is not None:
        kernel = from_matrices(kernel, shape, roles).astype(node.base.dtype)
    lifted = map_axes(expand, dataclasses.replace(flat, kernel=None))
    return dataclasses.replace(lifted, kernel=kernel)
