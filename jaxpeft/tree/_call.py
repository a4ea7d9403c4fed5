"""What one call of the adapted function adds to a tree: the one door for it."""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpeft.tree._adapter import Call
from jaxpeft.tree._attach import site_key
from jaxpeft.tree._change import structure_of
from jaxpeft.tree._lift import dims_of
from jaxpeft.tree._node import AdaptedKernel, check_key, map_nodes, nodes
from jaxpeft.tree._terms import BATCH

Kept = types.EllipsisType  # what the tree has already stays


def with_call(
    adapted: PyTree,
    *,
    key: Key[Array, ""] | None | Kept = ...,
    step_key: Key[Array, ""] | None | Kept = ...,
    mask: Any = ...,
    gates: Any = ...,
    rows: Any = ...,
) -> PyTree:
    """Adds what belongs to one call of the adapted function, and not to the adapters.

    Each site is given what its method reads. The entries are no part of an adapter:
    partitions keep them with the frozen half, files and checkpoints leave them out.

    Args:
        adapted: a tree made by ``attach``.
        key: turns dropout on; each site and each layer gets a part of its own. Without
            one a tree is in evaluation mode.
        step_key: for methods that drop entries of their own leaves, with one mask for
            all micro-batches of a step; by default ``key``.
        mask: for methods with experts: 1 for tokens, 0 for padding, of the shape of the
            leading axes of the sites' inputs, mostly ``[batch, length]``. Where it is 0
            an adapter sees 0, and adds nothing, whatever the input holds.
        gates: for methods with experts: ``[batch, N]``, the weight of each expert for
            each row.
        rows: for kernels with slots: ``[batch]``, the slot of each row, see
            ``serving.with_rows``.

    Returns:
        The tree with them. An entry that is not named stays as it was, and ``None``
        takes one off.

    Raises:
        TypeError: a key is not one typed key.

    Note:
        A model that differentiates itself (forces from energies) contracts with a
        kernel in both passes, and each draws a mask of its own.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((4, 6))}}, jax.random.key(0)
        >>> adapted = jp.attach(params, jp.lora(2, dropout=0.1), ["query"], key=key)
        >>> list(jp.with_call(adapted, key=key)["query"]["kernel"].call)
        ['key']
    """
    if step_key is ... and key is not ...:
        step_key = key
    call = Call(key, step_key, mask, gates, rows)._asdict()
    given = {name: x for name, x in call.items() if x is not ...}
    for name in ("key", "step_key"):
        if given.get(name) is not None:
            check_key(given[name])
    nodes(adapted)  # whole ones only

    def add(node):
        found = structure_of(node)
        reads = found.reads | ({"key"} if found.drops else set())
        call = {n: x for n, x in (node.call or {}).items() if n not in given}
        call |= {
            name: _for_layers(node, name, x)
            for name, x in given.items()
            if x is not None and name in reads
        }
        return node.replace(call=call or None)

    return map_nodes(add, adapted)


def _for_layers(node: AdaptedKernel, name: str, x):
    """An entry with a site's batch axes in front: a key for each layer, or copies."""
    batch = dims_of(node.base.shape, node.roles, BATCH)
    if name not in ("key", "step_key"):
        return jnp.broadcast_to(x, batch + x.shape)
    own = site_key(x, node.site.path)
    return jax.random.split(own, batch) if batch else own


def with_dropout(
    adapted: PyTree,
    key: Key[Array, ""],
    *,
    leaves_key: Key[Array, ""] | None = None,
) -> PyTree:
    """Turns dropout on, for one step: ``with_call(adapted, key=, step_key=)``.

    Args:
        adapted: a tree made by ``attach``.
        key: this step's, or micro-batch's.
        leaves_key: ``step_key`` of ``with_call``; ``None``: ``key``.

    Returns:
        The tree with keys where a method has dropout.
    """
    step_key = key if leaves_key is None else leaves_key
    return with_call(adapted, key=key, step_key=step_key)
