"""Tiny configs of every decoder family, and their batches."""

import numpy as np

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # at the usual 0.02 a wrong model passes
}
GEMMA = {"head_dim": 4}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}
LONG = {"short_factor": [1.0, 1.2], "long_factor": [2.0, 3.5]}

CASES = {
    "llama": ("llama", {}),
    "llama-tied-llama3-rope": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 8},
    ),
    "llama-biases-one-key-head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    "llama-linear-rope-old-spelling": (
        "llama",
        {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama-dynamic-rope-beyond": (
        "llama",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 100.0,
                "factor": 2.0,
            },
        },
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows-above": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 500.0}}),
    "qwen3": ("qwen3", {"head_dim": 6, "attention_bias": True}),
    "qwen3-yarn-deepseek-form": (
        "qwen3",
        {
            "head_dim": 12,
            "rope_scaling": {
                **YARN,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "beta_fast": 2,
                "beta_slow": 0.3,
                "truncate": False,
            },
        },
    ),
    "gemma": ("gemma", {**GEMMA, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "sliding_window": 4,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 7,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 10.0,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 5}),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope-short": (
        "phi3",
        {
            "original_max_position_embeddings": 11,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "phi3-longrope-long": (
        "phi3",
        {
            "original_max_position_embeddings": 10,
            "rope_scaling": {"rope_type": "longrope", **LONG},
        },
    ),
    "llama-longrope-own-amplitude": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "original_max_position_embeddings": 10,
                "attention_factor": 1.7,
                "factor": 2.0,
                **LONG,
            }
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-wide-relu": ("gpt2", {"n_inner": 24, "activation_function": "relu"}),
}


def content(case, **changes):
    """A config.json's content."""
    model_type, own = CASES[case]
    sizes = GPT2 if model_type == "gpt2" else SIZES
    return {"model_type": model_type, **sizes, **own, **changes}


def texts(side="right", rows=3, tokens=11):
    """Ids and mask of texts of unequal length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (rows, tokens)).astype(np.int32)
    lengths = np.array([tokens, tokens // 2, 3] * rows)[:rows, None]
    places = np.arange(tokens)[None]
    mask = places < lengths if side == "right" else places >= tokens - lengths
    return np.where(mask, ids, 0).astype(np.int32), mask.astype(np.int32)
