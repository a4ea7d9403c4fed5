"""The parts of a BERT or RoBERTa encoder, as Linen modules.

Number by number the function of transformers: erf gelu, the config's LayerNorm
epsilon, two-pass variance, post-norm blocks. Norms and softmax are computed in
float32 whatever ``dtype`` is.

Shapes: B batch, T tokens, D width, H heads, h = D / H, F feed-forward, L layers.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxpeft.models._config import BertConfig

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # erf, as in the paper's code
    "gelu_new": nn.gelu,  # tanh form
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}

# Which values of a layer's forward pass remain for its backward pass.
_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any]] = {
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_saveable,
    "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
    "names": _POLICIES.save_only_these_names("projection"),
}


def dense(module: Any, features: int, name: str) -> nn.Dense:
    """A projection in the dtypes of ``module``, initialised as transformers does."""
    return nn.Dense(
        features,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        name=name,
    )


def wide(dtype: Any) -> Any:
    """Float32, or the dtype itself if that is wider."""
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32


def at_least_float32(x: Array) -> Array:
    return x.astype(wide(x.dtype))


class Part(nn.Module):
    """What every part is built from."""

    config: BertConfig
    dtype: Any
    param_dtype: Any


class LayerNorm(Part):
    # nn.LayerNorm mixes dtypes when x or the scale is bfloat16; this one never does.
    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        y = at_least_float32(x)
        centred = y - y.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        row = (1,) * (x.ndim - 1) + shape
        scale, bias = (v.reshape(row).astype(y.dtype) for v in (scale, bias))
        return (normal * scale + bias).astype(self.dtype)


class _Embedding(Part):
    rows: int

    @nn.compact
    def __call__(
        self, ids: Int[Array | np.ndarray, "*batch"]
    ) -> Float[Array, "*batch d"]:
        table = self.param(
            "embedding",
            nn.initializers.normal(self.config.initializer_range),
            (self.rows, self.config.hidden_size),
            self.param_dtype,
        )
        return jnp.take(table, ids, axis=0).astype(self.dtype)


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
        words = _Embedding(*options, config.vocab_size, name="word_embeddings")
        types = _Embedding(
            *options, config.type_vocab_size, name="token_type_embeddings"
        )
        places = _Embedding(
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
        layer = _Layer
        if self.remat is not None:
            # Inside a scan the loop itself keeps XLA from undoing the recomputation.
            layer = nn.remat(
                layer, policy=REMAT[self.remat], prevent_cse=not self.scan_layers
            )
        options = (self.config, self.dtype, self.param_dtype, deterministic)
        if not self.scan_layers:
            states = [x]
            for i in range(self.config.num_hidden_layers):
                x, _ = layer(*options, False, name=f"layer_{i}")(x, mask)
                states.append(x)
            return x, jnp.stack(states) if hidden_states else None
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.config.num_hidden_layers,
        )
        last, states = stack(*options, hidden_states, name="layer")(x, mask)
        if hidden_states:
            states = jnp.concatenate([x[None], states])
        return last, states


class _Layer(Part):
    deterministic: bool
    hidden_states: bool  # whether to return the state a second time, for a scan

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d"], mask: Any) -> Any:
        options = (self.config, self.dtype, self.param_dtype)
        x = _Attention(*options, self.deterministic, name="attention")(x, mask)
        y = _Intermediate(*options, name="intermediate")(x)
        x = _Output(*options, self.deterministic, name="output")(y, x)
        return x, x if self.hidden_states else None


class _Attention(Part):
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"], mask: Any
    ) -> Float[Array, "batch tokens d"]:
        config = self.config
        heads = config.num_attention_heads
        split = (*x.shape[:-1], heads, config.hidden_size // heads)
        query, key, value = (
            _keep(dense(self, config.hidden_size, name)(x)).reshape(split)
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
        return _Output(
            config, self.dtype, self.param_dtype, self.deterministic, name="output"
        )(mixed, x)


class _Intermediate(Part):
    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"]
    ) -> Float[Array, "batch tokens f"]:
        x = _keep(dense(self, self.config.intermediate_size, "dense")(x))
        return _ACTIVATIONS[self.config.hidden_act](x)


class _Output(Part):
    """Projection back to the width, dropout, residual, norm."""

    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens f"],
        residual: Float[Array, "batch tokens d"],
    ) -> Float[Array, "batch tokens d"]:
        x = _keep(dense(self, self.config.hidden_size, "dense")(x))
        x = nn.Dropout(
            self.config.hidden_dropout_prob, deterministic=self.deterministic
        )(x)
        return LayerNorm(self.config, self.dtype, self.param_dtype, name="LayerNorm")(
            x + residual
        )


def _keep(x: Array) -> Array:
    """Names a projection's result, for ``remat="names"``."""
    return checkpoint_name(x, "projection")
