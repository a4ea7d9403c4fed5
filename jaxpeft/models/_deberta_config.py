"""What a Hugging Face config says about a DeBERTa-v2 or v3, checked.

Every field that changes the function is either read or refused by name.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxpeft.models._config import count_labels, refuse
from jaxpeft.models._parts import ACTIVATIONS

# What transformers assumes for a field that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-7,
    "relative_attention": False,
    "position_biased_input": True,
    "pooler_dropout": 0.0,
    "pooler_hidden_act": "gelu",
    "share_att_key": False,
    "cls_dropout": None,
}
_REFUSED = {
    "conv_kernel_size": (None, 0),
    "quantization_config": (None, {}),
    "auto_map": (None, {}),
}
_VOLATILE = ("architectures", "id2label", "label2id", "num_labels", "problem_type")


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """The sizes and constants of a DeBERTa-v2 or v3, under Hugging Face's names.

    Attributes:
      vocab_size: number of tokens V.
      hidden_size: width D.
      num_hidden_layers: number of layers L.
      num_attention_heads: heads H; the head size is D / H.
      intermediate_size: feed-forward width F.
      hidden_act: activation of the feed-forward, one of ``ACTIVATIONS``.
      hidden_dropout_prob: dropout after embeddings and projections, and of the
        embeddings of distances.
      attention_probs_dropout_prob: dropout of attention probabilities.
      max_position_embeddings: tokens of the longest text.
      type_vocab_size: rows of the token-type table; 0: there is none.
      initializer_range: standard deviation of new kernels and embeddings.
      layer_norm_eps: epsilon of every LayerNorm.
      relative_attention: whether attention sees distances.
      position_biased_input: whether positions are added to the input.
      pooler_dropout: dropout before the head's first projection.
      pooler_hidden_act: activation behind it.
      share_att_key: whether distances go through the projections of the content.
      cls_dropout: dropout before the classifier; None: ``hidden_dropout_prob``.
      distances: distances from which on all are alike.
      buckets: rows of the table of distances each way; half of them for single
        distances, the others logarithmic. At most -1: one a distance.
      c2p: whether scores have the term of content and position.
      p2c: whether scores have the term of position and content.
      norm_distances: whether the embeddings of distances are normed.
      num_labels: classes of a head, as the config has it.
      raw: the ``config.json`` all this was read from.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    relative_attention: bool
    position_biased_input: bool
    pooler_dropout: float
    pooler_hidden_act: str
    share_att_key: bool
    cls_dropout: float | None
    distances: int
    buckets: int
    c2p: bool
    p2c: bool
    norm_distances: bool
    num_labels: int
    raw: str = dataclasses.field(repr=False)
    model_type: str = "deberta-v2"

    @property
    def span(self) -> int:
        """Half of the rows of the table of distances."""
        return self.buckets if self.buckets > 0 else self.distances


def read_deberta_config(raw: Mapping[str, Any]) -> DebertaConfig:
    """Returns the checked config of a DeBERTa-v2 or v3.

    Args:
      raw: the content of its ``config.json``.

    Raises:
      ValueError: if a field that changes the function has a value that is not
        implemented.
    """
    values = {name: raw.get(name, default) for name, default in _DEFAULTS.items()}
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise ValueError(
            f"`config` field 'hidden_size' {width} is no multiple of "
            f"'num_attention_heads' {heads}."
        )
    same = {"attention_head_size": (None, width // heads)}
    same |= {"pooler_hidden_size": (None, width), "embedding_size": (None, width)}
    refuse(raw, _REFUSED | same)
    for name in ("hidden_act", "pooler_hidden_act"):
        if values[name] not in ACTIVATIONS:
            raise ValueError(
                f"`config` field {name!r} is {values[name]!r}; "
                f"known are {list(ACTIVATIONS)}."
            )
    kinds = raw.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    kinds = {kind.strip() for kind in kinds}
    if kinds - {"c2p", "p2c"}:
        raise ValueError(
            f"`config` field 'pos_att_type' is {raw['pos_att_type']!r}; known are "
            "'c2p' and 'p2c'."
        )
    norms = {x.strip() for x in str(raw.get("norm_rel_ebd", "none")).lower().split("|")}
    if norms - {"none", "layer_norm"}:
        raise ValueError(
            f"`config` field 'norm_rel_ebd' is {raw['norm_rel_ebd']!r}; known are "
            "'none' and 'layer_norm'."
        )
    distances = raw.get("max_relative_positions", -1)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        values[name] = float(values[name])  # some files have 0 for 0.0
    values["pooler_dropout"] = float(values["pooler_dropout"])
    if values["cls_dropout"] is not None:
        values["cls_dropout"] = float(values["cls_dropout"])
    return DebertaConfig(
        **values,
        distances=distances if distances > 0 else values["max_position_embeddings"],
        buckets=raw.get("position_buckets", -1),
        c2p="c2p" in kinds,
        p2c="p2c" in kinds,
        norm_distances="layer_norm" in norms and values["relative_attention"],
        num_labels=count_labels(raw),
        raw=json.dumps(dict(raw), default=str),
    )


def write_deberta_config(
    config: DebertaConfig, head: str | None, num_labels: int
) -> dict[str, Any]:
    """Returns the ``config.json`` of a model, as transformers reads it.

    Args:
      config: what ``read_deberta_config`` returned; its fields are written as read.
      head: None, ``"classification"`` or ``"regression"``.
      num_labels: width of the head.
    """
    content = json.loads(config.raw)
    content = {name: x for name, x in content.items() if name not in _VOLATILE}
    if head is None:
        return {**content, "architectures": ["DebertaV2Model"]}
    content["architectures"] = ["DebertaV2ForSequenceClassification"]
    content["num_labels"] = num_labels
    if head == "regression":
        content["problem_type"] = "regression"
    return content
