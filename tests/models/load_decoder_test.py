"""Decoders' checkpoints: tied heads, what is listed, memory while loading."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_toolbox import assert_same
from decoder_toolbox import content
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import models
from jaxpeft.models import _checkpoint as checkpoint
from jaxpeft.models import _load


def tensors_of(model, dtype=np.float32):
    """A checkpoint that fits: names and shapes from the unrolled model."""
    shapes = {
        path: leaf.shape
        for path, leaf in flatten_dict(models.abstract(model), sep="/").items()
    }
    rng = np.random.default_rng(0)
    found = {}
    for row in model.names:
        for i in range(model.config.num_hidden_layers if "{i}" in row.theirs else 1):
            for leaf, tensor in (
                ("kernel", "weight"),
                ("embedding", "weight"),
                ("scale", "weight"),
                ("bias", "bias"),
            ):
                path = f"{row.ours.format(i=i)}/{leaf}"
                if path in shapes:
                    shape = shapes[path]
                    turned = leaf == "kernel" and row.kind == "linear"
                    found[f"{row.theirs.format(i=i)}.{tensor}"] = rng.normal(
                        size=shape[::-1] if turned else shape
                    ).astype(dtype)
    return found


def write(folder, config, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_tied_heads(tmp_path, caplog):
    config = content("llama", tie_word_embeddings=True)
    tied = models.from_config(config, head="causal_lm")
    tensors = tensors_of(tied)
    assert "lm_head.weight" not in tensors
    _, wanted = models.load(write(tmp_path / "none", config, tensors), head="causal_lm")
    table = tensors["model.embed_tokens.weight"]

    same = {**tensors, "lm_head.weight": table.copy()}
    folder = write(tmp_path / "same", config, same)
    with caplog.at_level("INFO"):
        assert_same(models.load(folder, head="causal_lm")[1], wanted)
    assert "not used by this model: lm_head.weight" in caplog.text

    other = {**tensors, "lm_head.weight": table + 1}
    folder = write(tmp_path / "other", config, other)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tok"):
        models.load(folder, head="causal_lm")
    models.load(folder)  # without the head it does not matter

    untied = content("llama")
    folder = write(tmp_path / "untied", untied, tensors)
    with pytest.raises(ValueError, match=r"1 missing:\s+lm_head.weight"):
        models.load(folder, head="causal_lm", key=jax.random.key(0))
    folder = write(tmp_path / "own", untied, other)
    _, params = models.load(folder, head="causal_lm")
    np.testing.assert_array_equal(params["lm_head"]["kernel"], (table + 1).T)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    config = content("qwen2")
    tensors = tensors_of(models.from_config(config, head="causal_lm"))
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(16, np.float32)
    tensors["model.norm.weight"] = np.zeros(15, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    folder = write(tmp_path / "model", config, tensors)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        models.load(folder, head="causal_lm", scan_layers=True)
    text = str(caught.value)
    assert "1 missing:\n    layers.1.self_attn.k_proj.bias (nearest:" in text
    assert "1 unused:\n    model.layers.0.self_attn.o_proj.bias" in text
    assert "norm.weight: [15] in the file, [16] in the model" in text
    assert "inv_freq" not in text


def test_a_new_score_is_drawn_and_said(tmp_path, caplog):
    config = content("llama")
    tensors = tensors_of(models.from_config(config, head="causal_lm"))
    folder = write(tmp_path / "model", config, tensors)
    with pytest.raises(ValueError, match=r"`key` is needed.*no \['score'\]"):
        models.load(folder, head="classification", num_labels=3)
    _, params = models.load(
        folder, head="classification", num_labels=3, key=jax.random.key(0)
    )
    assert params["score"]["kernel"].shape == (16, 3)
    assert caplog.text.count("drawn at random: score/kernel") == 1
    assert "not used by this model: lm_head.weight" in caplog.text


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "mesh"])
def test_stacks_layer_by_layer(tmp_path, monkeypatch, sharded):
    config = content("gemma2")
    tensors = tensors_of(models.from_config(config, head="causal_lm"))
    folder = write(tmp_path / "model", config, tensors, shards=3)
    mesh = jax.make_mesh(
        (2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )

    def place(path, shape):
        spec = (None, "x", "y") if len(shape) == 3 else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    options = {"scan_layers": True, "sharding": place if sharded else None}
    _, wanted = models.load(folder, **options)
    monkeypatch.setattr(_load, "AT_ONCE", 0)
    monkeypatch.setattr(checkpoint, "CHUNK", 100)  # a few rows at a time
    seen, make = [], _load._make_by_layer
    monkeypatch.setattr(
        _load, "_make_by_layer", lambda *args: seen.append(1) or make(*args)
    )
    _, got = models.load(folder, **options)
    assert len(seen) == 11  # kernels and norms of a layer
    assert_same(got, wanted)
    for path, leaf in flatten_dict(got, sep="/").items():
        assert leaf.sharding == flatten_dict(wanted, sep="/")[path].sharding, path


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_memory_while_loading(tmp_path, monkeypatch, scan_layers):
    """Beside what is placed, the host holds one tensor and a chunk of it."""
    config = content(
        "llama",
        hidden_size=256,
        intermediate_size=1792,
        num_hidden_layers=8,
        vocab_size=4096,
        head_dim=64,
    )
    model = models.from_config(config, head="causal_lm")
    tensors = tensors_of(model, jnp.bfloat16)
    folder = write(tmp_path / "model", config, tensors, shards=4)
    largest = max(leaf.nbytes for leaf in tensors.values())
    total = sum(leaf.nbytes for leaf in tensors.values())
    del tensors
    monkeypatch.setattr(_load, "AT_ONCE", 0)
    monkeypatch.setattr(checkpoint, "CHUNK", largest // 16)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    options = {"head": "causal_lm", "scan_layers": scan_layers, "sharding": place}
    models.load(folder, **options)  # whatever is imported and compiled once
    make, peaks, depth = _load._make, [], []

    def measured(*args):
        if depth:  # one layer of a stack, which is measured as a whole
            return make(*args)
        depth.append(1)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        leaf = make(*args)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        depth.clear()
        return leaf

    monkeypatch.setattr(_load, "_make", measured)
    tracemalloc.start()
    _, params = models.load(folder, **options)
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    assert len(peaks) == len(sizes) and sum(sizes) == total
    assert max(sizes) > (3 if scan_layers else 0.9) * largest
    # measured: 1.13 (the runtime may hold two layers of a stack at a time)
    assert max(peaks) < 1.2 * largest
