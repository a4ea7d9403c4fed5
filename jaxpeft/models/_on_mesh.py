"""What a model cuts by hand on the mesh in context: tables, and the tokens of rows.

The compiler lays out a step by itself; these are the places where it would hold more
than it has to. They act under a mesh with the axes of ``training.make_mesh``
(``training.apply_model`` puts it in context), and elsewhere do nothing.

Of a table ``[V, D]``, as ``training.param_specs`` has it, a device holds the rows of a
part of the vocabulary (the tensor axis) and of these a part of the width (fsdp).

Tokens are cut over the axis ``sequence``, where the mesh has it, from the look-up to
the loss. A query then meets keys and values of all tokens, which are gathered, and all
else is done token by token. Parameters are whole along this axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxpeft import numerics

FSDP, DATA, SEQUENCE, TENSOR = "fsdp", "data", "sequence", "tensor"
ROWS = (FSDP, DATA)  # which cut rows, in the order of training's batches


class Cut(NamedTuple):
    """How arrays ``[rows, tokens, ...]`` are cut.

    Attributes:
      mesh: in context.
      tokens: axes that cut the tokens everywhere.
      between: axes that cut them between layers, where the tensor axis does, too.
    """

    mesh: Any
    tokens: tuple[str, ...]
    between: tuple[str, ...]

    def divides(self, axis: str, size: int) -> bool:
        """Whether an axis of the mesh cuts so many."""
        return self.mesh.shape[axis] > 1 and size % self.mesh.shape[axis] == 0


def find_cut(rows: int, tokens: int, *arrays: Any) -> Cut | None:
    """Returns how rows of tokens are cut; None where there is no such mesh.

    Args:
      rows: their number.
      tokens: of a row.
      *arrays: what is to be cut; with none of it traced there is no program to lay out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        return None
    if mesh.empty or mesh.size == 1 or not {*ROWS, TENSOR} <= set(mesh.axis_names):
        return None
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    if rows % (mesh.shape[FSDP] * mesh.shape[DATA]):
        return None
    cut = Cut(mesh, (), ())
    if sequence_size() > 1 and cut.divides(SEQUENCE, tokens):
        cut = cut._replace(tokens=(SEQUENCE,), between=(SEQUENCE,))
        tokens //= mesh.shape[SEQUENCE]
    if cut.divides(TENSOR, tokens):
        cut = cut._replace(between=(*cut.between, TENSOR))
    return cut


