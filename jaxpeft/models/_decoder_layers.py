"""The parts of a decoder, as Linen modules, and the stack of its layers.

Number by number the function of transformers: pre-norm blocks; ``gpt2`` with
LayerNorm and a plain feed-forward, all others with RMSNorm and a gated one.

Shapes: B batch, T tokens, D width, H query heads, K key and value heads, h size of a
head, F feed-forward, L layers, S slots of a cache.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpeft.models._attention import Context, attend, fill
from jaxpeft.models._decoder_config import FULL, SLIDING
from jaxpeft.models._on_mesh import cut_tokens, enter, leave
from jaxpeft.models._parts import (
    ACTIVATIONS,
    REMAT,
    LayerNorm,
    Part,
    at_least_float32,
    dense,
    keep,
)
from jaxpeft.models._rope import turn


class RMSNorm(Part):
    """Root-mean-square norm (arXiv 1910.07467); Gemma multiplies by 1 + its scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        offset = self.config.traits.unit_offset
        start = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        y = at_least_float32(x)
        square = (y * y).mean(-1, keepdims=True)
        normal = y * jax.lax.rsqrt(square + self.config.layer_norm_eps)
        scale = scale.astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (normal * (scale + 1 if offset else scale)).astype(self.dtype)


def norm(module: Any, name: str | None) -> nn.Module:
    """The norm of a family, as a part of ``module``."""
    kind = LayerNorm if module.config.model_type == "gpt2" else RMSNorm
    return kind(module.config, module.dtype, module.param_dtype, name=name)


class Attention(Part):
    """Grouped-query attention, with its projections.

    Attributes:
      kind: of the layer; None where a flag says which.
      deterministic: without dropout.
      attention: of ``attend``, its ``implementation``.
      joint: name of the fused projection, for families that have one.
      output: name of the projection behind.
    """

    kind: str | None
    deterministic: bool
    attention: str | None
    joint: str = "qkv_proj"
    output: str = "o_proj"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"], context: Context, sliding: Any, cache
    ) -> tuple[Float[Array, "batch tokens d"], Any]:
        config = self.config
        size = config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        ends = (heads * size, (heads + groups) * size, (heads + 2 * groups) * size)
        bias = config.qkv_bias
        if config.traits.fused:
            joint = keep(dense(self, ends[-1], self.joint, use_bias=bias)(x))
            parts = jnp.split(joint, ends[:-1], axis=-1)
        else:
            parts = [
                keep(dense(self, number * size, name, use_bias=bias)(x))
                for name, number in (
                    ("q_proj", heads),
                    ("k_proj", groups),
                    ("v_proj", groups),
                )
            ]
        query, key, value = (part.reshape(*x.shape[:2], -1, size) for part in parts)
        if config.traits.head_norms:
            query, key = norm(self, "q_norm")(query), norm(self, "k_norm")(key)
        mask, angles = context.of(self.kind, sliding)
        if angles is not None:
            query, key = turn(query, *angles), turn(key, *angles)
        if cache is not None:
            cache = fill(cache, context.index, key, value)
            key, value = (cache[name].astype(x.dtype) for name in ("key", "value"))
        dropout = None
        if config.attention_dropout and not self.deterministic:
            dropout = nn.Dropout(config.attention_dropout, deterministic=False)
        mixed = attend(
            query,
            key,
            value,
            mask,
            scale=config.attention_scale,
            window=config.sliding_window if self.kind == SLIDING else None,
            cap=config.attn_logit_softcapping,
            dropout=dropout,
            # Parameters are drawn with a single token, which no kernel would take.
            implementation=None if self.is_initializing() else self.attention,
            segments=context.segments,
        )
        project = dense(
            self, config.hidden_size, self.output, use_bias=config.output_bias
        )
        return keep(project(mixed.reshape(*x.shape[:2], -1))), cache


