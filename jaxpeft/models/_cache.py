"""The keys and values of tokens that went before, as a tree of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpeft.models._decoder_config import DecoderConfig
from jaxpeft.models._rope import grows


def init_cache(
    model: Any, batch: int, length: int, dtype: Any = None
) -> dict[str, Any]:
    """Returns an empty cache for a decoder.

    ``logits, cache = model.apply({"params": params}, input_ids, cache=cache)`` writes
    the tokens' keys and values behind those in the cache, and lets the tokens see
    them. So a prompt goes in at once, then one token a call; with an attention mask,
    padded prompts of unequal length do too (padding on the left, and ``positions``
    that start behind it).

    Args:
      model: a decoder, as ``from_config`` or ``load`` returned it.
      batch: rows B.
      length: slots S, for padding, prompt and all that is generated. Logits of tokens
        that are written past the end are NaN.
      dtype: dtype of keys and values; by default the model's.

    Returns:
      ``"index"``, the first free slot, int32; ``"mask"`` [B, S], true at slots that
      hold a token; ``"layers"``, keys and values of each layer [B, S, K, h], or of
      all layers of a scanned stack [L, B, S, K, h].

    Raises:
      ValueError: if ``length`` is more than the model allows (with rope_type
        ``"longrope"``: in its original length), or the model is no decoder.
    """
    config = model.config
    if not isinstance(config, DecoderConfig):
        raise ValueError(
            f"`model` is a {config.model_type!r}, which has no cache; only decoders do."
        )
    if not 0 < length <= room(config):
        raise ValueError(
            f"`length` is {length}; write at least 1 and at most the {room(config)} "
            f"tokens {_reason(config)}."
        )
    dtype = model.dtype if dtype is None else dtype
    layers = config.num_hidden_layers
    shape = (batch, length, config.num_key_value_heads, config.head_dim)

    def one(*lead: int) -> dict[str, Array]:
        return {name: jnp.zeros((*lead, *shape), dtype) for name in ("key", "value")}

    return {
        "index": jnp.zeros((), jnp.int32),
        "mask": jnp.zeros((batch, length), bool),
        "layers": {"layer": one(layers)}
        if model.scan_layers
        else {f"layer_{i}": one() for i in range(layers)},
    }


def room(config: DecoderConfig) -> int:
    """The most slots of a cache.

    Where a longer text has other frequencies, all its tokens have other keys, also
    those in the cache: then a text with a cache stays within the original length.
    """
    originals = [rope.original for _, rope in config.rope if grows(rope)]
    return min([config.max_position_embeddings, *originals])


def _reason(config: DecoderConfig) -> str:
    if room(config) == config.max_position_embeddings:
        return "the model allows"
    return "up to which its rotary positions have one scale (original length)"


def advance(
    cache: dict[str, Any], shape: tuple[int, ...], attention_mask: Any
) -> dict[str, Any]:
    """Marks the slots of new tokens and moves the index behind them."""
    batch, slots = cache["mask"].shape
    if shape[0] != batch or shape[1] > slots:
        raise ValueError(
            f"`input_ids` are {list(shape)}; the `cache` has {batch} rows of {slots} "
            "slots. Make it with models.init_cache(model, batch, length)."
        )
    if attention_mask is None:
        attention_mask = jnp.ones(shape, bool)
    new = jnp.asarray(attention_mask).astype(bool)
    mask = jax.lax.dynamic_update_slice(cache["mask"], new, (0, cache["index"]))
    return {**cache, "index": cache["index"] + shape[1], "mask": mask}


def poison(out: Any, index: Int[Array, ""], tokens: int, slots: int) -> Any:
    """NaN where the tokens did not fit: under ``jit`` nothing can be raised."""
    fits = index + tokens <= slots
    return jax.tree.map(lambda x: jnp.where(fits, x, jnp.nan).astype(x.dtype), out)
