"""Leaves of a checkpoint that become codes and scales while they are read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxpeft.models._families import Source
from jaxpeft.numerics import Quantised, stored_as


def make_quantised(
    make: Callable[..., jax.Array],
    like: Quantised,
    handles: Any,
    tensors: tuple[Any, ...],
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    place: Sharding | None,
) -> Quantised:
    """Reads a leaf as codes and scales; of a stack, one layer of floats is there.

    Args:
      make: reads a leaf of floats; the other arguments are its own.
      like: the result's shapes.
      handles: open files.
      tensors: the tensors of ``source``, in its order.
      source: where the leaf lies.
      shape: of the leaf.
      dtype: that the codes stand for.
      place: of the codes; scales lie along them.
    """
    like, where = like.astype(dtype), _places(like, place)
    if not (source.stacked and is_layerwise(place)):
        whole = make(handles, tensors, source, shape, dtype, place)
        return _stored(whole, like, where)
    within = jax.tree.map(_without_layers, where)
    first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    empty = lambda x, at: jnp.zeros(x.shape, x.dtype, device=at)
    one, layer_like = source._replace(stacked=False), jax.tree.map(first, like)
    stack = jax.tree.map(empty, like, where)
    for i, tensor in enumerate(tensors):
        own = handles, (tensor,), one, shape[1:], dtype, within.codes
        layer = _stored(make(*own), layer_like, within)
        written = lambda x, y, at, i=i: putter(at)(x, y, i)
        stack = jax.tree.map(written, stack, layer, where)
        jax.block_until_ready(stack)
    return stack


def _places(like: Quantised, place: Sharding | None) -> Quantised:
    """Where codes and scale lie."""
    if isinstance(place, NamedSharding):
        specs = like.specs(place.spec, dict(place.mesh.shape))
        is_spec = lambda x: isinstance(x, PartitionSpec)
        at = lambda spec: NamedSharding(place.mesh, spec)
        return jax.tree.map(at, specs, is_leaf=is_spec)
    return like.replace(codes=place, scale=place)


def _without_layers(place: NamedSharding) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))


def _stored(floats: jax.Array, like: Quantised, where: Quantised) -> Quantised:
    """The codes and scale of an array, which is given up for them."""
    made = stored_as(floats, like)
    if where.codes is not None:
        made = jax.device_put(made, where)
    made = jax.block_until_ready(made)
    floats.delete()  # now, not when the runtime comes to it
    return made


def is_layerwise(place: Sharding | None) -> bool:
    """Whether every device holds a part of every layer of a stack."""
    if isinstance(place, NamedSharding):
        return not place.spec or place.spec[0] is None
    return place is None


@functools.lru_cache
def putter(place: NamedSharding | None) -> Any:
    """A program that writes one layer into a stack, in place."""
    return jax.jit(
        lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0),
        donate_argnums=0,
        out_shardings=place,
    )
