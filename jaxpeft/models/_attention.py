"""Who sees whom, and attention itself.

Shapes: B batch, T tokens (queries), S slots (keys), H query heads, K key and value
heads, h size of a head. Query head n attends with key head n // (H / K).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpeft.models._decoder_config import FULL, SLIDING, DecoderConfig
from jaxpeft.models._on_mesh import gather_tokens, keep_part, sequence_size
from jaxpeft.models._parts import wide
from jaxpeft.models._rope import turns
from jaxpeft.models._splash import is_home, obstacle, splash

IMPLEMENTATIONS = (None, "xla", "cudnn", "splash")


class Context(NamedTuple):
    """What all layers of one call share.

    Attributes:
      masks: who sees whom, [B or 1, 1, T, S] for each kind of layer; None where the
        kind alone says so (causal, with its window).
      rope: cosines and sines for each kind of layer; empty for learned positions.
      index: the first slot of the cache that this call fills, or None.
      segments: what the masks say beyond the kind, by a number for each token:
        it sees only those of its own; None where they say more, or nothing.
    """

    masks: dict[str, Bool[Array, "b 1 t s"]] | None
    rope: dict[str, tuple[Array, Array]]
    index: Int[Array, ""] | None
    segments: Int[Array, "b t"] | None = None

    def of(self, kind: str | None, sliding: Any) -> tuple[Any, Any]:
        """The mask and the angles of a layer: of its kind, or, traced, by a flag."""
        if kind is not None:
            return self.masks and self.masks[kind], self.rope.get(kind)
        return tuple(
            jax.tree.map(
                lambda one, other: jnp.where(sliding, one, other),
                table[SLIDING],
                table[FULL],
            )
            if table
            else None
            for table in (self.masks, self.rope)
        )


def make_context(
    config: DecoderConfig,
    positions: Int[Array, "#batch tokens"],
    attention_mask: Shaped[Array | np.ndarray, "batch slots"] | None,
    segment_ids: Int[Array | np.ndarray, "batch tokens"] | None,
    *,
    index: Int[Array, ""] | None = None,
    slots: int | None = None,
    explicit: bool = False,
) -> Context:
    """Returns masks and angles for one call.

    A token sees itself and those before it; in sliding layers only the last
    ``sliding_window`` of them. It sees no padding and no other segment.

    Args:
      config: sizes and constants.
      positions: of the tokens, for their angles; order is that of the slots.
      attention_mask: 1 at tokens, 0 at padding, for all slots; None: no padding.
      segment_ids: of packed texts; None: one text a row.
      index: the first slot of these tokens; None: 0, and there are no other slots.
      slots: number of slots; by default that of the tokens.
      explicit: whether to make masks although the kinds of layers say all.
    """
    kinds = sorted(set(config.layer_types))
    rope = dict(config.rope)
    shared = FULL if rope and rope[FULL] == rope[SLIDING] else None
    made = {kind: turns(rope[kind], positions) for kind in kinds if rope and not shared}
    if shared:
        made = dict.fromkeys(kinds, turns(rope[shared], positions))
    if not (explicit or index is not None) and attention_mask is segment_ids is None:
        return Context(None, made, index)
    tokens = positions.shape[1]
    query = jnp.arange(tokens)[None, None, :, None]
    query = query if index is None else query + index
    key = jnp.arange(slots or tokens)[None, None, None, :]
    seen = key <= query
    if attention_mask is not None:
        seen = seen & jnp.asarray(attention_mask).astype(bool)[:, None, None, :]
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    masks = {FULL: seen}
    if SLIDING in kinds:
        masks[SLIDING] = seen & (key > query - config.sliding_window)
    segments = None
    if index is None and not explicit:
        segments = _segments(attention_mask, segment_ids)
    return Context({kind: masks[kind] for kind in kinds}, made, index, segments)


def _segments(attention_mask: Any, segment_ids: Any) -> Int[Array, "b t"]:
    """A number for each token; padding is on its own, whatever segment it is in."""
    if segment_ids is None:
        return jnp.asarray(attention_mask).astype(bool).astype(jnp.int32)
    ids = jnp.asarray(segment_ids).astype(jnp.int32)
    if attention_mask is None:
        return ids
    real = jnp.asarray(attention_mask).astype(bool)
    return jnp.where(real, ids, jnp.min(ids) - 1)


def attend(
    query: Float[Array, "batch tokens heads h"],
    key: Float[Array, "batch slots groups h"],
    value: Float[Array, "batch slots groups h"],
    mask: Bool[Array, "#batch 1 tokens slots"] | None,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    dropout: Any = None,
    implementation: str | None = None,
    segments: Int[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch tokens heads h"]:
    r"""Returns causal attention; scores and softmax in float32 at least.

    .. math:: \mathrm{softmax}(c \tanh(s\, Q K^T / c)) V

    Args:
      query: queries.
      key: keys.
      value: values.
      mask: who sees whom; None: all before, within ``window``.
      scale: s.
      window: tokens that are seen where there is no mask; None: all.
      cap: c; None: without tanh.
      dropout: a function of the probabilities, or None.
      implementation: of ``jax.nn.dot_product_attention``, which has no caps, no
        dropout and no float64; with those the program below runs. Or ``"splash"``;
        None takes that on a TPU where nothing stands against it.
      segments: what ``mask`` says within ``window``, as a number for each token.
    """
    if implementation == "splash" or (implementation is None and is_home(query)):
        reason = obstacle(query, mask, segments, dropout)
        if reason is None:
            return splash(
                query, key, value, segments, scale=scale, window=window, cap=cap
            )
        if implementation == "splash":
            raise ValueError(
                f"`attention` is 'splash', which {reason}; write attention=None, "
                "which takes it where it can be."
            )
    if implementation == "cudnn" and (parts := sequence_size()) > 1:
        raise ValueError(
            "`attention` is 'cudnn', which takes whole rows, and the mesh has "
            f"sequence={parts}; write attention='xla', or sequence=1."
        )
    query, key, value = keep_part(query), gather_tokens(key), gather_tokens(value)
    if cap is None and dropout is None and wide(query.dtype) == jnp.float32:
        # It asks JAX which dtype bfloat16 and float32 make; what it does is strict.
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=scale,
                is_causal=mask is None,
                local_window_size=_left(window) if mask is None else None,
                implementation=implementation,
            )
    if implementation == "cudnn":
        raise ValueError(
            "`attention` is 'cudnn', which has no soft caps, dropout and float64; "
            "write attention=None."
        )
    batch, tokens, heads, size = query.shape
    slots, groups = key.shape[1:3]
    if mask is None:
        place = jnp.arange(tokens)[:, None] - jnp.arange(slots)[None]
        near = place >= 0 if window is None else (place >= 0) & (place < window)
        mask = near[None, None]
    sums = wide(query.dtype)
    query = query.reshape(batch, tokens, groups, heads // groups, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=sums)
    scores = scores * scale
    if cap is not None:
        scores = jnp.tanh(scores / cap) * cap
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(sums).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights if dropout is None else dropout(weights)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return mixed.reshape(batch, tokens, heads, size)


def _left(window: int | None) -> tuple[int, int] | None:
    return None if window is None else (window - 1, 0)


def fill(
    cache: dict[str, Array], index: Int[Array, ""], key: Array, value: Array
) -> dict[str, Array]:
    """Writes keys and values into a layer's cache, from slot ``index`` on."""
    at = (0, index, 0, 0)
    return {
        name: jax.lax.dynamic_update_slice(
            cache[name], new.astype(cache[name].dtype), at
        )
        for name, new in (("key", key), ("value", value))
    }
