"""How the families of decoders differ, as data."""

from typing import Any, NamedTuple


class Traits(NamedTuple):
    """What no field of a config says: how a family is built.

    Attributes:
      stem: what transformers' classes of it start with.
      fused: whether q, k, v are one projection, and gate, up another.
      head_norms: whether queries and keys are normed, head by head.
      unit_offset: whether norms multiply by 1 + their weight.
      scaled_embedding: whether embeddings are multiplied by sqrt(D).
      sandwich: whether attention and feed-forward are normed behind as well.
    """

    stem: str
    fused: bool = False
    head_norms: bool = False
    unit_offset: bool = False
    scaled_embedding: bool = False
    sandwich: bool = False


_GEMMA = {"unit_offset": True, "scaled_embedding": True}
TRAITS = {
    "llama": Traits("Llama"),
    "mistral": Traits("Mistral"),
    "qwen2": Traits("Qwen2"),
    "qwen3": Traits("Qwen3", head_norms=True),
    "gemma": Traits("Gemma", **_GEMMA),
    "gemma2": Traits("Gemma2", sandwich=True, **_GEMMA),
    "gemma3_text": Traits("Gemma3Text", sandwich=True, head_norms=True, **_GEMMA),
    "phi3": Traits("Phi3", fused=True),
    "gpt2": Traits("GPT2", fused=True),
}

# Models of several parts -> the family of their text part, which alone is read.
WHOLES = {"gemma3": "gemma3_text"}
# Where it lies in transformers' class of the whole, and fields on the other parts.
PART = "language_model."
OTHER_PARTS = (
    *("text_config", "vision_config", "mm_tokens_per_image", "architectures"),
    *("image_token_index", "boi_token_index", "eoi_token_index"),
    *("image_token_id", "boi_token_id", "eoi_token_id"),
)
# Fields that the whole decides, though its text part may have them, too.
OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")

# What transformers assumes for a field that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": None,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_GEMMAS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma": {
        **_GEMMAS,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "sliding_window": None,
    },
    "gemma2": _GEMMAS,
    "gemma3_text": {
        **_GEMMAS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
    },
    "gpt2": {
        "vocab_size": 50257,
        "hidden_size": 768,
        "intermediate_size": None,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
}
SPELLINGS = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_act": "activation_function",
        "max_position_embeddings": "n_positions",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
    },
    "gemma2": {"hidden_act": "hidden_activation"},
    "gemma3_text": {"hidden_act": "hidden_activation"},
}
UNREAD = {  # fields of the table above that a family's class does not look at
    "gpt2": ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias",),
    "mistral": ("attention_bias",),
    "phi3": ("attention_bias",),
}
BIASED = {"qwen2": (True, False), "gpt2": (True, True)}  # q, k, v; output
