"""DeBERTa-v2 and v3 (arXiv 2006.03654, 2111.09543) as a Linen module.

A score is the sum of content with content, content with distance (c2p) and distance
with content (p2c); distances beyond a bound share logarithmic buckets.

Shapes: B batch, T tokens, D width, H heads, h = D / H, L layers, 2 S rows of the table
of distances.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxpeft.models._deberta_config import DebertaConfig, write_deberta_config
from jaxpeft.models._families import deberta_names
from jaxpeft.models._layers import Output, run_layers
from jaxpeft.models._names import ModuleName
from jaxpeft.models._parts import (
    ACTIVATIONS,
    REMAT,
    Embedding,
    LayerNorm,
    Part,
    at_least_float32,
    check_known,
    dense,
    keep,
    wide,
)

HEADS = (None, "classification", "regression")


class Deberta(nn.Module):
    """A DeBERTa-v2 or v3 encoder, with or without a head.

    Build it with ``models.from_config`` or ``models.load``. Its parameters are
    ``embeddings/...``, ``encoder/rel_embeddings/embedding``,
    ``encoder/layer_{i}/attention/query_proj/kernel`` and so on (scanned:
    ``encoder/layer/...`` with a leading axis of length L), then ``pooler/dense`` and
    ``classifier``. No published checkpoint has the last two: train both.

    Attributes:
      config: sizes and constants.
      head: None, ``"classification"`` or ``"regression"``.
      num_labels: width of the head; 1 for regression.
      dtype: dtype of activations and matmuls.
      param_dtype: dtype of parameters drawn by ``init``.
      scan_layers: whether the layers are one scanned stack.
      remat: None, or what a layer keeps for its backward pass; see ``Bert``.
    """

    config: DebertaConfig
    head: str | None = None
    num_labels: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str | None = None

    def __post_init__(self) -> None:
        """Refuses unknown names."""
        check_known(head=(self.head, HEADS), remat=(self.remat, (None, *REMAT)))
        super().__post_init__()

    @property
    def axes(self) -> dict[str, str]:
        """Roles of the axes of kernels with more than two, for ``jp.attach``."""
        if not self.scan_layers:
            return {}
        return {".*encoder/layer/.*kernel": "layer in out"}

    @property
    def names(self) -> tuple[ModuleName, ...]:
        """The modules by their names in transformers' class and in our tree."""
        return deberta_names(
            self.config, head=self.head is not None, scanned=self.scan_layers
        )

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers opens."""
        return write_deberta_config(self.config, self.head, self.num_labels)

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "batch tokens"],
        attention_mask: Shaped[Array | np.ndarray, "batch tokens"] | None = None,
        token_type_ids: Int[Array | np.ndarray, "batch tokens"] | None = None,
        *,
        deterministic: bool = True,
        hidden_states: bool = False,
    ) -> Any:
        """Returns logits, or the last hidden state when the model has no head.

        Args:
          input_ids: token ids, in [0, vocab_size); one outside gives NaN.
          attention_mask: 1 at tokens, 0 at padding; None: no padding.
          token_type_ids: segment of each token; None: all 0. Without effect in
            models without a table of types, as in transformers.
          deterministic: without dropout. With False, ``apply`` needs
            ``rngs={"dropout": key}``.
          hidden_states: whether to return the hidden states as well.

        Returns:
          Logits [batch, num_labels] in float32 at least; without a head the last
          hidden state [batch, tokens, D]. With ``hidden_states=True`` a pair of
          that and [L + 1, batch, tokens, D]: the embeddings' output, then every
          layer's.

        Raises:
          ValueError: if the text is longer than the model allows.
        """
        config, options = self.config, (self.config, self.dtype, self.param_dtype)
        mask = jnp.ones(input_ids.shape, bool)
        if attention_mask is not None:
            mask = jnp.asarray(attention_mask).astype(bool)
        x = _Embeddings(*options, name="embeddings")(
            input_ids, token_type_ids, mask, deterministic
        )
        x, states = _Encoder(*options, self.scan_layers, self.remat, name="encoder")(
            x, mask, deterministic, hidden_states
        )
        if self.head is not None:
            rate = config.cls_dropout
            rate = config.hidden_dropout_prob if rate is None else rate
            x = _Pooler(*options, deterministic, name="pooler")(x[:, 0])
            x = nn.Dropout(rate, deterministic=deterministic)(x)
            x = at_least_float32(dense(self, self.num_labels, "classifier")(x))
        return (x, states) if hidden_states else x


class _Pooler(Part):
    deterministic: bool

    @nn.compact
    def __call__(self, first: Float[Array, "batch d"]) -> Float[Array, "batch d"]:
        config = self.config
        drop = nn.Dropout(config.pooler_dropout, deterministic=self.deterministic)
        x = dense(self, config.hidden_size, "dense")(drop(first))
        return ACTIVATIONS[config.pooler_hidden_act](x)


class _Embeddings(Part):
    @nn.compact
    def __call__(
        self, input_ids: Any, token_type_ids: Any, mask: Array, deterministic: bool
    ) -> Float[Array, "batch tokens d"]:
        config, options = self.config, (self.config, self.dtype, self.param_dtype)
        tokens = input_ids.shape[1]
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"`input_ids` have {tokens} tokens; the model allows "
                f"{config.max_position_embeddings}. Truncate the texts."
            )
        x = Embedding(*options, config.vocab_size, name="word_embeddings")(input_ids)
        if config.position_biased_input:
            places = Embedding(
                *options, config.max_position_embeddings, name="position_embeddings"
            )
            x = x + places(jnp.arange(tokens)[None])
        if config.type_vocab_size:
            if token_type_ids is None:
                token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)
            types = Embedding(
                *options, config.type_vocab_size, name="token_type_embeddings"
            )
            x = x + types(token_type_ids)
        x = LayerNorm(*options, name="LayerNorm")(x)
        x = jnp.where(mask[:, :, None], x, jnp.zeros((), x.dtype))
        return nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)(x)


class _Encoder(Part):
    scan_layers: bool
    remat: str | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens d"],
        mask: Array,
        deterministic: bool,
        hidden_states: bool,
    ) -> tuple[Float[Array, "batch tokens d"], Any]:
        config, options = self.config, (self.config, self.dtype, self.param_dtype)
        table = None
        if config.relative_attention:
            rows = Embedding(*options, 2 * config.span, name="rel_embeddings")
            table = rows(jnp.arange(2 * config.span))
            if config.norm_distances:
                table = LayerNorm(*options, name="LayerNorm")(table)
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        return run_layers(
            self, _Attention, x, (pairs, table), deterministic, hidden_states
        )


def bucket(distances: np.ndarray, buckets: int, bound: int) -> np.ndarray:
    """Returns the buckets of distances: themselves if small, else logarithmic.

    Args:
      distances: integers of either sign.
      buckets: half of them, in each direction, are for single distances.
      bound: the distance that falls into the last bucket.

    References:
        He et al., DeBERTa, arXiv 2006.03654, and its code for v2 (section 5 of
        arXiv 2111.09543 keeps it).
    """
    half = buckets // 2
    size = np.maximum(np.abs(distances), half).astype(np.float32)
    share = np.log(size / np.float32(half))
    share = share / np.log(np.float32((bound - 1) / half))
    far = np.ceil(share * np.float32(half - 1)).astype(np.int32) + half
    near = np.abs(distances) <= half
    return np.where(near, distances, far * np.sign(distances)).astype(np.int32)


class _Attention(Part):
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d"], shared: Any) -> Array:
        config = self.config
        mask, table = shared
        heads, tokens = config.num_attention_heads, x.shape[1]
        size = config.hidden_size // heads
        sums = wide(self.dtype)  # bfloat16 products, added up in float32

        def project(name: str) -> Any:
            inner = dense(self, config.hidden_size, name)
            return lambda y: keep(inner(y)).reshape(*y.shape[:-1], heads, size)

        to_query, to_key = project("query_proj"), project("key_proj")
        query, key = to_query(x), to_key(x)
        value = project("value_proj")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=sums)
        if config.relative_attention:
            drop = nn.Dropout(
                config.hidden_dropout_prob, deterministic=self.deterministic
            )
            rows = drop(table)
            # Row i - j + S of the table stands for the distance from i to j.
            steps = np.arange(1 - tokens, tokens)
            if config.buckets > 0:
                steps = bucket(steps, config.buckets, config.distances)
            place = jnp.arange(tokens)
            steps = jnp.asarray(steps)[place[:, None] - place[None] + tokens - 1]
            top = 2 * config.span - 1
            if config.c2p:
                apart = (to_key if config.share_att_key else project("pos_key_proj"))(
                    rows
                )
                terms = jnp.einsum(
                    "bqhd,shd->bhqs", query, apart, preferred_element_type=sums
                )
                index = jnp.clip(steps + config.span, 0, top)[None, None]
                scores = scores + jnp.take_along_axis(terms, index, axis=3)
            if config.p2c:
                apart = (
                    to_query if config.share_att_key else project("pos_query_proj")
                )(rows)
                terms = jnp.einsum(
                    "bkhd,shd->bhsk", key, apart, preferred_element_type=sums
                )
                # Key j sees query i at the distance from j to i.
                index = jnp.clip(config.span - steps.T, 0, top)[None, None]
                scores = scores + jnp.take_along_axis(terms, index, axis=2)
        scores = scores * (size * (1 + config.c2p + config.p2c)) ** -0.5
        scores = jnp.where(mask, scores, jnp.finfo(sums).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = nn.Dropout(
            config.attention_probs_dropout_prob, deterministic=self.deterministic
        )(weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return Output(
            config, self.dtype, self.param_dtype, self.deterministic, name="output"
        )(mixed, x)
