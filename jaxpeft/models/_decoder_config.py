"""What a Hugging Face config says about a decoder, checked.

Every field that changes the function of transformers' class is read or refused by
name. All others (training history, generation) have no effect.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxpeft.models._config import count_labels, refuse
from jaxpeft.models._decoder_families import (
    BIASED,
    DEFAULTS,
    FAMILY_DEFAULTS,
    OTHER_PARTS,
    OUTER,
    PART,
    SPELLINGS,
    TRAITS,
    UNREAD,
    WHOLES,
    Traits,
)
from jaxpeft.models._parts import ACTIVATIONS
from jaxpeft.models._rope import Rope, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"

# Fields that change the function and are not implemented: the values that are fine.
_REFUSED = {
    "quantization_config": (None, {}),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}, []),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),
    "no_rope_layers": (None, []),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a decoder, under the names Llama gives them.

    Attributes:
      model_type: a key of ``TRAITS``.
      vocab_size: number of tokens V.
      hidden_size: width D.
      num_hidden_layers: number of layers L.
      num_attention_heads: query heads H.
      num_key_value_heads: key and value heads K, a divisor of H.
      head_dim: size h of a head.
      intermediate_size: feed-forward width F.
      hidden_act: activation of the feed-forward, one of ``ACTIVATIONS``.
      max_position_embeddings: tokens of the longest text.
      initializer_range: standard deviation of new kernels and embeddings.
      layer_norm_eps: epsilon of every norm.
      pad_token_id: id of padding, or None.
      num_labels: classes of a head, as the config has it.
      tie_word_embeddings: whether the language-model head is the embedding.
      qkv_bias: whether queries, keys and values have biases.
      output_bias: whether the projection behind attention has one.
      mlp_bias: whether the feed-forward has.
      attention_dropout: dropout of attention probabilities.
      resid_pdrop: dropout of what a block adds.
      embd_pdrop: dropout of the embeddings.
      sliding_window: tokens a sliding layer sees, itself included; or None.
      layer_types: ``"full_attention"`` or ``"sliding_attention"``, layer by layer.
      rope: rotary positions of both kinds of layer; empty for learned positions.
      attention_scale: what scores are multiplied by.
      attn_logit_softcapping: bound of scores by tanh, or None.
      final_logit_softcapping: bound of logits by tanh, or None.
      part: where it lies in the class of a larger model, ``"language_model."``, or "".
      raw: the ``config.json`` all this was read from; of a larger model, what it says
        about the text part.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int | None
    num_labels: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_dropout: float
    resid_pdrop: float
    embd_pdrop: float
    sliding_window: int | None
    layer_types: tuple[str, ...]
    rope: tuple[tuple[str, Rope], ...]
    attention_scale: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    part: str
    raw: str = dataclasses.field(repr=False)

    @property
    def traits(self) -> Traits:
        """How its family is built."""
        return TRAITS[self.model_type]


def read_decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the checked config of a decoder.

    Args:
      raw: the content of a ``config.json`` whose ``model_type`` is in ``TRAITS`` or
        ``WHOLES``.

    Raises:
      ValueError: if a field that changes the function has a value that is not
        implemented, or sizes do not fit each other.
    """
    part = PART if raw["model_type"] in WHOLES else ""
    raw = text_part(raw)
    model_type = raw["model_type"]
    refuse(raw, _REFUSED)
    if model_type != "phi3":  # its own code was published beside it; same function
        refuse(raw, {"auto_map": (None, {})})
    values = _values(raw, model_type)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if values["head_dim"] is None:
        if width % heads:
            raise ValueError(
                f"`config` field 'hidden_size' {width} is no multiple of "
                f"'num_attention_heads' {heads}."
            )
        values["head_dim"] = width // heads
    if heads % values["num_key_value_heads"]:
        raise ValueError(
            f"`config` field 'num_attention_heads' {heads} is no multiple of "
            f"'num_key_value_heads' {values['num_key_value_heads']}."
        )
    longest, bias = values["max_position_embeddings"], values.pop("attention_bias")
    window, kinds = _windows(raw, model_type, values)
    rope = ()
    if model_type != "gpt2":
        rope = read_rope(raw, model_type, values["head_dim"], longest)
    capped = model_type in ("gemma2", "gemma3_text")
    caps = (50.0, 30.0) if model_type == "gemma2" else (None, None)
    scalar = raw.get("query_pre_attn_scalar", 256) if capped else values["head_dim"]
    qkv_bias, output_bias = BIASED.get(model_type, (bool(bias), bool(bias)))
    values |= {
        "layer_norm_eps": float(values.pop("rms_norm_eps")),
        "num_labels": count_labels(raw),
        "qkv_bias": qkv_bias,
        "output_bias": output_bias,
        "sliding_window": window,
        "layer_types": kinds,
        "rope": rope,
        "attention_scale": float(scalar) ** -0.5,
    }
    for name, default in zip(
        ("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True
    ):
        cap = raw.get(name, default) if capped else None
        values[name] = None if cap is None else float(cap)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range"):
        values[name] = float(values[name] or 0)  # some files have 0 or null for 0.0
    return DecoderConfig(
        model_type=model_type,
        part=part,
        raw=json.dumps(dict(raw), default=str),
        **values,
    )


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a config says about its text model; a config of text is that.

    Raises:
      ValueError: if the text part of a larger model is of another family than its
        model type has.
    """
    family = WHOLES.get(raw.get("model_type"))
    if family is None:
        return raw
    inner = raw.get("text_config") or {}
    if inner.get("model_type", family) != family:
        raise ValueError(
            f"`config` has model_type {raw['model_type']!r} and a 'text_config' of "
            f"{inner['model_type']!r}; only {family!r} is implemented there."
        )
    around = {name: x for name, x in raw.items() if name not in OTHER_PARTS}
    outer = {name: raw[name] for name in OUTER if raw.get(name) is not None}
    return {**around, **inner, **outer, "model_type": family}


def _values(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The fields of ``DEFAULTS`` for a family, in today's spelling."""
    spelling = SPELLINGS.get(model_type, {})
    values = {}
    for name, default in (DEFAULTS | FAMILY_DEFAULTS[model_type]).items():
        given = raw.get(name, default)
        given = raw.get(spelling.get(name, name), given)
        values[name] = default if name in UNREAD.get(model_type, ()) else given
    if values["intermediate_size"] is None:
        values["intermediate_size"] = 4 * values["hidden_size"]
    if model_type == "gemma" and values["hidden_act"] == "gelu":
        values["hidden_act"] = "gelu_pytorch_tanh"  # what its early files meant
    if values["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"`config` field 'hidden_act' is {values['hidden_act']!r}; "
            f"known are {list(ACTIVATIONS)}."
        )
    return values


def _windows(
    raw: Mapping[str, Any], model_type: str, values: Mapping[str, Any]
) -> tuple[int | None, tuple[str, ...]]:
    """The window, and the kind of every layer."""
    layers, window = range(values["num_hidden_layers"]), values["sliding_window"]
    if model_type in ("llama", "gemma", "gpt2"):
        return None, (FULL,) * len(layers)
    if model_type in ("mistral", "phi3"):
        return window, (FULL if window is None else SLIDING,) * len(layers)
    if model_type in ("qwen2", "qwen3"):
        window = window if raw.get("use_sliding_window", False) else None
        first = raw.get("max_window_layers", 28) if window else len(layers)
        kinds = tuple(SLIDING if i >= first else FULL for i in layers)
    else:
        period = 2 if model_type == "gemma2" else raw.get("sliding_window_pattern", 6)
        kinds = tuple(SLIDING if (i + 1) % period else FULL for i in layers)
    kinds = tuple(raw.get("layer_types") or kinds)
    if len(kinds) != len(layers) or not {FULL, SLIDING} >= set(kinds):
        raise ValueError(
            f"`config` field 'layer_types' is {list(kinds)}; write {FULL!r} or "
            f"{SLIDING!r} for each of the {len(layers)} layers."
        )
    if SLIDING in kinds and window is None:
        raise ValueError(
            "`config` has sliding layers in 'layer_types' but no 'sliding_window'."
        )
    return window, kinds


_TASKS = {
    None: "Model",
    "causal_lm": "ForCausalLM",
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
}
_OTHERS = {  # the classes that are called otherwise
    "Gemma3TextForCausalLM": "Gemma3ForCausalLM",
    "GPT2ForCausalLM": "GPT2LMHeadModel",
}
_VOLATILE = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "transformers_version",
    "_name_or_path",
)


def write_decoder_config(
    config: DecoderConfig, head: str | None, num_labels: int
) -> dict[str, Any]:
    """Returns the ``config.json`` of a model, as transformers reads it.

    Args:
      config: what ``read_decoder_config`` returned; its fields are written as read.
      head: the model's head.
      num_labels: width of a classification head.
    """
    content = json.loads(config.raw)
    content = {name: x for name, x in content.items() if name not in _VOLATILE}
    stem = config.traits.stem
    name = stem + _TASKS[head]
    content["architectures"] = [_OTHERS.get(name, name)]
    if head in ("classification", "regression"):
        content["num_labels"] = num_labels
    if head == "regression":
        content["problem_type"] = "regression"
    return content
