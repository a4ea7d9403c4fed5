"""Modules that transformers' classes call, and those that they only read.

PEFT wraps the call: beside a weight that is read, its adapter does nothing.
"""

import copy

import jax
import numpy as np
import pytest
from families_toolbox import close, far, quiet, scrambled

import jaxpeft as jp
from jaxpeft import interop, models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "type_vocab_size": 2,
    "num_labels": 3,
}
DEBERTA = SIZES | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "position_biased_input": True,
    "norm_rel_ebd": "layer_norm",
}
GPT2 = {"vocab_size": 32, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 24}
FAMILIES = {
    "bert": SIZES,
    "roberta": SIZES,
    "deberta-v2": DEBERTA,
    "deberta-v2, own keys": DEBERTA | {"share_att_key": False},
    "gpt2": GPT2,
    "llama": SIZES,
    "phi3": SIZES,
    "gemma3_text": SIZES | {"head_dim": 4, "num_key_value_heads": 2},
}
READ = "deberta.encoder.rel_embeddings"
IDS = np.random.default_rng(0).integers(3, 32, (2, 6)).astype(np.int32)


def made(name, oracle, folder):
    """``(transformers' model, ours, its parameters)``, everything drawn anew."""
    import transformers

    kind = name.partition(",")[0]
    encoder = kind.partition("-")[0] in ("bert", "roberta", "deberta")
    task = "SequenceClassification" if encoder else "CausalLM"
    config = transformers.AutoConfig.for_model(kind, **FAMILIES[name])
    base = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    generator = oracle.torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        noise = oracle.torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.3 * noise
    with quiet():
        base.save_pretrained(folder)
    head = "classification" if encoder else "causal_lm"
    return base, *models.load(folder, head=head)


def logits(oracle, model):
    with oracle.torch.no_grad():
        return model(oracle.torch.tensor(IDS)).logits.numpy()


def adapted(oracle, base, **fields):
    """PEFT's model with everything that it trains moved."""
    with quiet():
        config = oracle.peft.LoraConfig(r=2, **fields)
        model = oracle.peft.get_peft_model(copy.deepcopy(base), config)
    generator = oracle.torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = oracle.torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.5 * noise
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_knows_what_is_called(name, oracle, tmp_path):
    """PEFT's LoRA on every module that we name: no effect means not called."""
    base, model, _ = made(name, oracle, tmp_path)
    want, layers = logits(oracle, base), dict(base.named_modules())
    seen = set()
    for row in model.names:
        path = row.theirs.format(i=0)
        if row.kind == "norm" or path not in layers or path in seen:
            continue
        seen.add(path)
        got = logits(oracle, adapted(oracle, base, target_modules=[path]))
        assert row.called == (not np.array_equal(got, want)), path
    assert len(seen) > 5
    assert (READ in seen) == name.startswith("deberta")


def test_no_adapter_goes_where_it_would_do_nothing(oracle, tmp_path):
    base, model, params = made("deberta-v2", oracle, tmp_path / "base")
    names = model.names
    for i, targets in enumerate([["rel_embeddings"], r".*(rel_embeddings|query_proj)"]):
        adapted(oracle, base, target_modules=targets).save_pretrained(tmp_path / str(i))
        with pytest.raises(ValueError, match=f"'{READ}' is a module that .* never"):
            interop.load_peft(tmp_path / str(i), params, names=names)
    with jax.disable_jit():
        tree = jp.attach(
            params, jp.lora(2), ["rel_embeddings", "query_proj"], key=jax.random.key(0)
        )
    for form in ("auto", "native", "portable"):
        with pytest.raises(ValueError, match=f"'{READ}' is a module that .* never"):
            interop.save_peft(tree, tmp_path / "no", names=names, form=form)
    assert not (tmp_path / "no").exists()
    # Merged, the same tree is what transformers computes.
    tree = scrambled(tree, scale=1.0)
    interop.save_hf(tree, tmp_path / "hf", names=names, config=model.hf_config)
    with quiet():
        merged = type(base).from_pretrained(tmp_path / "hf").eval()
    with jax.disable_jit():
        plain = jp.merge(tree)
    want = np.asarray(model.apply({"params": plain}, IDS))
    close(logits(oracle, merged), want)
    far(want, logits(oracle, base), least=0.01)


def test_its_weight_as_a_whole_is_read(oracle, tmp_path):
    """modules_to_save swaps the weight, which the class does see."""
    base, model, params = made("deberta-v2", oracle, tmp_path / "base")
    fields = {"target_modules": ["query_proj"], "modules_to_save": ["rel_embeddings"]}
    theirs = adapted(oracle, base, task_type="SEQ_CLS", **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    with jax.disable_jit():
        tree = interop.load_peft(tmp_path / "theirs", params, names=model.names)
        plain = jp.merge(tree)
    want = logits(oracle, theirs)
    close(np.asarray(model.apply({"params": plain}, IDS)), want)
    interop.save_peft(tree, tmp_path / "ours", names=model.names, task_type="SEQ_CLS")
    with quiet():
        again = oracle.peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "ours"
        )
    close(logits(oracle, again.eval()), want)
