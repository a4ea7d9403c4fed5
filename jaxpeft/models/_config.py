"""What a Hugging Face config says about a BERT or RoBERTa, checked.

Every field that changes the function is either read or refused by name. All others
(training history, generation, caching) have no effect on an encoder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpeft.models._parts import ACTIVATIONS

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
}
_FAMILY_DEFAULTS = {
    "bert": {"vocab_size": 30522, "pad_token_id": 0},
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
}
BERTS = tuple(_FAMILY_DEFAULTS)

_FLOATS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "layer_norm_eps",
)

# Fields that change the function and are not implemented: the values that are fine.
_REFUSED = {
    "position_embedding_type": (None, "absolute"),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None, {}),
    "auto_map": (None, {}),  # code of its own beside the weights
    "embedding_size": (None,),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes and constants of a BERT or RoBERTa, under Hugging Face's names.

    Attributes:
      model_type: ``"bert"`` or ``"roberta"``.
      vocab_size: number of tokens V.
      hidden_size: width D.
      num_hidden_layers: number of layers L.
      num_attention_heads: heads H; the head size is D / H.
      intermediate_size: feed-forward width F.
      hidden_act: activation of the feed-forward, one of ``ACTIVATIONS``.
      hidden_dropout_prob: dropout after embeddings and projections.
      attention_probs_dropout_prob: dropout of attention probabilities.
      classifier_dropout: dropout in the head; None: ``hidden_dropout_prob``.
      max_position_embeddings: rows of the position table.
      type_vocab_size: rows of the token-type table.
      initializer_range: standard deviation of new kernels and embeddings.
      layer_norm_eps: epsilon of every LayerNorm.
      pad_token_id: id of padding; RoBERTa counts positions from the next number.
      num_labels: classes of a head, as the config has it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float | None
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    pad_token_id: int | None
    num_labels: int


def read_config(raw: Mapping[str, Any]) -> BertConfig:
    """Returns the checked config of a BERT or RoBERTa.

    Args:
      raw: the content of a ``config.json`` whose ``model_type`` is in ``BERTS``.

    Raises:
      ValueError: if a field that changes the function has a value that is not
        implemented.
    """
    model_type = raw["model_type"]
    refuse(raw, _REFUSED)
    values = {
        name: raw.get(name, default)
        for name, default in (_DEFAULTS | _FAMILY_DEFAULTS[model_type]).items()
    }
    for name in _FLOATS:
        if values[name] is not None:
            values[name] = float(values[name])  # some files have 0 for 0.0
    result = BertConfig(model_type=model_type, num_labels=count_labels(raw), **values)
    _check(result)
    return result


def write_config(
    config: BertConfig, head: str | None, num_labels: int
) -> dict[str, Any]:
    """Returns the ``config.json`` of a model, as transformers reads it.

    Args:
      config: its sizes and constants.
      head: None, ``"classification"`` or ``"regression"``.
      num_labels: width of the head.
    """
    stem = {"bert": "Bert", "roberta": "Roberta"}[config.model_type]
    content = dataclasses.asdict(config)
    if head is None:
        del content["num_labels"]  # of a head that is not there
        return {**content, "architectures": [f"{stem}Model"]}
    return {
        **content,
        "architectures": [f"{stem}ForSequenceClassification"],
        "num_labels": num_labels,
        **({"problem_type": "regression"} if head == "regression" else {}),
    }


def refuse(raw: Mapping[str, Any], fine: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses fields whose value is not one of those that are implemented."""
    for field, values in fine.items():
        if raw.get(field) not in values:
            raise ValueError(
                f"`config` field {field!r} is {raw[field]!r}, which is not "
                f"implemented for {raw['model_type']!r}; only {values[-1]!r} is."
            )


def count_labels(raw: Mapping[str, Any]) -> int:
    """Returns the number of classes of a config."""
    if raw.get("num_labels") is not None:
        return int(raw["num_labels"])
    return len(raw.get("id2label") or (0, 1))  # transformers assumes two classes


def _check(config: BertConfig) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"`config` field 'hidden_act' is {config.hidden_act!r}; "
            f"known are {list(ACTIVATIONS)}."
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`config` field 'hidden_size' {config.hidden_size} is no multiple of "
            f"'num_attention_heads' {config.num_attention_heads}."
        )
    if config.model_type == "roberta" and config.pad_token_id is None:
        raise ValueError(
            "`config` field 'pad_token_id' is None; RoBERTa counts its positions "
            "from pad_token_id + 1. Set it (1 in the published models)."
        )
