"""The parts of a BERT-like encoder, as Linen modules.

Number by number the function of transformers: erf gelu, the config's LayerNorm
epsilon, two-pass variance, post-norm blocks. Norms and softmax are computed in
float32 whatever ``dtype`` is.

Shapes: B batch, T tokens, D width, H heads, h = D / H, F feed-forward, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.models._config import BertConfig
from jaxpeft.models._parts import (
    ACTIVATIONS,
    REMAT,
    Embedding,
    LayerNorm,
    Part,
    dense,
    keep,
    wide,
)


class Embeddings(Part):
    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "batch tokens"],
        token_type_ids: Int[Array | np.ndarray, "batch tokens"] | None,
        deterministic: bool,
    ) -> Float[Array, "batch tokens d"]:
        config = self.config
        options = (config, self.dtype, self.param_dtype)
        words = Embedding(*options, config.vocab_size, name="word_embeddings")
        types = Embedding(
            *options, config.type_vocab_size, name="token_type_embeddings"
        )
        places = Embedding(
            *options, config.max_position_embeddings, name="position_embeddings"
        )
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)
        x = words(input_ids) + types(token_type_ids)
        x = x + places(_positions(config, input_ids))
        x = LayerNorm(*options, name="LayerNorm")(x)
        return nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(x)


def _positions(
    config: BertConfig, input_ids: Int[Array | np.ndarray, "batch tokens"]
) -> Int[Array, "batch tokens"]:
    batch, tokens = input_ids.shape
    first = config.pad_token_id + 1 if config.model_type == "roberta" else 0
    if tokens + first > config.max_position_embeddings:
        raise ValueError(
            f"`input_ids` have {tokens} tokens; the position table has room for "
            f"{config.max_position_embeddings - first}. Truncate the texts."
        )
    if config.model_type == "roberta":  # padding keeps padding's own position
        real = (jnp.asarray(input_ids) != config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + config.pad_token_id
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], (batch, tokens))


class Encoder(Part):
    scan_layers: bool
    remat: str | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens d"],
        mask: Any,
        deterministic: bool,
        hidden_states: bool,
    ) -> tuple[Float[Array, "batch tokens d"], Any]:
        return run_layers(self, Attention, x, mask, deterministic, hidden_states)


def run_layers(
    module: Any,
    attention: type,
    x: Float[Array, "batch tokens d"],
    shared: Any,
    deterministic: bool,
    hidden_states: bool,
) -> tuple[Float[Array, "batch tokens d"], Any]:
    """Runs the layers as parts of an encoder, one by one or scanned.

    Args:
      module: the encoder; its config, dtypes, ``scan_layers`` and ``remat`` hold.
      attention: the class of their attention.
      x: what the first layer gets.
      shared: what attention gets beside it, the same in all layers.
      deterministic: without dropout.
      hidden_states: whether to return all states.

    Returns:
      The last state, and all states [L + 1, B, T, D] or None.
    """
    layer = _Layer
    if module.remat is not None:
        # Inside a scan the loop itself keeps XLA from undoing the recomputation.
        layer = nn.remat(
            layer, policy=REMAT[module.remat], prevent_cse=not module.scan_layers
        )
    config = module.config
    options = (config, module.dtype, module.param_dtype, attention, deterministic)
    if not module.scan_layers:
        states = [x]
        for i in range(config.num_hidden_layers):
            x, _ = layer(*options, False, name=f"layer_{i}")(x, shared)
            states.append(x)
        return x, jnp.stack(states) if hidden_states else None
    stack = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
    last, states = stack(*options, hidden_states, name="layer")(x, shared)
    if hidden_states:
        states = jnp.concatenate([x[None], states])
    return last, states


class _Layer(Part):
    attention: type
    deterministic: bool
    hidden_states: bool  # whether to return the state a second time, for a scan

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d"], shared: Any) -> Any:
        options = (self.config, self.dtype, self.param_dtype)
        x = self.attention(*options, self.deterministic, name="attention")(x, shared)
        y = _Intermediate(*options, name="intermediate")(x)
        x = Output(*options, self.deterministic, name="output")(y, x)
        return x, x if self.hidden_states else None


class Attention(Part):
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"], mask: Any
    ) -> Float[Array, "batch tokens d"]:
        config = self.config
        heads = config.num_attention_heads
        split = (*x.shape[:-1], heads, config.hidden_size // heads)
        query, key, value = (
            keep(dense(self, config.hidden_size, name)(x)).reshape(split)
            for name in ("query", "key", "value")
        )
        sums = wide(self.dtype)  # bfloat16 products, added up in float32
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=sums)
        scores = scores * split[-1] ** -0.5
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(sums).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = nn.Dropout(
            config.attention_probs_dropout_prob, deterministic=self.deterministic
        )(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return Output(
            config, self.dtype, self.param_dtype, self.deterministic, name="output"
        )(mixed, x)


class _Intermediate(Part):
    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"]
    ) -> Float[Array, "batch tokens f"]:
        x = keep(dense(self, self.config.intermediate_size, "dense")(x))
        return ACTIVATIONS[self.config.hidden_act](x)


class Output(Part):
    """Projection back to the width, dropout, residual, norm."""

    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens f"],
        residual: Float[Array, "batch tokens d"],
    ) -> Float[Array, "batch tokens d"]:
        x = keep(dense(self, self.config.hidden_size, "dense")(x))
        x = nn.Dropout(
            self.config.hidden_dropout_prob, deterministic=self.deterministic
        )(x)
        return LayerNorm(self.config, self.dtype, self.param_dtype, name="LayerNorm")(
            x + residual
        )
