"""Flash attention on TPUs: Pallas' splash attention, which never holds the scores.

It skips blocks that nobody sees, so a causal mask costs half and a window its own
width; packed texts and padding are told apart by segments.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpeft.models._on_mesh import ROWS, SEQUENCE, TENSOR, sequence_size
from jaxpeft.numerics import target_of

BLOCKS = (512, 256, 128)  # tokens of a tile; the largest that divides is taken


def obstacle(
    query: Array, mask: Array | None, segments: Array | None, dropout: Any
) -> str | None:
    """Why splash attention cannot do this; None where it can.

    Args:
      query: queries.
      mask: who sees whom; None: all before.
      segments: what says the same by a number for each token, or None.
      dropout: of the probabilities, or None.
    """
    tokens, parts = query.shape[1], sequence_size()
    if dropout is not None:
        return "has no dropout of probabilities"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {query.dtype.name}"
    if mask is not None and segments is None:
        return (
            "has no mask for a cache, nor for windows that alternate in a scanned stack"
        )
    if tokens % (BLOCKS[-1] * parts):
        each = f" for each of sequence={parts}" if parts > 1 else ""
        return f"needs a multiple of {BLOCKS[-1]} tokens{each}, not {tokens}"
    return None


def is_home(query: Array) -> bool:
    """Whether it is chosen unasked: for a TPU, one or those of the mesh in context."""
    if target_of(query) != "tpu":
        return False
    # A kernel is not cut by the compiler; with several devices we need their mesh.
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty


def splash(
    query: Float[Array, "batch tokens heads h"],
    key: Float[Array, "batch tokens groups h"],
    value: Float[Array, "batch tokens groups h"],
    segments: Int[Array, "batch tokens"] | None,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Float[Array, "batch tokens heads h"]:
    """Returns causal attention within segments; scores and softmax in float32.

    Under a mesh in context (``jax.set_mesh``, ``training.apply_model``) each
    device takes its own rows (axes ``data`` and ``fsdp``), heads (``tensor``) and
    queries (``sequence``), these with the keys and values of all tokens.

    Args:
      query: queries.
      key: keys.
      value: values.
      segments: a token sees only its own segment; None: one segment a row.
      scale: what scores are multiplied by.
      window: tokens that are seen, itself included; None: all before.
      cap: bound of scores by tanh; None: without.
    """
    query = query * jnp.asarray(scale, query.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    fit = lambda names, size: _fitting([n for n in names if n in free], size, mesh)
    batch, tokens, heads, _ = query.shape
    rows, parted = fit(ROWS, batch), fit((TENSOR,), key.shape[2])
    cut = SEQUENCE if SEQUENCE in free and mesh.shape[SEQUENCE] > 1 else None
    shards = mesh.shape[cut] if cut else 1
    heads //= mesh.shape[TENSOR] if parted else 1
    kernel = _kernel(tokens, heads, window, cap, shards)
    if not free:
        return _run(kernel, query, key, value, segments, None)
    four, ids = PartitionSpec(rows, cut, parted, None), PartitionSpec(rows, cut)
    where = NamedSharding(mesh, PartitionSpec(None, cut))
    return jax.shard_map(
        functools.partial(_run, cut=cut),
        in_specs=(
            kernel.manual_sharding_spec(where),
            *(four, four, four),
            None if segments is None else ids,
        ),
        out_specs=four,
        axis_names=free,
        check_vma=False,
    )(kernel, query, key, value, segments)


def _fitting(names: Sequence[str], size: int, mesh: Any) -> tuple[str, ...] | None:
    """The axes that together divide ``size``; from the first on, as many as do."""
    while names:
        count = 1
        for name in names:
            count *= mesh.shape[name]
        if size % count == 0:
            return tuple(names)
        names = names[:-1]
    return None


def _kernel(
    tokens: int, heads: int, window: int | None, cap: float | None, shards: int
) -> Any:
    """The kernel of a device's heads, a tree of what it skips; queries have shards."""
    # Slow to import, and of no use elsewhere.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    mask: Any = pallas.CausalMask((tokens, tokens))
    if window is not None:
        mask = pallas.LocalMask((tokens, tokens), (window - 1, 0), 0)
    block = next(size for size in BLOCKS if tokens % (size * shards) == 0)
    with _as_pallas():
        return pallas.make_splash_mha(
            pallas.MultiHeadMask([mask] * heads),
            block_sizes=pallas.BlockSizes(*(block,) * 8),
            attn_logits_soft_cap=cap,
            head_shards=1,
            q_seq_shards=shards,
        )


def _run(kernel, query, key, value, segments, cut: str | None) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    seen = segments
    if cut is not None:  # gradients are added up over the axis, each for its owner
        gather = lambda x: lax.all_gather(x, cut, axis=1, tiled=True)
        key, value = gather(key), gather(value)
        seen = None if segments is None else gather(segments)
    parts = [x.swapaxes(1, 2) for x in (query, key, value)]
    with _as_pallas():
        if segments is None:
            mixed = jax.vmap(kernel)(*parts)
        else:
            ids = pallas.SegmentIds(segments, seen)
            mixed = jax.vmap(kernel)(*parts, ids)
    return mixed.swapaxes(1, 2)


@contextlib.contextmanager
def _as_pallas() -> Iterator[None]:
    """Pallas mixes ints and floats, ranks too; what it does is strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