def sequence_size() -> int:
    """Returns over how many devices the mesh in context cuts the tokens of a row."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(SEQUENCE, 1)


# Between layers the tensor axis cuts hidden states along their tokens; inside of what
# it cuts along heads or hidden units it sees all tokens (arXiv 2205.05198, g and g-bar
# of figure 5). Left alone the compiler may gather kernels in place of tokens.


def cut_tokens(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """Cuts hidden states between layers along their tokens.

    What is done token by token, norms and sums, is then done once, and what a layer
    keeps for the backward pass is as much smaller.
    """
    cut = _token_cut(x)
    return x if cut is None else _constrained(x, cut, _rows(cut.between))


def enter(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """All tokens, in front of kernels cut along their outputs; gradients are cut.

    All are those of a device's part of the sequence.
    """
    cut = _token_cut(x)
    if cut is None:
        return x
    return _turned(cut, _rows(cut.tokens), _rows(cut.between), x)


def leave(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """Cut tokens, behind kernels cut along their inputs; gradients are of all."""
    cut = _token_cut(x)
    if cut is None:
        return x
    return _turned(cut, _rows(cut.between), _rows(cut.tokens), x)


def keep_part(query: Float[Array, "batch tokens heads h"]) -> Array:
    """Queries stay where their tokens are."""
    cut = find_cut(*query.shape[:2], query)
    if cut is None or not cut.tokens:
        return query
    return _constrained(query, cut, _rows(cut.tokens, free=1))


def gather_tokens(key: Float[Array, "batch tokens groups h"]) -> Array:
    """Keys or values of all tokens; their gradients go back to where these are."""
    cut = find_cut(*key.shape[:2], key)
    if cut is None or not cut.tokens:
        return key
    return _turned(cut, _rows((), free=1), _rows(cut.tokens, free=1), key)


def _rows(tokens: tuple[str, ...], *, free: int = 0) -> PartitionSpec:
    """Of ``[rows, tokens, .., d]``; of axes between the compiler decides."""
    between = (PartitionSpec.UNCONSTRAINED,) * free
    return PartitionSpec(ROWS, tokens or None, *between, None)


def _token_cut(x: Array) -> Cut | None:
    cut = find_cut(*x.shape[:2], x)
    return cut if cut is not None and cut.between else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _turned(cut: Cut, here: PartitionSpec, back: PartitionSpec, x: Array) -> Array:
    """Laid out one way, and its gradient another."""
    del back
    return _constrained(x, cut, here)


_turned.defvjp(
    lambda cut, here, back, x: (_constrained(x, cut, here), None),
    lambda cut, here, back, _, dy: (_constrained(dy, cut, back),),
)


def look_up(
    table: Float[Array, "rows d"], ids: Int[Array | np.ndarray, "*batch"]
) -> Float[Array, "*batch d"]:
    """Returns rows of a table by their numbers, NaN for one that is not there.

    Nobody holds the whole table: each device takes, for the rows of all that share its
    part of the batch, what it has of their tokens; that is added up over the
    vocabulary, and its width put together where the rows are.
    """
    cut = find_cut(*ids.shape, ids, table) if ids.ndim == 2 else None
    count, width = table.shape
    words = cut is not None and cut.divides(TENSOR, count)
    parts = cut is not None and cut.divides(FSDP, width)
    if not (words or parts):
        return jnp.take(table, ids, axis=0)

    def local(table: Array, ids: Array) -> Array:
        if parts:
            ids = lax.all_gather(ids, FSDP, axis=0, tiled=True)
        if not words:
            found = jnp.take(table, ids, axis=0)
        else:
            ids = jnp.where(ids < 0, ids + count, ids)  # as `take` has it
            place = ids - lax.axis_index(TENSOR) * len(table)
            found = jnp.take(table, place, axis=0, mode="clip")
            here = (place >= 0) & (place < len(table))
            known = (ids >= 0) & (ids < count)
            empty = jnp.where(known, 0.0, jnp.nan).astype(found.dtype)
            found = jnp.where(here[..., None], found, empty[..., None])
            if TENSOR in cut.between:
                found = lax.psum_scatter(found, TENSOR, scatter_dimension=1, tiled=True)
            else:
                found = lax.psum(found, TENSOR)
        if parts:
            found = lax.all_to_all(found, FSDP, split_axis=0, concat_axis=2, tiled=True)
        return found

    return jax.shard_map(
        local,
        mesh=cut.mesh,
        in_specs=(
            PartitionSpec(TENSOR if words else None, FSDP if parts else None),
            PartitionSpec(ROWS, (cut.tokens if words else cut.between) or None),
        ),
        out_specs=_rows(cut.between),
    )(table, ids)


def token_losses(
    read_out: Callable[[Array, Array], Array],
    table: Array,
    axis: int,
    hidden: Float[Array, "batch tokens d"],
    targets: Int[Array, "batch tokens"],
    *,
    chunk: int,
) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
    """``numerics.token_cross_entropy``, the vocabulary cut over the tensor axis.

    The table is put together along its width once, and no logit leaves its device.

    Args:
      read_out: ``(table, hidden) -> logits``, of a part of the vocabulary as well.
      table: of the output head.
      axis: of the table, its vocabulary.
      hidden: last hidden states.
      targets: ids to be predicted.
      chunk: the most tokens that a device reads out at a time.
    """
    cut = find_cut(*targets.shape, hidden, table)
    if cut is None:
        one = lambda h: read_out(table, h)
        return numerics.token_cross_entropy(one, hidden, targets, chunk=chunk)
    words = cut.divides(TENSOR, table.shape[axis])
    places = [None, None]
    places[axis] = TENSOR if words else None
    # Before the loop over chunks, and before the backward pass takes it up again.
    table = _constrained(table, cut, PartitionSpec(*places))
    # A vocabulary that nothing divides is whole everywhere: then tokens are cut.
    tokens = cut.tokens if words else cut.between
    rows = PartitionSpec(ROWS, tokens or None)
    own = [name for name in (*ROWS, *tokens) if cut.mesh.shape[name] > 1]

    def local(table: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        table = _varying(table, own)  # its gradient is added up once
        return numerics.token_cross_entropy(
            lambda h: read_out(table, h),
            hidden,
            targets,
            chunk=chunk,
            mesh_axis=TENSOR if words else None,
        )

    return jax.shard_map(
        local,
        mesh=cut.mesh,
        in_specs=(PartitionSpec(*places), PartitionSpec(*rows, None), rows),
        out_specs=(rows, rows),
    )(table, hidden, targets)


def _constrained(x: Array, cut: Cut, spec: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(x, NamedSharding(cut.mesh, spec))


def _varying(x: Array, names: list[str]) -> Array:
    """Marks an array as one that differs along axes of the mesh."""
    if not names:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, tuple(names), to="varying")
    return lax.pvary(x, tuple(names))  # jax 0.7
