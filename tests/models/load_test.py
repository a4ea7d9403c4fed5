"""Checkpoints into trees: every tensor in its place, what is new said."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_toolbox import D, L, P, V, assert_same, flat, tensors

from jaxpeft import models


def test_every_tensor_finds_its_place(write):
    content = tensors()
    model, params = models.load(write(content), head="classification", num_labels=3)
    got = flat(params)
    assert {k: v.shape for k, v in got.items()} == {
        k: v.shape for k, v in flat(models.abstract(model)).items()
    }
    for path, name in {
        "embeddings/word_embeddings/embedding": "embeddings.word_embeddings.weight",
        "embeddings/LayerNorm/scale": "embeddings.LayerNorm.weight",
        "encoder/layer_0/attention/query/bias": (
            "encoder.layer.0.attention.self.query.bias"
        ),
        "encoder/layer_1/output/LayerNorm/bias": (
            "encoder.layer.1.output.LayerNorm.bias"
        ),
    }.items():
        np.testing.assert_array_equal(got[path], content[f"bert.{name}"])
    for path, name in {
        "encoder/layer_1/attention/key/kernel": (
            "bert.encoder.layer.1.attention.self.key.weight"
        ),
        "encoder/layer_0/intermediate/dense/kernel": (
            "bert.encoder.layer.0.intermediate.dense.weight"
        ),
        "pooler/dense/kernel": "bert.pooler.dense.weight",
        "classifier/kernel": "classifier.weight",
    }.items():
        np.testing.assert_array_equal(got[path], content[name].T)


def test_the_scanned_tree_is_the_stack_of_the_unrolled(write):
    folder = write(tensors())
    _, plain = models.load(folder)
    _, stacked = models.load(folder, scan_layers=True)
    plain, stacked = flat(plain), flat(stacked)
    assert {p.replace("layer_0", "layer") for p in plain if "layer_1" not in p} == set(
        stacked
    )
    for path, leaf in stacked.items():
        if "/layer/" in path:
            for i in range(L):
                one = plain[path.replace("/layer/", f"/layer_{i}/")]
                np.testing.assert_array_equal(leaf[i], one)
        else:
            np.testing.assert_array_equal(leaf, plain[path])


def test_spellings_of_the_same_checkpoint(write):
    """Shards, no prefix, old names: one tree."""
    content = tensors()
    options = {"head": "classification", "num_labels": 3}
    _, wanted = models.load(write(content), **options)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): leaf
        for name, leaf in content.items()
    }
    bare = {name.removeprefix("bert."): leaf for name, leaf in content.items()}
    for folder in (
        write(content, shards=3, folder="shards"),
        write(old, folder="old"),
        write(bare, folder="bare"),
    ):
        assert_same(models.load(folder, **options)[1], wanted)


def test_the_single_file_wins_over_the_index(write):
    content = tensors()
    folder = write(content, shards=2)
    other = {name: leaf + 1 for name, leaf in content.items()}
    safetensors.numpy.save_file(other, folder / "model.safetensors")
    table = models.load(folder)[1]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(
        table, other["bert.embeddings.word_embeddings.weight"]
    )


def test_the_pooler_is_kept_and_the_classifier_drawn(write, caplog):
    content = tensors(classifier=False)
    folder = write(content)
    with pytest.raises(ValueError, match=r"`key` is needed.*no \['classifier'\]"):
        models.load(folder, head="classification", num_labels=4)
    caplog.clear()
    model, params = models.load(
        folder, head="classification", num_labels=4, key=jax.random.key(3)
    )
    np.testing.assert_array_equal(
        params["pooler"]["dense"]["kernel"], content["bert.pooler.dense.weight"].T
    )
    assert params["classifier"]["kernel"].shape == (D, 4)
    whole = models.init(model, jax.random.key(3))
    np.testing.assert_array_equal(
        params["classifier"]["kernel"], whole["classifier"]["kernel"]
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(
        "NOT in the checkpoint, drawn at random: classifier/kernel, classifier/bias"
    )


def test_a_masked_language_model_gives_its_body(write, caplog):
    """Buffers and other heads are reported, once, and not used."""
    extra = {"lm_head__dense__weight": (D, D), "lm_head__bias": (V,)}
    content = tensors("roberta.", pooler=False, classifier=False, **extra)
    content["roberta.embeddings.position_ids"] = np.arange(P)[None]
    folder = write(content, "roberta")
    with caplog.at_level(logging.INFO):
        _, params = models.load(folder, head="regression", key=jax.random.key(0))
    assert list(params["classifier"]) == ["dense", "out_proj"]
    (record,) = caplog.records
    assert (
        "not used by this model: lm_head.bias, lm_head.dense.weight, "
        "roberta.embeddings.position_ids;" in record.getMessage()
    )


def test_without_a_head_the_head_is_not_read(write, caplog):
    with caplog.at_level(logging.INFO):
        _, params = models.load(write(tensors()))
    assert sorted(params) == ["embeddings", "encoder"]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "classifier.weight" in record.getMessage()
    assert "bert.pooler.dense.bias" in record.getMessage()


def test_a_token_classifier_is_not_taken_for_ours(write, caplog):
    folder = write(tensors(), architectures=["BertForTokenClassification"])
    _, params = models.load(
        folder, head="classification", num_labels=3, key=jax.random.key(0)
    )
    assert np.all(params["classifier"]["bias"] == 0)
    assert "drawn at random: classifier/kernel" in caplog.text


def test_dtypes(write):
    content = tensors()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    content[name] = content[name].astype(jnp.bfloat16)  # files may mix
    folder = write(content)
    model, params = models.load(folder)
    query = [params["encoder"][f"layer_{i}"]["attention"]["query"] for i in range(L)]
    assert [q["kernel"].dtype for q in query] == [jnp.bfloat16, jnp.float32]
    assert (model.dtype, model.param_dtype) == (jnp.float32, jnp.float32)
    _, stacked = models.load(folder, scan_layers=True)
    assert (
        stacked["encoder"]["layer"]["attention"]["query"]["kernel"].dtype == "float32"
    )

    model, half = models.load(folder, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        half["encoder"]["layer_1"]["output"]["dense"]["kernel"],
        content["bert.encoder.layer.1.output.dense.weight"].T.astype(jnp.bfloat16),
    )
    model, params = models.load(folder, dtype="bfloat16", param_dtype=jnp.float32)
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    wide = write(tensors(dtype=np.float64), folder="wide")
    model, params = models.load(wide)  # JAX has no float64 here
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half = write(tensors(dtype=jnp.bfloat16), folder="half")
    model, params = models.load(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert model.dtype == model.param_dtype == jnp.bfloat16
