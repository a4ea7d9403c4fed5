"""How an adapter's leaves begin: ``init`` of every layer of a kernel."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxpeft.numerics import dense
from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._lift import (
    dims_of,
    expand_leaf,
    layer_settings,
    leaf_axes,
    matrix_shape,
    site_numbers,
    to_matrices,
)
from jaxpeft.tree._node import Site, is_traced, working_dtype
from jaxpeft.tree._spread import mesh_to_spread, spread_layers
from jaxpeft.tree._terms import BATCH, IN, OUT


def initialise(
    key,
    kernel,
    *,
    adapter: Adapter,
    site: Site,
    alphas=None,
    done: Callable[[int], object] = lambda layers: None,
):
    """Calls ``adapter.init`` for each layer of a kernel.

    Args:
        key: one key for the whole site; each layer gets its own split of it.
        kernel: the base, any number of axes.
        adapter: the method.
        site: the roles of the kernel's axes, and the rank of each layer.
        alphas: alpha of each layer, or ``None``.
        done: is told how many layers are made, each time that some are.

    Returns:
        ``(frozen, trainable)`` with leaves in the layout of ``AdaptedKernel``.
    """
    roles, ranks = site.roles, site.ranks
    layers = matrix_shape(kernel.shape, roles)[0]
    settings = layer_settings(adapter, layers, ranks)
    if alphas is not None:  # as an array: one program serves every alpha
        alphas = jnp.asarray(alphas, working_dtype(kernel.dtype))
    traced = is_traced(kernel)
    static = lambda a: {"adapter": a, "start": a.options.start, "roles": roles}
    most = None if ranks is None else max(ranks)
    where = mesh_to_spread(kernel, adapter, roles, most)
    if where is not None:
        keys = jax.random.split(key, layers) if BATCH in roles else key[None]
        made, places = [], []
        for layer, group in _groups(settings, where.mesh.size):
            own = {"where": where, "rank": layer[1], **static(layer[0])}
            made.append(spread_layers(keys, kernel, alphas, group, **own))
            jax.block_until_ready(made[-1])
            places.append(group)
            done(len(group))
        how = {"adapter": adapter, "roles": roles, "ranks": ranks}
        parts = _joined_groups(made, kernel, places=tuple(places), **how)
    elif BATCH not in roles or (traced and len(set(settings)) == 1):
        parts = _initialise(key, kernel, alphas, ranks=ranks, **static(adapter))
        done(layers)
    else:  # layer by layer: workspace for one, and progress shown
        each, keys = [], jax.random.split(key, layers)
        for i, (method, rank) in enumerate(settings):
            made = {}, {}  # of a layer of rank 0: `_stacked` fills in zeros
            if rank != 0:
                own = keys[i], kernel, i, None if alphas is None else alphas[i]
                made = _one_layer(*own, rank=rank, **static(method))
            each.append(jax.block_until_ready(made))
            done(1)
        parts = _joined(each, kernel, adapter=adapter, roles=roles, ranks=ranks)
    # Outside of the compiled programs, which do not depend on the numbers.
    return parts[0] | site_numbers(adapter, kernel, roles), parts[1]


def _groups(settings: list[tuple], size: int) -> Iterator[tuple[tuple, tuple]]:
    """Layers of one method and rank, so many at a time; not those of rank 0."""
    for setting in dict.fromkeys(settings):
        alike = [i for i, other in enumerate(settings) if other == setting]
        for at in range(0, 0 if setting[1] == 0 else len(alike), size):
            yield setting, tuple(alike[at : at + size])


@functools.partial(
    jax.jit, static_argnames=("adapter", "start", "roles", "ranks"), inline=True
)
def _initialise(key, kernel, alphas, *, adapter: Adapter, start, roles, ranks):
    """All layers in one program: they are of one method and one rank."""
    del start  # adapters that begin differently may be equal: it tells them apart
    matrices = to_matrices(kernel, roles)
    layers = matrices.shape[0]
    method, rank = layer_settings(adapter, layers, ranks)[0]

    def init(args):
        key, matrix, alpha = args
        return method.init(key, dense(matrix, working_dtype(kernel.dtype)), rank, alpha)

    if BATCH not in roles:
        only = jax.tree.map(lambda x: x[0], (matrices, alphas))
        parts = init((key, *only))
        parts = jax.tree.map(lambda x: x[None], parts)  # one layer
    else:  # `map`, not `vmap`: an SVD's workspace is that of one layer at a time
        keys = jax.random.split(key, layers)
        parts = jax.lax.map(init, (keys, matrices, alphas))
    return _in_place(parts, kernel, adapter, roles, ranks)


@functools.partial(jax.jit, static_argnames=("adapter", "start", "roles", "rank"))
def _one_layer(key, kernel, i, alpha, *, adapter: Adapter, start, roles, rank):
    del start  # as above
    matrices = to_matrices(kernel, roles)
    # `i` is traced: layers of one rank share a program.
    of_layer = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
    matrix = dense(jax.tree.map(of_layer, matrices), working_dtype(kernel.dtype))
    return adapter.init(key, matrix, rank, alpha)


@functools.partial(jax.jit, static_argnames=("adapter", "roles", "ranks"))
def _joined(each: list, kernel, *, adapter: Adapter, roles, ranks):
    """The leaves of a stack, from every layer's ``(frozen, trainable)``."""
    return _of_layers(each, kernel, adapter, roles, ranks)


@functools.partial(jax.jit, static_argnames=("places", "adapter", "roles", "ranks"))
def _joined_groups(groups: list, kernel, *, places, adapter: Adapter, roles, ranks):
    """The same from groups of layers, with the places of their layers in the stack."""
    each: list = [({}, {})] * matrix_shape(kernel.shape, roles)[0]
    for made, layers in zip(groups, places, strict=True):
        for at, layer in enumerate(layers):
            each[layer] = jax.tree.map(lambda x, at=at: x[at], made)
    return _of_layers(each, kernel, adapter, roles, ranks)


def _of_layers(each: list, kernel, adapter: Adapter, roles, ranks):
    parts = tuple(map(_stacked, zip(*each, strict=True)))
    return _in_place(parts, kernel, adapter, roles, ranks)


def _in_place(parts, kernel, adapter: Adapter, roles, ranks):
    """Leaves ``[layers, ...]`` in the layout of ``AdaptedKernel``."""
    dims = [dims_of(kernel.shape, roles, role) for role in (BATCH, IN, OUT)]
    axes = leaf_axes(adapter, None if ranks is None else max(ranks))
    return tuple(
        {name: expand_leaf(x, names[name], *dims) for name, x in part.items()}
        for part, names in zip(parts, axes, strict=True)
    )


def _stacked(layers: tuple[dict, ...]) -> dict:
    """Stacks the leaves of layers, padded with zeros to the largest of each.

    A leaf that a layer does not have (one of rank 0 has none) is zeros there.
    """
    stacked = {}
    for name in dict.fromkeys(name for layer in layers for name in layer):
        like = next(layer[name] for layer in layers if name in layer)
        empty = jnp.zeros((0,) * like.ndim, like.dtype)
        each = [layer.get(name, empty) for layer in layers]
        shape = tuple(map(max, zip(*(x.shape for x in each), strict=True)))
        stacked[name] = jnp.stack([_padded_to(x, shape) for x in each])
    return stacked


def _padded_to(x, shape: tuple[int, ...]):
    room = [(0, n - s, 0) for s, n in zip(x.shape, shape, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), room)
