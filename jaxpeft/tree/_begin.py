"""How an adapter's leaves begin: ``init`` of every layer of a kernel."""

import functools

import jax
import jax.numpy as jnp

from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._lift import (
    dims_of,
    expand_leaf,
    layer_methods,
    leaf_axes,
    number_leaves,
    to_matrices,
)
from jaxpeft.tree._node import working_dtype
from jaxpeft.tree._terms import BATCH, IN, OUT


class _Start:
    """An adapter that equals another if both begin with the same leaves.

    ``Adapter`` itself does not compare the options that only ``init`` reads, but a
    compiled ``init`` has them inside.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.key = adapter.options.start if adapter.name else id(adapter)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Start) and self.key == other.key


def initialise(key, kernel, *, adapter: Adapter, roles, ranks, alphas):
    """Calls ``adapter.init`` for each layer of a kernel.

    Args:
        key: one key for the whole site; each layer gets its own split of it.
        kernel: the base, any number of axes.
        adapter: the method.
        roles: the roles of the kernel's axes.
        ranks: rank of each layer, or ``None``.
        alphas: alpha of each layer, or ``None``.

    Returns:
        ``(frozen, trainable)`` with leaves in the layout of ``AdaptedKernel``.
    """
    if alphas is not None:  # as an array: one program serves every alpha
        alphas = jnp.asarray(alphas, working_dtype(kernel.dtype))
    start = _Start(adapter)
    parts = _initialise(key, kernel, alphas, start=start, roles=roles, ranks=ranks)
    return with_number_leaves(parts, kernel, adapter, roles)


def with_number_leaves(parts, kernel, adapter: Adapter, roles):
    """A site's ``(frozen, trainable)`` with the method's numbers among the frozen."""
    # Outside of the compiled program, which does not depend on the numbers.
    numbers = number_leaves(adapter, working_dtype(kernel.dtype))
    batch = dims_of(kernel.shape, roles, BATCH)
    spread = {n: jnp.broadcast_to(x, batch + x.shape) for n, x in numbers.items()}
    return parts[0] | spread, parts[1]


@functools.partial(jax.jit, static_argnames=("start", "roles", "ranks"), inline=True)
def _initialise(key, kernel, alphas, *, start: _Start, roles, ranks):
    matrices = to_matrices(kernel, roles)
    layers = matrices.shape[0]
    settings = layer_settings(start.adapter, layers, ranks)
    alphas = [None] * layers if alphas is None else alphas

    def init(key, matrix, alpha, setting):
        method, rank = setting
        if rank == 0:
            return {}, {}  # `_stacked` fills in zeros
        matrix = matrix.astype(working_dtype(kernel.dtype))
        return method.init(key, matrix, rank, alpha)

    if BATCH not in roles:
        parts = init(key, matrices[0], alphas[0], settings[0])
        parts = jax.tree.map(lambda x: x[None], parts)  # one layer
    else:
        keys = jax.random.split(key, layers)
        if len(set(settings)) == 1:
            # `map`, not `vmap`: an SVD's workspace is that of one layer at a time.
            own = None if isinstance(alphas, list) else alphas
            each = lambda args: init(*args, settings[0])
            parts = jax.lax.map(each, (keys, matrices, own))
        else:  # leaves of several shapes, so one after another
            each = [
                init(keys[i], matrices[i], alphas[i], settings[i])
                for i in range(layers)
            ]
            parts = _stacked_parts(each)
    return _in_place(parts, kernel, start.adapter, roles, ranks)


def layer_settings(adapter: Adapter, layers: int, ranks) -> list[tuple]:
    """``(method, rank)`` of each layer; rank ``None`` for methods without one."""
    methods = layer_methods(adapter, layers)
    return list(zip(methods, ranks or (None,) * layers, strict=True))


def initialise_layer(key, kernel, i, *, adapter: Adapter, roles, rank, alpha):
    """Calls ``adapter.init`` for layer ``i`` of a stack: ``(frozen, trainable)``."""
    if rank == 0:
        return {}, {}
    if alpha is not None:
        alpha = jnp.asarray(alpha, working_dtype(kernel.dtype))
    start = _Start(adapter)
    return _one_layer(key, kernel, i, alpha, start=start, roles=roles, rank=rank)


@functools.partial(jax.jit, static_argnames=("start", "roles", "rank"))
def _one_layer(key, kernel, i, alpha, *, start: _Start, roles, rank):
    matrices = to_matrices(kernel, roles)
    # `i` is traced: layers of one rank share a program.
    matrix = jax.lax.dynamic_index_in_dim(matrices, i, 0, keepdims=False)
    matrix = matrix.astype(working_dtype(kernel.dtype))
    return start.adapter.init(key, matrix, rank, alpha)


@functools.partial(jax.jit, static_argnames=("adapter", "roles", "ranks"))
def joined_layers(each: list, kernel, *, adapter: Adapter, roles, ranks):
    """What ``initialise`` returns, from every layer's ``(frozen, trainable)``."""
    return _in_place(_stacked_parts(each), kernel, adapter, roles, ranks)


def _stacked_parts(each: list[tuple[dict, dict]]) -> tuple[dict, dict]:
    frozen, trainable = zip(*each, strict=True)
    return _stacked(frozen), _stacked(trainable)


def _in_place(parts, kernel, adapter: Adapter, roles, ranks):
    """Leaves ``[layers, ...]`` in the layout of ``AdaptedKernel``."""
    batch, in_dims, out_dims = (
        dims_of(kernel.shape, roles, role) for role in (BATCH, IN, OUT)
    )
    axes = leaf_axes(adapter, None if ranks is None else max(ranks))
    return tuple(
        {
            name: expand_leaf(x, names[name], batch, in_dims, out_dims)
            for name, x in p.items()
        }
        for p, names in zip(parts, axes, strict=True)
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
        shape = tuple(
            max(sizes) for sizes in zip(*(x.shape for x in each), strict=True)
        )
        stacked[name] = jnp.stack([_padded_to(x, shape) for x in each])
    return stacked


def _padded_to(x, shape: tuple[int, ...]):
    if x.shape == shape:
        return x
    widths = [(0, n - s) for s, n in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, widths)
