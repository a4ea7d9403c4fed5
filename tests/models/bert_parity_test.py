"""BERT and RoBERTa against transformers on PyTorch, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import models

pytestmark = pytest.mark.interop

# Measured: at most 3.4e-6 over all cases, hidden states up to 5.6.
TOLERANCE = 1e-5

CASES = {
    "bert": ("bert", {}),
    "bert-three-heads": (
        "bert",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "layer_norm_eps": 1e-2,
            "type_vocab_size": 3,
        },
    ),
    "bert-one-layer": ("bert", {"num_hidden_layers": 1, "pad_token_id": 5}),
    "bert-gelu_new": ("bert", {"hidden_act": "gelu_new"}),
    "bert-gelu_pytorch_tanh": ("bert", {"hidden_act": "gelu_pytorch_tanh"}),
    "bert-relu": ("bert", {"hidden_act": "relu"}),
    "bert-silu": ("bert", {"hidden_act": "silu"}),
    "roberta": ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-pad-two": ("roberta", {"pad_token_id": 2, "bos_token_id": 1}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request, tiny, tmp_path):
    """A torch model with a head, its folder and its config."""
    import torch
    import transformers

    model_type, changes = CASES[request.param]
    config = tiny(model_type, **changes)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**config, num_labels=5)
    ).eval()
    with torch.no_grad():  # nothing may stand at its initial value
        for name, value in theirs.named_parameters():
            value.normal_(mean=1.0 if "LayerNorm.weight" in name else 0.0, std=0.3)
    theirs.save_pretrained(tmp_path)
    return theirs, tmp_path, config


def run(model, params, ids, mask=None, types=None):
    return model.apply({"params": params}, ids, mask, types, hidden_states=True)


def run_torch(model, ids, mask, types):
    import torch

    with torch.no_grad():
        out = model(
            *(
                None if x is None else torch.tensor(x).long()
                for x in (ids, mask, types)
            ),
            output_hidden_states=True,
        )
    return [x.numpy() for x in (out[0], *out.hidden_states)]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_hidden_states_and_logits(case, batch, scan_layers):
    theirs, folder, config = case
    ids, mask, types = batch(config)
    model, params = models.load(folder, head="classification", scan_layers=scan_layers)
    logits, states = run(model, params, ids, mask, types)
    expected_logits, *expected = run_torch(theirs, ids, mask, types)
    assert states.shape[0] == len(expected) == config["num_hidden_layers"] + 1
    for layer, (ours, wanted) in enumerate(zip(states, expected, strict=True)):
        # padding too: what transformers computes there is a function as well
        np.testing.assert_allclose(ours, wanted, atol=TOLERANCE, err_msg=f"{layer}")
    np.testing.assert_allclose(logits, expected_logits, atol=TOLERANCE)
    assert np.abs(expected_logits).max() > 0.3


def test_defaults_without_mask_and_types(case, batch):
    theirs, folder, config = case
    ids, _, _ = batch(config)
    model, params = models.load(folder)
    _, states = run(model, params, ids)
    np.testing.assert_allclose(
        states[-1], run_torch(theirs, ids, np.ones_like(ids), None)[-1], atol=TOLERANCE
    )


@pytest.mark.parametrize("mistake", ["mask", "types", "gelu", "epsilon", "positions"])
def test_negative_controls(tiny, batch, tmp_path, mistake):
    """What parity would catch: each mistake is far outside the tolerance."""
    import torch
    import transformers

    config = tiny("roberta" if mistake == "positions" else "bert")
    torch.manual_seed(0)
    theirs = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(**config), add_pooling_layer=False
    ).eval()
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    ids, mask, types = batch(config)
    right = run_torch(theirs, ids, mask, types)[-1]
    np.testing.assert_allclose(
        run(model, params, ids, mask, types)[0], right, atol=TOLERANCE
    )
    if mistake == "gelu":
        model = models.from_config({**config, "hidden_act": "gelu_new"})
    if mistake == "epsilon":
        model = models.from_config({**config, "layer_norm_eps": 1e-3})
    if mistake == "positions":
        params["embeddings"]["position_embeddings"]["embedding"] = jnp.roll(
            params["embeddings"]["position_embeddings"]["embedding"], 1, axis=0
        )
    wrong, _ = run(
        model,
        params,
        ids,
        None if mistake == "mask" else mask,
        None if mistake == "types" else types,
    )
    # measured: gelu and epsilon about 1e-3, the others about 1
    assert np.abs(wrong - right)[mask == 1].max() > 20 * TOLERANCE


def test_minilm_from_its_wheel(minilm_folder):
    import transformers

    theirs = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    texts = [
        "How many feet are in a mile?",
        "What is the length of a mile in feet?",
        "Who painted the ceiling of the Sistine Chapel, and how long did it take him?",
    ]
    tokens = models.tokenizer("minilm")(texts, padding=True, return_tensors="np")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    out = run_torch(theirs, ids, mask, tokens["token_type_ids"])
    for scan_layers in (False, True):
        model, params = models.load("minilm", scan_layers=scan_layers)
        last, states = jax.jit(run, static_argnums=0)(model, params, ids, mask)
        np.testing.assert_array_equal(last, states[-1])
        for ours, wanted in zip(states, out[1:], strict=True):
            np.testing.assert_allclose(ours, wanted, atol=TOLERANCE)
    pooled = models.mean_pool(last, mask)
    weight = mask[:, :, None].astype(np.float32)
    expected = (out[0] * weight).sum(1) / weight.sum(1)
    np.testing.assert_allclose(pooled, expected, atol=TOLERANCE)
    unit = pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert alike[0, 1] > 0.7 > 0.3 > alike[0, 2]  # the two miles belong together


def test_new_weights_are_drawn_as_transformers_draws_them(tiny):
    import transformers

    config = tiny("bert", hidden_size=64, initializer_range=0.07)
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**config)
    ).state_dict()
    model = models.from_config(config, head="classification")
    params = models.init(model, jax.random.key(0))
    wanted = theirs["bert.encoder.layer.1.intermediate.dense.weight"].std()
    ours = params["encoder"]["layer_1"]["intermediate"]["dense"]
    assert abs(float(ours["kernel"].std()) / float(wanted) - 1) < 0.1
    assert np.all(ours["bias"] == 0)
    assert np.all(params["embeddings"]["LayerNorm"]["scale"] == 1)
    table = params["embeddings"]["word_embeddings"]["embedding"]
    assert abs(float(table.std()) / 0.07 - 1) < 0.1


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_what_a_config_leaves_out(model_type):
    import transformers

    theirs = transformers.AutoConfig.for_model(model_type)
    ours = models.from_config({"model_type": model_type}).config
    for field in dataclasses.fields(ours):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