class GatedMlp(Part):
    """Feed-forward with a gate (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d"]) -> Array:
        config, bias = self.config, self.config.mlp_bias
        width, act = config.intermediate_size, ACTIVATIONS[config.hidden_act]
        if config.traits.fused:
            joint = keep(dense(self, 2 * width, "gate_up_proj", use_bias=bias)(x))
            gate, up = jnp.split(joint, 2, axis=-1)
        else:
            gate = keep(dense(self, width, "gate_proj", use_bias=bias)(x))
            up = keep(dense(self, width, "up_proj", use_bias=bias)(x))
        down = dense(self, config.hidden_size, "down_proj", use_bias=bias)
        return keep(down(act(gate) * up))


class PlainMlp(Part):
    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens d"]) -> Array:
        x = keep(dense(self, self.config.intermediate_size, "c_fc")(x))
        x = ACTIVATIONS[self.config.hidden_act](x)
        return keep(dense(self, self.config.hidden_size, "c_proj")(x))


class Layer(Part):
    """One block: attention, then feed-forward, each added to what came in.

    Attributes:
      kind: ``"full_attention"``, ``"sliding_attention"``; None: the call's flag says.
      deterministic: without dropout.
      attention: of ``attend``, its ``implementation``.
      hidden_states: whether to return the state a second time, for a scan.
    """

    kind: str | None
    deterministic: bool
    attention: str | None
    hidden_states: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens d"], context: Context, sliding: Any, cache
    ) -> tuple[Float[Array, "batch tokens d"], tuple[Any, Any]]:
        options = (self.config, self.dtype, self.param_dtype)
        mixing = (*options, self.kind, self.deterministic, self.attention)
        drop = nn.Dropout(self.config.resid_pdrop, deterministic=self.deterministic)
        if self.config.model_type == "gpt2":
            attention = Attention(*mixing, "c_attn", "c_proj", name="attn")
            mlp = PlainMlp(*options, name="mlp")
            names: tuple[str | None, ...] = ("ln_1", None, "ln_2", None)
        else:
            attention = Attention(*mixing, name="self_attn")
            mlp = GatedMlp(*options, name="mlp")
            names = ("input_layernorm", None, "post_attention_layernorm", None)
        if self.config.traits.sandwich:
            names = (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )

        def normed(place: int, y: Array) -> Array:
            name = names[place]
            return y if name is None else norm(self, name)(y)

        cut, into, out = cut_tokens, enter, leave
        if cache is not None:  # its own layout decides
            cut = into = out = lambda y: y
        mixed, cache = attention(into(normed(0, cut(x))), context, sliding, cache)
        x = cut(x + drop(normed(1, out(mixed))))
        x = cut(x + drop(normed(3, out(mlp(into(normed(2, x)))))))
        return x, (x if self.hidden_states else None, cache)


class Stack(Part):
    """The layers, ``layer_{i}`` one by one or ``layer`` scanned."""

    scan_layers: bool
    remat: str | None
    attention: str | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens d"],
        context: Context,
        cache: Any,
        deterministic: bool,
        hidden_states: bool,
    ) -> tuple[Float[Array, "batch tokens d"], Any, Any]:
        """Returns the last state, all states [L + 1, B, T, D] or None, the cache."""
        kinds = self.config.layer_types
        layer = Layer
        if self.remat is not None:
            # Inside a scan the loop itself keeps XLA from undoing the recomputation.
            layer = nn.remat(
                layer, policy=REMAT[self.remat], prevent_cse=not self.scan_layers
            )
        options = (self.config, self.dtype, self.param_dtype)
        if not self.scan_layers:
            states, filled = [x], {}
            for i, kind in enumerate(kinds):
                name = f"layer_{i}"
                one = layer(*options, kind, deterministic, self.attention, name=name)
                x, (_, filled[name]) = one(x, context, None, cache and cache[name])
                states.append(x)
            return x, jnp.stack(states) if hidden_states else None, cache and filled
        alike = len(set(kinds)) == 1
        sliding = None if alike else jnp.array([kind == SLIDING for kind in kinds])
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, 0),
            length=len(kinds),
        )
        last, (states, filled) = stack(
            *options,
            kinds[0] if alike else None,
            deterministic,
            self.attention,
            hidden_states,
            name="layer",
        )(x, context, sliding, cache and cache["layer"])
        if hidden_states:
            states = jnp.concatenate([x[None], states])
        return last, states, cache and {"layer": filled}


def is_mixed(config: Any) -> bool:
    """Whether full and sliding layers alternate."""
    return {FULL, SLIDING} <= set(config.layer_types)
