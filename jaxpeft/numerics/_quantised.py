"""Arrays of low precision: integer codes and scales in the place of floats.

An array of 8 or 4 bits an entry that has the shape and the floating dtype of what it
stands for. The codes have the array's axes, and so has the scale: along each axis it
has an entry for every block of codes, so what moves one moves the other.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jax.sharding import PartitionSpec

from jaxpeft.numerics._codes import (
    KINDS,
    axis_groups,
    bits_of,
    blocks_of,
    coded,
    looked_up,
    wide_of,
)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    r"""An array as codes and scales: ``value = table[code] * scale`` of its block.

    A pytree with two leaves. Shape and dtype are those of the array that it stands for,
    and a model is traced with these: ``jaxpeft.adapt`` runs it on a tree that holds
    some, and dequantises inside of each contraction. Nothing else computes with one:
    ``dequantise()`` gives an array. ``jaxpeft.quantise`` makes them.

    Attributes:
        codes: integers of the array's shape.
        scale: as many axes; along an axis of n entries it has n / block of them, so 1
            where all of the axis has one scale.
        kind: ``"int8"``, ``"int4"`` or ``"nf4"``. Static.
        dtype: the floating dtype of what it stands for. Static.
        roles: ``"batch"``, ``"in"`` or ``"out"`` of its last axes, as a kernel; static.
            A slice takes leading axes off, and the last ones stay right.

    Example:
        >>> import jaxpeft as jp
        >>> kernel = jp.quantise(jnp.ones((128, 6)), "nf4")
        >>> kernel.shape, kernel.dtype, kernel.codes.dtype, kernel.scale.shape
        ((128, 6), dtype('float32'), dtype(uint4), (2, 6))
        >>> float(kernel.dequantise()[0, 0])
        1.0

    References:
        Dettmers et al., QLoRA, arXiv 2305.14314.
    """

    codes: Any
    scale: Any
    kind: str
    dtype: Any
    roles: tuple[str, ...] = ()

    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey  # which Orbax and others know
        children = (key("codes"), self.codes), (key("scale"), self.scale)
        return children, (self.kind, self.dtype, self.roles)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    def replace(self, **changes) -> "Quantised":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    shape = property(lambda self: tuple(self.codes.shape))
    ndim = property(lambda self: len(self.codes.shape))
    size = property(lambda self: math.prod(self.codes.shape))
    sharding = property(lambda self: self.codes.sharding)

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many entries have one scale, along each axis."""
        sides = zip(self.shape, self.scale.shape, strict=True)
        return tuple(n // max(s, 1) for n, s in sides)

    @property
    def nbytes(self) -> int:
        """What codes and scale take, two codes of 4 bits in a byte."""
        own = math.prod(self.scale.shape) * jnp.dtype(self.scale.dtype).itemsize
        return self.size * bits_of(self.codes.dtype) // 8 + own

    def devices(self):
        """The devices that hold it."""
        return self.codes.devices()

    def dequantise(self, dtype: Any = None) -> jax.Array:
        """The array, computed in float32 (float64 for that) and rounded once.

        Args:
            dtype: a floating dtype; ``None`` for its own.
        """
        dtype = jnp.dtype(dtype or self.dtype)
        wide = wide_of(dtype)
        table = KINDS[self.kind].table
        if table is None:
            values = self.codes.astype(wide)
        else:
            values = looked_up(self.codes, table, wide)
        scale = self.scale.astype(wide)
        for axis, (n, block) in enumerate(zip(self.shape, self.blocks, strict=True)):
            if 1 < block < n:
                scale = _repeated(scale, axis, block)
        return (values * scale).astype(dtype)

    def astype(self, dtype: Any) -> "Quantised":
        """The same codes, which stand for an array of another floating dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`dtype` must be a floating dtype, got {jnp.dtype(dtype)}: a "
                "quantised array stands for floats; write x.dequantise().astype(dtype)"
            )
        return self.replace(dtype=jnp.dtype(dtype))

    # Moves: of codes and scale alike.

    def transpose(self, permutation: Sequence[int]) -> "Quantised":
        """Permutes the axes."""
        roles = self.roles and tuple(self.roles[i] for i in permutation)
        codes, scale = (x.transpose(permutation) for x in (self.codes, self.scale))
        return self.replace(codes=codes, scale=scale, roles=roles)

    def reshape(self, shape: Sequence[int]) -> "Quantised":
        """Splits or joins axes. Where that cuts blocks, scales are repeated."""
        q, sizes = self, []
        for old, new in axis_groups(self.shape, tuple(shape)):
            finest = _common_block(q, old, [shape[i] for i in new])
            q, kept = _cut_to(q, old, finest), finest
            each = []
            for i in reversed(new):
                block = math.gcd(kept, shape[i])
                kept //= block
                each.append(shape[i] // block)
            sizes += reversed(each)
        codes, scale = q.codes.reshape(tuple(shape)), q.scale.reshape(tuple(sizes))
        return q.replace(codes=codes, scale=scale, roles=())

    def along(self, axis: int, f: Callable[[Any, int], Any]) -> "Quantised":
        """Applies ``f(array, position)``, which takes entries along one axis."""
        fine = self.refined(axis, 1)
        codes, scale = f(self.codes, axis), f(fine.scale, axis)
        return self.replace(codes=codes, scale=scale, roles=())

    def broadcast(self, shape: Sequence[int]) -> "Quantised":
        """Repeats it along axes of size one."""
        repeated = zip(self.shape, self.scale.shape, shape, strict=True)
        sizes = tuple(s if n == now else 1 for n, s, now in repeated)
        scale = jnp.broadcast_to(self.scale, sizes)
        return self.replace(codes=jnp.broadcast_to(self.codes, shape), scale=scale)

    def scaled(self, factor: Any, f: Callable[[Any, Any], Any]) -> "Quantised":
        """Applies a linear ``f(array, factor)``; the factor has the array's axes."""
        fine = self
        for axis, n in enumerate(factor.shape):
            fine = fine.refined(axis, 1) if n > 1 else fine
        wide = wide_of(self.scale.dtype)
        return fine.replace(scale=f(fine.scale.astype(wide), factor.astype(wide)))

    def refined(self, axis: int, block: int) -> "Quantised":
        """The same, with scales for blocks of at most this many entries on an axis."""
        now = self.blocks[axis]
        finer = math.gcd(now, block)
        if finer == now:
            return self
        return self.replace(scale=_repeated(self.scale, axis, now // finer))

    def divided(self, parts: Sequence[int]) -> "Quantised":
        """The same, with blocks that divide over so many parts along each axis."""
        q = self
        for axis, count in enumerate(parts):
            if 1 < q.scale.shape[axis] and q.scale.shape[axis] % count:
                q = q.refined(axis, q.shape[axis] // count)
        return q

    def specs(
        self, spec: PartitionSpec, sizes: Mapping[str, int] | None = None
    ) -> "Quantised":
        """The ``PartitionSpec`` of codes and scale, where the array has ``spec``.

        Args:
            spec: the array's.
            sizes: of the mesh's axes; with them the scale is whole along an axis whose
                blocks do not divide over the devices.

        Returns:
            A ``Quantised`` that holds specs.
        """
        entries = (*spec, *(None,) * (self.ndim - len(spec)))

        def fits(entry, n: int) -> bool:
            names = entry if isinstance(entry, tuple) else (entry,)
            parts = math.prod((sizes or {}).get(name, 1) for name in names)
            return n > 1 and n % parts == 0

        sides = zip(entries, self.scale.shape, strict=True)
        own = PartitionSpec(*(e if e and fits(e, n) else None for e, n in sides))
        return self.replace(codes=spec, scale=own)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):
            return f"Quantised({self.kind}, codes={self.codes}, scale={self.scale})"
        return f"Quantised({self.kind}, {list(self.shape)}, {self.dtype})"

    def __array__(self, *args, **kwargs):
        raise TypeError(_NO_ARRAY)

    def __jax_array__(self):
        raise TypeError(_NO_ARRAY)


_NO_ARRAY = (
    "a Quantised kernel is no array: call the model through "
    "jaxpeft.adapt(model.apply), which runs it on a tree that holds some, or write "
    "kernel.dequantise()"
)


def _to_state(q: Quantised) -> dict[str, Any]:
    return {n: serialization.to_state_dict(getattr(q, n)) for n in ("codes", "scale")}


def _from_state(q: Quantised, state: dict[str, Any]) -> Quantised:
    return q.replace(**state)


serialization.register_serialization_state(Quantised, _to_state, _from_state)


def is_quantised(x: Any) -> bool:
    """Whether ``x`` is a ``Quantised`` array."""
    return isinstance(x, Quantised)


def dense(x: Any, dtype: Any = None) -> Any:
    """An array as it is, or cast; a ``Quantised`` one dequantised."""
    if isinstance(x, Quantised):
        return x.dequantise(dtype)
    return x if dtype is None else x.astype(dtype)


def stored_as(x: jax.Array, like: Any) -> Any:
    """An array as ``like`` keeps its own: cast to its dtype, or quantised as it is."""
    if not isinstance(like, Quantised):
        return x.astype(like.dtype)
    codes, scale = coded(x, like.kind, like.blocks)
    return like.replace(codes=codes, scale=scale)


def _repeated(scale, axis: int, times: int):
    """Each entry along an axis ``times`` times, as a broadcast that XLA can fuse."""
    shape = scale.shape
    wide = jnp.expand_dims(scale, axis + 1)
    wide = jnp.broadcast_to(wide, (*shape[: axis + 1], times, *shape[axis + 1 :]))
    return wide.reshape(*shape[:axis], shape[axis] * times, *shape[axis + 1 :])


def _common_block(q: Quantised, axes: Sequence[int], sizes: Sequence[int]) -> int:
    """How many entries in a row have one scale, in the old axes and in the new ones."""
    blocks, run = q.blocks, 1
    for i in reversed(axes):
        run *= blocks[i]
        if blocks[i] != q.shape[i]:
            break
    # In the new axes a block is a part of the last axis, or that and more whole ones.
    whole = 1
    for n in reversed(sizes):
        if run % (whole * n):
            return whole * math.gcd(run // whole, n) if run % whole == 0 else 1
        whole *= n
    return whole


def _cut_to(q: Quantised, axes: Sequence[int], block: int) -> Quantised:
    """Scales for blocks of this many entries in a row of some axes."""
    for i in reversed(axes):
        own = math.gcd(block, q.shape[i])
        q, block = q.refined(i, own), block // own
    return q


def codes_of(
    x: Any, kind: str, axes: Sequence[int], group: int, roles: tuple[str, ...] = ()
) -> Quantised:
    """Quantises an array.

    Args:
        x: a floating array.
        kind: a key of ``KINDS``.
        axes: over which entries share scales: all of them together, or in groups along
            the last of them.
        group: entries of a group.
        roles: what the result keeps.

    Returns:
        The nearest codes of each block, whose largest entry decides its scale.

    Raises:
        ValueError: the axes hold no group, or groups do not divide them.
    """
    blocks = blocks_of(x.shape, kind, tuple(axes), group)
    codes, scale = coded(x, kind, blocks)
    return Quantised(codes, scale, kind, jnp.dtype(x.dtype), roles)
