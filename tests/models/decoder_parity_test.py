"""Every decoder family against transformers on PyTorch, layer by layer."""

import dataclasses

import numpy as np
import pytest
from decoder_toolbox import CASES, content, texts

from jaxpeft import models
from jaxpeft.models._decoder_families import TRAITS

pytestmark = pytest.mark.interop

# Times the largest value compared. Measured: at most 3.3e-6.
TOLERANCE = 1e-5


def build(case, cls="AutoModelForCausalLM", **changes):
    """A torch model with nothing at its initial value."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**content(case, **changes))
    theirs = getattr(transformers, cls).from_config(config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.normal_(mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.3)
    return theirs


def run_torch(theirs, ids, mask=None):
    import torch

    with torch.no_grad():
        out = theirs(
            torch.tensor(ids).long(),
            attention_mask=None if mask is None else torch.tensor(mask),
            output_hidden_states=True,
        )
    return out.logits.numpy(), [state.numpy() for state in out.hidden_states]


def assert_close(ours, wanted, message=""):
    ours, wanted = np.asarray(ours), np.asarray(wanted)
    limit = TOLERANCE * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(ours, wanted, atol=limit, rtol=0, err_msg=message)


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case, tmp_path):
    theirs = build(case)
    theirs.save_pretrained(tmp_path)
    side = "left" if "llama" in case else "right"
    ids, mask = texts(side)
    wanted, expected = run_torch(theirs, ids, mask)
    real = mask.astype(bool)
    twice = case in ("llama", "gemma3", "qwen2-windows-above", "gpt2")
    where = {"positions": np.arange(ids.shape[1])[None]} if "beyond" in case else {}
    for scan_layers in (True, False) if twice else (False,):
        model, params = models.load(tmp_path, head="causal_lm", scan_layers=scan_layers)
        logits, states = model.apply(
            {"params": params}, ids, mask, hidden_states=True, **where
        )
        assert len(states) == len(expected) == model.config.num_hidden_layers + 1
        for i, (ours, other) in enumerate(zip(states, expected, strict=True)):
            assert_close(ours[real], other[real], f"{i} {scan_layers}")
        assert_close(logits[real], wanted[real], f"{scan_layers}")
    plain, _ = run_torch(theirs, ids)
    # causal and windows by kind alone
    logits = model.apply({"params": params}, ids, **where)
    assert_close(logits, plain)
    assert np.abs(wanted).max() > 1 and np.abs(plain - wanted)[-1].max() > 0.01


MISTAKES = {
    "mask": ("llama", {}),
    "theta": ("llama", {"rope": "theta"}),
    "half of the heads' features": ("llama", {"rope": "dims"}),
    "llama3": ("llama-tied-llama3-rope", {"rope": "rope_type"}),
    "linear": ("llama-linear-rope-old-spelling", {"rope": "rope_type"}),
    "dynamic": ("llama-dynamic-rope-beyond", {"rope": "rope_type"}),
    "yarn": ("qwen2-yarn", {"rope": "rope_type"}),
    "yarn's amplitude": ("qwen2-yarn", {"rope": "amplitude"}),
    "yarn's bounds": ("qwen3-yarn-deepseek-form", {"rope": "truncate"}),
    "longrope's lists": ("phi3-longrope-long", {"rope": "original"}),
    "epsilon": ("llama", {"layer_norm_eps": 1e-2}),
    "window one longer": ("mistral", {"sliding_window": 5}),
    "windows in the wrong layers": (
        "gemma3",
        {"layer_types": ("full_attention", "sliding_attention", "full_attention")},
    ),
    "cap of scores": ("gemma2", {"attn_logit_softcapping": 50.0}),
    "cap of logits": ("gemma2", {"final_logit_softcapping": None}),
    "scale": ("gemma2", {"attention_scale": 0.5}),
    "activation": ("gpt2", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_negative_controls(mistake, tmp_path):
    """What parity would catch: each mistake is far outside the tolerance."""
    case, changes = MISTAKES[mistake]
    theirs = build(case)
    theirs.save_pretrained(tmp_path)
    ids, mask = texts("left")
    wanted, _ = run_torch(theirs, ids, mask)
    model, params = models.load(tmp_path, head="causal_lm")
    config = model.config
    if "rope" in changes:
        field = changes["rope"]
        value = {
            "theta": 50.0,
            "dims": 2,
            "rope_type": "default",
            "amplitude": 1.0,
            "truncate": True,
            "original": 11,
        }[field]
        changes = {
            "rope": tuple((k, r._replace(**{field: value})) for k, r in config.rope)
        }
    wrong = model.clone(config=dataclasses.replace(config, **changes)).apply(
        {"params": params},
        ids,
        None if mistake == "mask" else mask,
        positions=np.arange(ids.shape[1])[None],
    )
    gap = np.abs(wrong - wanted)[mask.astype(bool)].max()
    # measured, relative: the activation 1.7e-4, all others above 0.1
    assert gap > 10 * TOLERANCE * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_classification(case, tmp_path):
    theirs = build(case, "AutoModelForSequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path, head="classification")
    assert model.num_labels == 3
    found = {}
    for side in ("left", "right"):
        ids, mask = texts(side)
        wanted, _ = run_torch(theirs, ids, mask)
        found[side] = model.apply({"params": params}, ids, mask)
        assert_close(found[side], wanted)
    np.testing.assert_allclose(
        model.apply({"params": params}, ids), run_torch(theirs, ids)[0], atol=1e-4
    )  # by pad_token_id alone
    assert np.abs(found["left"] - found["right"]).max() > 0.1  # texts differ


@pytest.mark.parametrize("case", [*CASES, *(f"bare {kind}" for kind in sorted(TRAITS))])
def test_what_a_config_leaves_out(case):
    """Both spellings of transformers, and its defaults, read as one config."""
    import transformers

    bare = {"model_type": case.removeprefix("bare ")}
    raw = content(case) if case in CASES else bare
    theirs = transformers.AutoConfig.for_model(**raw).to_dict()
    ours, same = (
        dataclasses.replace(models.from_config(x).config, raw="") for x in (raw, theirs)
    )
    assert ours == same


def test_old_gpt2_files(tmp_path):
    """No prefix, buffers among the weights, and no head beside the tied table."""
    import safetensors.torch
    import torch

    theirs = build("gpt2")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    assert "lm_head.weight" not in state
    old = {name.removeprefix("transformer."): x for name, x in state.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(old, file)
    ids, mask = texts()
    model, params = models.load(tmp_path, head="causal_lm")
    wanted, _ = run_torch(theirs, ids, mask)
    logits = model.apply({"params": params}, ids, mask)
    assert_close(logits[mask.astype(bool)], wanted[mask.astype(bool)])
