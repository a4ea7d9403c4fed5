"""Gemma 3 with vision: its text part, in and out, against transformers and PEFT."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from families_toolbox import config_of, scrambled

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.interop import load_peft, save_hf, save_peft

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 40,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 7,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IDS = np.random.default_rng(0).integers(3, 55, (2, 9)).astype(np.int32)
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """transformers' folder of the whole model, and its logits of a text."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
        eos_token_id=[1, 5],
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not all alike
            parameter.data = 0.3 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("gemma3") / "base"
    model.save_pretrained(folder)
    return folder, logits_of(model)


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


def apply(model, params):
    return model.apply({"params": params}, IDS)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


SPELLINGS = {
    "today's files": lambda name: name,
    "modules": lambda name: (
        "lm_head.weight"
        if name == "language_model.lm_head.weight"
        else "model." + name.replace("language_model.model.", "language_model.", 1)
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_text_part_loads(base, tmp_path, spelling, scan_layers, caplog):
    folder, wanted = base
    tensors = {SPELLINGS[spelling](n): x for n, x in tensors_of(folder).items()}
    assert ("model.vision_tower.head.probe" in tensors) == (spelling == "modules")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = config_file(folder)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO):
        model, params = models.load(tmp_path, head="causal_lm", scan_layers=scan_layers)
    told = [x.getMessage() for x in caplog.records if "not used" in x.getMessage()]
    assert len(told) == 1 and "vision_tower" in told[0] and len(told[0]) < 500
    assert_close(apply(model, params), wanted)
    assert model.config.model_type == model.hf_config["model_type"] == "gemma3_text"
    assert model.hf_config["eos_token_id"] == [1, 5]
    assert "vision_config" not in model.hf_config
    assert model.stop_tokens == (1, 5)


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def config_file(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_config_of_few_fields(base, tmp_path):
    """As Google published them: what is usual is left out."""
    folder, wanted = base
    config = config_file(folder)
    usual = {"vocab_size", "tie_word_embeddings", "layer_types", "eos_token_id"}
    usual |= {"bos_token_id", "pad_token_id"}
    text = {n: x for n, x in config["text_config"].items() if n not in usual}
    config = {n: x for n, x in config.items() if n != "tie_word_embeddings"}
    shape = models.abstract(models.from_config(config | {"text_config": text}))
    assert shape["embed_tokens"]["embedding"].shape == (262208, 16)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"text_config": text | {"vocab_size": 64}})
    )
    source = folder / "model.safetensors"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    model, params = models.load(tmp_path, head="causal_lm")
    assert_close(apply(model, params), wanted)
    for inner, match in (
        ({"model_type": "gemma3n_text"}, "'text_config' of 'gemma3n_text'; only 'gem"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ):
        with pytest.raises(ValueError, match=match):
            models.from_config(config | {"text_config": text | inner})
    with pytest.raises(ValueError, match="quantization_config"):
        models.from_config(config | {"quantization_config": {"bits": 4}})


def test_a_merged_folder_is_a_text_model(base, tmp_path):
    import torch
    import transformers

    folder, plain = base
    (folder / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    model, params = models.load(folder, head="causal_lm")
    key = jax.random.key(0)
    adapted = scrambled(jp.attach(params, jp.lora(2), TARGETS, key=key))
    ours = apply(model, jp.merge(adapted))
    assert np.abs(ours - plain).max() > 0.1
    for source in (None, folder):
        out = tmp_path / f"{source is None}"
        options = {"names": model.names, "config": model.hf_config, "source": source}
        save_hf(adapted, out, **options)
        theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        assert not any(told.values())
        assert type(theirs).__name__ == "Gemma3ForCausalLM"
        assert theirs.config.eos_token_id == [1, 5]
        assert_close(ours, logits_of(theirs.eval()))
        again = models.load(out, head="causal_lm")
        np.testing.assert_array_equal(apply(*again), ours)
        called = {row.theirs for row in again[0].names}
        assert "model.layers.{i}.self_attn.q_proj" in called
        assert not (out / "preprocessor_config.json").exists()
        assert (out / "tokenizer.json").exists() == (source is not None)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_an_adapter_goes_to_peft_and_back(base, oracle, tmp_path, scan_layers):
    """Its keys are those of the whole model, and its targets none of the vision's."""
    import transformers

    folder, plain = base
    model, params = models.load(folder, head="causal_lm", scan_layers=scan_layers)
    key = jax.random.key(0)
    axes = {"axes": model.axes} if scan_layers else {}
    adapted = scrambled(jp.attach(params, jp.lora(2), TARGETS, key=key, **axes))
    saved = save_peft(
        adapted, tmp_path / "a", names=model.names, task_type="CAUSAL_LM", **axes
    )
    assert saved.sites[0] == "model.language_model.layers.0.self_attn.q_proj"
    assert set(config_of(saved.folder)["target_modules"]) == set(saved.sites)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = oracle.peft.PeftModel.from_pretrained(whole, saved.folder).eval()
    assert_close(logits_of(theirs), apply(model, jp.merge(adapted)))
    vision = [n for n, _ in theirs.named_parameters() if "vision" in n and "lora" in n]
    assert vision == []
    assert np.abs(logits_of(theirs) - plain).max() > 0.1

    regex = r"model\.language_model\..*\.(v|gate)_proj"
    config = oracle.peft.LoraConfig(r=2, target_modules=regex, task_type="CAUSAL_LM")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = oracle.adapt(whole, config, 3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_peft(tmp_path / "theirs", params, names=model.names, **axes)
    assert_close(logits_of(theirs), apply(model, jp.merge(again)))

    wide = oracle.peft.LoraConfig(r=2, target_modules=["q_proj"])  # the vision's, too
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    oracle.adapt(whole, wide, 3).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="left over: .*vision_tower.*q_proj.lora_A"):
        load_peft(tmp_path / "wide", params, names=model.names, **axes)


def test_heads(base, tmp_path):
    """Without a head, and for classification, as transformers' classes have them."""
    import torch
    import transformers

    folder, _ = base
    model, params = models.load(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(IDS).long()).last_hidden_state.numpy()
    assert_close(apply(model, params), wanted)
    modules = {name for name, _ in theirs.named_modules()}
    assert {row.theirs.replace("{i}", "0") for row in model.names} <= modules
    assert model.names[0].saved == "embed_tokens"

    model, params = models.load(
        folder, head="classification", num_labels=3, key=jax.random.key(0)
    )
    save_hf(params, tmp_path / "m", names=model.names, config=model.hf_config)
    theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(told.values())
    ours = apply(model, params)
    assert_close(ours, logits_of(theirs.eval()))
    assert jnp.unique(ours).size > 1
