"""BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) as one Linen module.

RoBERTa differs in where its positions start and in its head; all else is shared.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxpeft.models._config import BertConfig, write_config
from jaxpeft.models._families import bert_names
from jaxpeft.models._layers import Embeddings, Encoder
from jaxpeft.models._names import ModuleName, with_uses
from jaxpeft.models._parts import REMAT, Part, at_least_float32, check_known, dense
from jaxpeft.tree import Axes

HEADS = (None, "classification", "regression")


class Bert(nn.Module):
    """A BERT or RoBERTa encoder, with or without a head.

    Build it with ``models.from_config`` or ``models.load``. Its parameters are
    ``embeddings/...``, ``encoder/layer_{i}/...`` (scanned: ``encoder/layer/...``
    with a leading axis of length L), then ``pooler/dense`` and ``classifier`` (BERT)
    or ``classifier/dense`` and ``classifier/out_proj`` (RoBERTa).

    Attributes:
      config: sizes and constants.
      head: None, ``"classification"`` or ``"regression"``.
      num_labels: width of the head; 1 for regression.
      dtype: dtype of activations and matmuls.
      param_dtype: dtype of parameters drawn by ``init``.
      scan_layers: whether the layers are one scanned stack.
      remat: None, or what a layer keeps for its backward pass: ``"full"``
        recomputes everything, ``"dots"`` keeps the results of all matmuls,
        ``"dots_no_batch"`` those without batch dimensions (not the attention
        scores), ``"names"`` only what projections return, ``"unscaled"`` only
        what those return whose outputs an adapter scales.
    """

    config: BertConfig
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
    def axes(self) -> Axes:
        """Roles of kernels with more than two axes, and uses, for ``jp.attach``."""
        stack = {".*encoder/layer/.*kernel": "layer in out"}
        roles = stack if self.scan_layers else {}
        return with_uses(roles, self.names, self.config.num_hidden_layers)

    @property
    def names(self) -> tuple[ModuleName, ...]:
        """The modules by their names in transformers' class and in our tree."""
        return bert_names(
            self.config.model_type,
            head=self.head is not None,
            scanned=self.scan_layers,
        )

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers opens."""
        return write_config(self.config, self.head, self.num_labels)

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
          token_type_ids: segment of each token; None: all 0.
          deterministic: without dropout. With False, ``apply`` needs
            ``rngs={"dropout": key}``.
          hidden_states: whether to return the hidden states as well.

        Returns:
          Logits [batch, num_labels] in float32 at least; without a head the last
          hidden state [batch, tokens, D]. With ``hidden_states=True`` a pair of
          that and [L + 1, batch, tokens, D]: the embeddings' output, then every
          layer's.

        Raises:
          ValueError: if the text is longer than the position table.
        """
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Embeddings(self.config, **options, name="embeddings")(
            input_ids, token_type_ids, deterministic
        )
        mask = None
        if attention_mask is not None:
            mask = jnp.asarray(attention_mask).astype(bool)[:, None, None, :]
        x, states = Encoder(
            self.config,
            **options,
            scan_layers=self.scan_layers,
            remat=self.remat,
            name="encoder",
        )(x, mask, deterministic, hidden_states)
        if self.head is not None:
            head = _roberta_head if self.config.model_type == "roberta" else _bert_head
            x = head(self, x[:, 0], deterministic)
        return (x, states) if hidden_states else x


def _head_dropout(config: BertConfig) -> float:
    if config.classifier_dropout is None:
        return config.hidden_dropout_prob
    return config.classifier_dropout


def _bert_head(
    module: Bert, first: Float[Array, "batch d"], deterministic: bool
) -> Float[Array, "batch labels"]:
    dropout = nn.Dropout(_head_dropout(module.config), deterministic=deterministic)
    pooled = _Pooler(module.config, module.dtype, module.param_dtype, name="pooler")(
        first
    )
    logits = dense(module, module.num_labels, "classifier")(dropout(pooled))
    return at_least_float32(logits)


def _roberta_head(
    module: Bert, first: Float[Array, "batch d"], deterministic: bool
) -> Float[Array, "batch labels"]:
    return _RobertaHead(
        module.config,
        module.dtype,
        module.param_dtype,
        num_labels=module.num_labels,
        name="classifier",
    )(first, deterministic)


class _Pooler(Part):
    @nn.compact
    def __call__(self, first: Float[Array, "batch d"]) -> Float[Array, "batch d"]:
        return jnp.tanh(dense(self, self.config.hidden_size, "dense")(first))


class _RobertaHead(Part):
    num_labels: int

    @nn.compact
    def __call__(
        self, first: Float[Array, "batch d"], deterministic: bool
    ) -> Float[Array, "batch labels"]:
        dropout = nn.Dropout(_head_dropout(self.config), deterministic=deterministic)
        project = dense(self, self.config.hidden_size, "dense")
        x = dropout(jnp.tanh(project(dropout(first))))
        return at_least_float32(dense(self, self.num_labels, "out_proj")(x))


def mean_pool(
    hidden: Float[Array, "batch tokens d"],
    attention_mask: Shaped[Array | np.ndarray, "batch tokens"],
) -> Float[Array, "batch d"]:
    r"""Returns the mean of the hidden states of the real tokens, one row a text.

    .. math:: e_b = \sum_t m_{bt} x_{bt} / \max(\sum_t m_{bt}, 1)

    This is how a sentence encoder such as MiniLM makes one vector of a text; divide
    by its length to compare by cosine.

    Args:
      hidden: last hidden state.
      attention_mask: 1 at tokens, 0 at padding.

    Returns:
      The means, in float32 at least; zeros for a text of padding only.

    Example:
        >>> hidden = jnp.array([[[2.0], [4.0], [9.0]]])
        >>> mean_pool(hidden, jnp.array([[1, 1, 0]]))
        Array([[3.]], dtype=float32)

    References:
        Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084, section 3.
    """
    states = at_least_float32(hidden)
    mask = jnp.asarray(attention_mask).astype(states.dtype)
    total = jnp.einsum("btd,bt->bd", states, mask)
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
