"""Flash attention on TPUs: Pallas' splash attention, which never holds the scores.

It skips blocks that nobody sees, so a causal mask costs half and a window its own
width; packed texts and padding are told apart by segments.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxpeft.models._on_mesh import ROWS, TENSOR
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
    tokens = query.shape[1]
    if dropout is not None:
        return "has no dropout of probabilities"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16, not {query.dtype.name}"
    if mask is not None and segments is None:
        return (
            "has no mask for a cache, nor for windows that alternate in a scanned stack"
        )
    if tokens % BLOCKS[-1]:
        return f"needs a multiple of {BLOCKS[-1]} tokens, not {tokens}"
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
    device takes its own rows (axes ``data`` and ``fsdp``) and heads (``tensor``).

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
    one = lambda q, k, v, ids: _kernel(q, k, v, ids, window, cap)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {name for name, kind in kinds.items() if kind != AxisType.Manual}
    if not free:
        return one(query, key, value, segments)
    rows = _fitting([name for name in ROWS if name in free], query.shape[0], mesh)
    heads = _fitting([name for name in (TENSOR,) if name in free], key.shape[2], mesh)
    four = PartitionSpec(rows, None, heads, None)
    ids = None if segments is None else PartitionSpec(rows, None)
    return jax.shard_map(
        one,
        in_specs=(four, four, four, ids),
        out_specs=four,
        axis_names=free,
        check_vma=False,
    )(query, key, value, segments)


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


def _kernel(query, key, value, segments, window, cap) -> Array:
    # Slow to import, and of no use elsewhere.
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    tokens, heads = query.shape[1:3]
    mask: Any = pallas.CausalMask((tokens, tokens))
    if window is not None:
        mask = pallas.LocalMask((tokens, tokens), (window - 1, 0), 0)
    block = next(size for size in BLOCKS if tokens % size == 0)
    # Pallas mixes ints and floats, ranks too; what it does is strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attend = pallas.make_splash_mha_single_device(
            pallas.MultiHeadMask([mask] * heads),
            block_sizes=pallas.BlockSizes(*(block,) * 8),
            attn_logits_soft_cap=cap,
        )
        parts = [x.swapaxes(1, 2) for x in (query, key, value)]
        if segments is None:
            mixed = jax.vmap(attend)(*parts)
        else:
            ids = pallas.SegmentIds(segments, segments)
            mixed = jax.vmap(attend)(*parts, ids)
    return mixed.swapaxes(1, 2)
