"""A tiny Llama with a tokenizer, in a folder, and sums for it."""

import json

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from jaxpeft import models

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "+", "=", *map(str, range(20))]
SHAPE = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def write_llama(folder):
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
    ).save_pretrained(folder)
    model = models.from_config(SHAPE, head="causal_lm")
    params = models.init(model, jax.random.key(7))
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        module, _, kind = path.rpartition("/")
        turned = leaf.T if kind == "kernel" else leaf
        name = module.replace("layer_", "").replace("/", ".")
        tensors[f"model.{name}.weight"] = np.ascontiguousarray(turned)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    rows = [
        {"q": f"{a} + {b} =", "a": f" {a + b}"} for a in range(10) for b in range(10)
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "sums.jsonl").write_text(text)
