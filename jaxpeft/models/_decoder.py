"""The Llama line and GPT-2 as one Linen module.

Llama (arXiv 2302.13971, 2307.09288, 2407.21783), Mistral (2310.06825), Qwen2
(2407.10671), Qwen3 (2505.09388), Gemma (2403.08295, 2408.00118, 2503.19786), Phi-3
(2404.14219), GPT-2. Yi and SmolLM2 are Llamas.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpeft.models._attention import IMPLEMENTATIONS, make_context
from jaxpeft.models._cache import advance, poison
from jaxpeft.models._decoder_config import DecoderConfig, write_decoder_config
from jaxpeft.models._decoder_layers import Stack, is_mixed, norm
from jaxpeft.models._decoder_names import decoder_names
from jaxpeft.models._names import ModuleName, with_uses
from jaxpeft.models._on_mesh import sequence_size, token_losses
from jaxpeft.models._parts import (
    REMAT,
    Embedding,
    at_least_float32,
    check_known,
    dense,
    wide,
)
from jaxpeft.tree import Axes

HEADS = (None, "causal_lm", "classification", "regression")


class Decoder(nn.Module):
    """A causal decoder, with or without a head.

    Build it with ``models.from_config`` or ``models.load``. Its parameters are
    ``embed_tokens/embedding``, ``layers/layer_{i}/...`` (scanned:
    ``layers/layer/...`` with a leading axis of length L), ``norm/scale``, then
    ``lm_head/kernel`` (unless tied) or ``score/kernel``; inside a layer the names of
    Hugging Face: ``self_attn/q_proj/kernel``, ``mlp/gate_proj/kernel`` and so on. In
    GPT-2 they are ``wte``, ``wpe``, ``h/layer_{i}/...`` and ``ln_f``.

    Where the config ties head and embedding, ``embed_tokens/embedding`` is both. The
    same model also runs a tree in which each has its own table (``interop.untie``):
    ``embed_tokens/lookup/embedding`` and ``lm_head/embedding``, both [V, D].

    Attributes:
      config: sizes and constants.
      head: None, ``"causal_lm"``, ``"classification"`` or ``"regression"``.
      num_labels: width of a classification head; 1 for regression.
      dtype: dtype of activations and matmuls.
      param_dtype: dtype of parameters drawn by ``init``.
      scan_layers: whether the layers are one scanned stack.
      remat: None, or what a layer keeps for its backward pass: ``"full"``
        recomputes everything, ``"dots"`` keeps the results of all matmuls,
        ``"dots_no_batch"`` those without batch dimensions (not the attention
        scores), ``"names"`` only what projections return, ``"unscaled"`` only
        what those return whose outputs an adapter scales.
      attention: None, ``"xla"``, ``"cudnn"`` (flash attention on NVIDIA GPUs, in
        bfloat16 or float16) or ``"splash"`` (the same on TPUs, in bfloat16 or
        float32, for multiples of 128 tokens without a cache; not where full and
        sliding layers alternate in one scan): ``model.clone(attention="cudnn")``. None
        takes splash attention on a TPU where it can (of several, where a mesh is in
        context), else what ``jax.nn.dot_product_attention`` takes.
      stop_tokens: ids after which a text has ended, as the files it was loaded from
        say (``eos_token_id`` of ``config.json`` and ``generation_config.json``); what
        ``models.generate`` stops at by default.
    """

    config: DecoderConfig
    head: str | None = None
    num_labels: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str | None = None
    attention: str | None = None
    stop_tokens: tuple[int, ...] = ()

    # What `training.check_tokens` asks: a mesh may cut the tokens of its rows.
    cuts_tokens = True

    def __post_init__(self) -> None:
        """Refuses unknown names."""
        check_known(
            head=(self.head, HEADS),
            remat=(self.remat, (None, *REMAT)),
            attention=(self.attention, IMPLEMENTATIONS),
        )
        super().__post_init__()

    @property
    def axes(self) -> Axes:
        """Roles of kernels with more than two axes, and uses, for ``jp.attach``."""
        stack = {".*(layers|h)/layer/.*kernel": "layer in out"}
        roles = stack if self.scan_layers else {}
        return with_uses(roles, self.names, self.config.num_hidden_layers)

    @property
    def names(self) -> tuple[ModuleName, ...]:
        """The modules by their names in transformers' class and in our tree."""
        return decoder_names(self.config, self.head, self.scan_layers)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers opens."""
        return write_decoder_config(self.config, self.head, self.num_labels)

    def setup(self) -> None:
        """Names the parts as the family does."""
        config, options = self.config, (self.config, self.dtype, self.param_dtype)
        gpt2 = config.model_type == "gpt2"
        stack = Stack(*options, self.scan_layers, self.remat, self.attention, name=None)
        words = Embedding(*options, config.vocab_size)
        if gpt2:
            self.wte, self.h, self.ln_f = words, stack, norm(self, None)
            self.wpe = Embedding(*options, config.max_position_embeddings)
        else:
            self.embed_tokens, self.layers, self.norm = words, stack, norm(self, None)
        self.embedding_dropout = nn.Dropout(config.embd_pdrop)
        if self.head == "causal_lm" and not config.tie_word_embeddings:
            self.lm_head = _head(self, config.vocab_size)
        elif self._is_untied:
            self.lm_head = Embedding(*options, config.vocab_size)
        if self.head in ("classification", "regression"):
            self.score = _head(self, self.num_labels)

    def __call__(
        self,
        input_ids: Int[Array | np.ndarray, "batch tokens"],
        attention_mask: Shaped[Array | np.ndarray, "batch tokens"] | None = None,
        *,
        positions: Int[Array | np.ndarray, "#batch tokens"] | None = None,
        segment_ids: Int[Array | np.ndarray, "batch tokens"] | None = None,
        cache: dict[str, Any] | None = None,
        deterministic: bool = True,
        hidden_states: bool | str = False,
    ) -> Any:
        """Returns logits, or the last hidden state when the model has no head.

        Args:
          input_ids: token ids, in [0, vocab_size); one outside gives NaN.
          attention_mask: 1 at tokens, 0 at padding, on either side; None: no padding.
          positions: of the tokens in their text; None: 0, 1, ... in every row, with a
            cache from its index on.
          segment_ids: of packed texts: a token sees only its own segment. Give each
            text its own ``positions``, too.
          cache: what ``models.init_cache`` or an earlier call returned; the tokens
            are written behind those in it, and see them.
          deterministic: without dropout. With False, ``apply`` needs
            ``rngs={"dropout": key}``.
          hidden_states: whether to return the hidden states as well; ``"pre_norm"``:
            with the last of them as the last layer gives it.

        Returns:
          In float32 at least, logits [batch, tokens, V] of the next token, or
          [batch, num_labels] at the last token that is no padding: by
          ``attention_mask``, and where that is None by the config's ``pad_token_id``
          (which may be the token that ends a text, too). Without a head the
          last hidden state [batch, tokens, D], which ``method="logits"`` turns into
          logits of a language model. With ``hidden_states=True`` a pair of that and
          [L + 1, batch, tokens, D]: the embeddings, then every layer's output, the
          last one normed. With a cache a pair of all that and the cache, filled.

        Raises:
          ValueError: if the text is longer than the model allows and ``positions``
            are not given, or the arguments do not go together.
        """
        tokens = input_ids.shape[1]
        positions = self._positions(tokens, positions, cache)
        mask, index, slots = attention_mask, None, None
        if cache is not None:
            if segment_ids is not None:
                raise ValueError(
                    "`segment_ids` and `cache` do not go together; write one text a "
                    "row to fill a cache."
                )
            if (parts := sequence_size()) > 1:
                raise ValueError(
                    f"`cache` and a mesh with sequence={parts} do not go together: the "
                    "tokens of a cache are not cut; generate on a mesh with sequence=1."
                )
            cache = advance(cache, input_ids.shape, attention_mask)
            index, slots = cache["index"] - tokens, cache["mask"].shape[1]
            mask = cache["mask"]
        context = make_context(
            self.config,
            positions,
            mask,
            segment_ids,
            index=index,
            slots=slots,
            explicit=self.scan_layers and is_mixed(self.config),
        )
        x = self._embed(input_ids, positions, deterministic)
        gpt2 = self.config.model_type == "gpt2"
        stack, last_norm = (self.h, self.ln_f) if gpt2 else (self.layers, self.norm)
        x, states, layers = stack(
            x, context, cache and cache["layers"], deterministic, bool(hidden_states)
        )
        x = last_norm(x)
        if hidden_states is True:
            states = jnp.concatenate([states[:-1], x[None]])
        if self.head == "causal_lm":
            x = self.logits(x)
        elif self.head is not None:
            x = at_least_float32(self.score(self._last(x, input_ids, attention_mask)))
        out = (x, states) if hidden_states else x
        if cache is None:
            return out
        return poison(out, index, tokens, slots), {**cache, "layers": layers}

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch v"]:
        """Returns logits of the next token, in float32 at least.

        With this, ``apply(..., method="logits")``, a part of the hidden states of
        the same model without a head, ``model.clone(head=None)``, can be read out:
        the last token's in generation, a chunk at a time in a loss.

        Args:
          hidden: last hidden states.

        Raises:
          ValueError: if the model has no language-model head.
        """
        self._check_head()
        if not self.config.tie_word_embeddings:
            out = self.lm_head(hidden)
        elif self._is_untied:
            out = self.lm_head.attend(hidden)
        else:
            out = self._words.attend(hidden)
        return self._capped(out)

    def token_losses(
        self,
        hidden: Float[Array, "batch tokens d"],
        targets: Int[Array | np.ndarray, "batch tokens"],
        *,
        chunk: int = 256,
    ) -> tuple[Float[Array, "batch tokens"], Bool[Array, "batch tokens"]]:
        """Returns the cross-entropy of each token, the logits never held whole.

        What ``numerics.token_cross_entropy`` gives of ``logits``. Under a mesh in
        context (``training.make_mesh``) the vocabulary is cut over its tensor axis,
        and the head's table is put together once.

        Args:
          hidden: last hidden states, of the model without a head.
          targets: ids to be predicted; one outside of the vocabulary gives NaN.
          chunk: the most tokens that a device reads out at a time.

        Returns:
          ``(values, hits)``: in float32 at least, and whether the target has the
          highest logit.

        Raises:
          ValueError: if the model has no language-model head.
        """
        self._check_head()
        kernel = not self.config.tie_word_embeddings
        if kernel:
            table = self.lm_head.variables["params"]["kernel"]
        else:
            table = (self.lm_head if self._is_untied else self._words).embedding
        product = "...d,dv->...v" if kernel else "...d,vd->...v"

        def read_out(table: Array, hidden: Array) -> Array:
            sums = wide(self.dtype)
            table, hidden = table.astype(self.dtype), hidden.astype(self.dtype)
            out = jnp.einsum(product, hidden, table, preferred_element_type=sums)
            return self._capped(out)

        axis = 1 if kernel else 0
        return token_losses(read_out, table, axis, hidden, targets, chunk=chunk)

    def _check_head(self) -> None:
        if self.head != "causal_lm":
            raise ValueError(
                f"`head` is {self.head!r}; only head='causal_lm' gives logits of "
                "tokens."
            )

    def _capped(self, logits: Array) -> Array:
        logits, cap = at_least_float32(logits), self.config.final_logit_softcapping
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    @property
    def _words(self) -> Embedding:
        return self.wte if self.config.model_type == "gpt2" else self.embed_tokens

    @property
    def _is_untied(self) -> bool:
        """Whether a tied config's parameters have a table for the head alone."""
        tied = self.head == "causal_lm" and self.config.tie_word_embeddings
        return tied and self.has_variable("params", "lm_head")

    def _positions(self, tokens: int, positions: Any, cache: Any) -> Array:
        longest = self.config.max_position_embeddings
        if positions is not None:
            return jnp.asarray(positions)
        if tokens > longest:
            raise ValueError(
                f"`input_ids` have {tokens} tokens; the model allows {longest}. "
                "Truncate the texts, or give `positions`."
            )
        steps = jnp.arange(tokens, dtype=jnp.int32)[None]
        return steps if cache is None else steps + cache["index"]

    def _embed(self, input_ids: Any, positions: Array, deterministic: bool) -> Array:
        x = self._words(input_ids)
        if self.config.model_type == "gpt2":
            x = x + jnp.broadcast_to(
                self.wpe(positions), (*input_ids.shape, self.config.hidden_size)
            )
        if self.config.traits.scaled_embedding:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return self.embedding_dropout(x, deterministic=deterministic)

    def _last(self, x: Array, input_ids: Any, attention_mask: Any) -> Array:
        """The state of each row's last token that is no padding."""
        if attention_mask is not None:
            real = jnp.asarray(attention_mask).astype(bool)
        elif self.config.pad_token_id is not None:
            real = jnp.asarray(input_ids) != self.config.pad_token_id
        else:
            real = jnp.ones(input_ids.shape, bool)
        places = jnp.arange(input_ids.shape[1])[None]
        last = jnp.max(jnp.where(real, places, 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _head(module: Decoder, features: int) -> nn.Dense:
    # Logits are added up in float32 and stay there: bfloat16 has three digits.
    sums = functools.partial(
        jax.lax.dot_general, preferred_element_type=wide(module.dtype)
    )
    return dense(module, features, None, use_bias=False).clone(dot_general=sums)
