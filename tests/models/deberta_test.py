"""DeBERTa-v2 and v3 against transformers on PyTorch, layer by layer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.models._deberta import bucket

# Measured: at most 3e-6, hidden states up to 5.
TOLERANCE = 1e-5

V3 = {  # as the published v3 models are built
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "pooler_dropout": 0,
}
CASES = {
    "v3": V3,
    "own projections": {
        **V3,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "position_biased_input": True,
        "type_vocab_size": 2,
    },
    "every distance, one term": {
        **V3,
        "position_buckets": -1,
        "max_relative_positions": 6,
        "pos_att_type": ["c2p"],
        "share_att_key": False,
    },
    "absolute": {"type_vocab_size": 2, "pooler_hidden_act": "relu"},
}


@pytest.fixture
def config(tiny):
    return lambda case: tiny("deberta-v2", layer_norm_eps=1e-7, **CASES[case])


def build(content, folder):
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**content, num_labels=5)
    ).eval()
    with torch.no_grad():  # nothing may stand at its initial value
        for name, value in theirs.named_parameters():
            value.normal_(mean=1.0 if "LayerNorm.weight" in name else 0.0, std=0.3)
    theirs.save_pretrained(folder)
    return theirs


def run_torch(theirs, ids, mask, types):
    import torch

    with torch.no_grad():
        out = theirs(
            *(torch.tensor(x).long() for x in (ids, mask, types)),
            output_hidden_states=True,
        )
    return out.logits.numpy(), [x.numpy() for x in out.hidden_states]


@pytest.mark.interop
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(config, batch, tmp_path, case):
    content = config(case)
    theirs = build(content, tmp_path)
    ids, mask, types = batch(content, tokens=15)
    types = types % 2
    wanted, expected = run_torch(theirs, ids, mask, types)
    for scan_layers in (False, True):
        model, params = models.load(
            tmp_path, head="classification", scan_layers=scan_layers
        )
        run = jax.jit(lambda *args, m=model: m.apply(*args, hidden_states=True))
        logits, states = run({"params": params}, ids, mask, types)
        for layer, (ours, other) in enumerate(zip(states, expected, strict=True)):
            np.testing.assert_allclose(ours, other, atol=TOLERANCE, err_msg=f"{layer}")
        np.testing.assert_allclose(logits, wanted, atol=TOLERANCE)
    assert np.abs(wanted).max() > 0.3
    names = {
        f"{row.theirs.format(i=i)}.weight"
        for row in model.names
        for i in range(2 if "{i}" in row.theirs else 1)
    }
    assert names == {name for name in theirs.state_dict() if name.endswith("weight")}
    again = models.from_config(json.loads(json.dumps(model.hf_config)))
    assert again.config.num_labels == 5

    if case != "v3":
        return
    for mistake in (
        {"buckets": -1, "distances": 4},
        {"norm_distances": False},
        {"c2p": False},
        {"p2c": False},
    ):
        changed = dataclasses.replace(model.config, **mistake)
        run = jax.jit(model.clone(config=changed).apply)
        wrong = run({"params": params}, ids, mask)
        assert np.abs(wrong - wanted).max() > 1e-2, mistake


@pytest.mark.interop
@pytest.mark.parametrize("case", [None, *CASES])
def test_what_a_config_leaves_out(config, case):
    import transformers

    raw = config(case) if case else {"model_type": "deberta-v2"}
    theirs = transformers.AutoConfig.for_model(**raw).to_dict()
    ours, same = (
        dataclasses.replace(models.from_config(x).config, raw="") for x in (raw, theirs)
    )
    assert ours == same


@pytest.mark.interop
def test_buckets():
    import torch
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs

    for buckets, bound in ((256, 512), (4, 20), (32, 128)):
        steps = np.arange(1 - bound, bound)
        wanted = theirs.make_log_bucket_position(torch.tensor(steps), buckets, bound)
        got = bucket(steps, buckets, bound)
        np.testing.assert_array_equal(got, wanted.numpy())
        assert got[0] == 1 - buckets and len(np.unique(got)) == 2 * buckets - 1


def test_the_parameter_tree_and_golden_count():
    """Published: DeBERTa-v3-base has 183.8M parameters without a head."""
    v3 = {
        "model_type": "deberta-v2",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        **V3,
        "position_buckets": 256,
    }
    tree = models.abstract(models.from_config(v3, scan_layers=True))
    shapes = {k: x.shape for k, x in flatten_dict(tree, sep="/").items()}
    assert shapes["encoder/rel_embeddings/embedding"] == (512, 768)
    assert shapes["encoder/layer/attention/query_proj/kernel"] == (12, 768, 768)
    assert "embeddings/position_embeddings/embedding" not in shapes
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 183_831_552


def test_adapters_and_gradients(config, batch):
    """A shared projection serves content and distances; its adapter does both."""
    content = config("v3")
    model = models.from_config(
        content, head="classification", scan_layers=True, remat="names"
    )
    params = models.init(model, jax.random.key(0))
    ids, mask, _ = batch(content)
    adapted = jp.attach(
        params,
        jp.lora(rank=2),
        ["query_proj", "value_proj"],
        key=jax.random.key(1),
        axes=model.axes,
    )
    trainable, frozen = jp.partition(adapted)
    trainable = jax.tree.map(lambda x: x + 0.3, trainable)

    @jax.jit
    def run(trainable):
        tree = jp.combine(trainable, frozen)
        logits = jp.adapt(model.apply)({"params": tree}, ids, mask)
        return jnp.square(logits).sum(), logits

    (_, logits), grads = jax.value_and_grad(run, has_aux=True)(trainable)
    merged = jp.merge(jp.combine(trainable, frozen))
    plain = jax.jit(model.clone(remat=None).apply)({"params": merged}, ids, mask)
    np.testing.assert_allclose(logits, plain, atol=TOLERANCE)
    base = jax.jit(model.clone(remat=None).apply)({"params": params}, ids, mask)
    assert np.abs(plain - base).max() > 0.01
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_bfloat16_and_dropout(config, batch):
    content = config("own projections")
    ids, mask, _ = batch(content)
    exact = models.from_config({**content, "initializer_range": 0.1}, scan_layers=True)
    params = models.init(exact, jax.random.key(0))
    wanted = jax.jit(exact.apply)({"params": params}, ids, mask)
    model = exact.clone(dtype=jnp.bfloat16)
    got = jax.jit(model.apply)({"params": params}, ids, mask)
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(jnp.float32) - wanted).max()
    assert 0 < error < 0.1 * np.abs(wanted).max()
    dropped = jax.jit(
        lambda params, key: exact.apply(
            {"params": params}, ids, mask, deterministic=False, rngs={"dropout": key}
        )
    )(params, jax.random.key(1))
    assert np.abs(dropped - wanted).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_kernel_size": 3}, "'conv_kernel_size' is 3.*only 0 is"),
        ({"embedding_size": 8}, "'embedding_size' is 8.*only 16 is"),
        ({"attention_head_size": 8}, "'attention_head_size' is 8.*only 4 is"),
        ({"pos_att_type": "p2p"}, "'pos_att_type' is 'p2p'; known are"),
        ({"norm_rel_ebd": "batch"}, "'norm_rel_ebd' is 'batch'; known are"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'; known are"),
        ({"hidden_size": 18}, "'hidden_size' 18 is no multiple"),
    ],
)
def test_refusals(config, changes, message):
    with pytest.raises(ValueError, match=message):
        models.from_config({**config("v3"), **changes})


def test_too_long_a_text(config):
    model = models.from_config(config("v3"))
    ids = jax.ShapeDtypeStruct((1, 21), jnp.int32)
    with pytest.raises(ValueError, match="21 tokens; the model allows 20. Truncate"):
        jax.eval_shape(model.apply, {"params": models.abstract(model)}, ids)
