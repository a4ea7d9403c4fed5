"""Tiny random models of each family, in transformers and in JAX, and PEFT on them."""

import contextlib
import copy
import json
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft import models

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}


class Facts(NamedTuple):
    """What a test needs to know of a family beyond its names.

    Attributes:
        kind: the class of transformers.
        sizes: its config.
        options: arguments of our ``load``.
        task: PEFT's ``task_type``.
        targets: two sorts of modules, in PEFT's words.
        embeddings: an embedding that is not the output head.
        heads: modules of the head, in ours.
        norm: a norm, in ours.
    """

    kind: str
    sizes: dict
    options: dict
    task: str
    targets: tuple[list[str], list[str]]
    embeddings: list[str]
    heads: list[str]
    norm: str


FAMILIES = {
    "bert": Facts(
        kind="AutoModelForSequenceClassification",
        sizes=SIZES | {"num_labels": 3},
        options={"head": "classification"},
        task="SEQ_CLS",
        targets=(["value"], ["intermediate.dense"]),
        embeddings=["word_embeddings"],
        heads=["classifier"],
        norm="embeddings/LayerNorm",
    ),
    "llama": Facts(
        kind="AutoModelForCausalLM",
        sizes=SIZES | {"num_key_value_heads": 2, "head_dim": 4},
        options={"head": "causal_lm"},
        task="CAUSAL_LM",
        targets=(["v_proj"], ["down_proj"]),
        embeddings=["embed_tokens"],
        heads=["lm_head"],
        norm="layer_0/input_layernorm",
    ),
    "gpt2": Facts(
        kind="AutoModelForCausalLM",
        sizes={
            "n_embd": 16,
            "n_head": 4,
            "n_inner": 24,
            "n_layer": 2,
            "vocab_size": 64,
            "n_positions": 20,
        },
        options={"head": "causal_lm"},
        task="CAUSAL_LM",
        targets=(["c_attn"], ["c_fc"]),
        embeddings=["wpe"],
        heads=[],
        norm="ln_f",
    ),
}


class Family:
    """One base model, twice, and how to run it with an adapter.

    Attributes:
        reference: the transformers model; take ``fresh()`` of it.
        model: ours.
        params: its parameters.
    """

    def __init__(self, name, oracle, folder):
        import transformers

        self.facts = facts = FAMILIES[name]
        self.oracle, self.name, self.folder = oracle, name, folder
        config = transformers.AutoConfig.for_model(name, **facts.sizes)
        base = getattr(transformers, facts.kind).from_config(config).eval()
        generator = oracle.torch.Generator().manual_seed(0)
        for parameter in base.parameters():
            noise = oracle.torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim > 1
            parameter.data = 0.3 * noise if wide else parameter.data + 0.3 * noise
        base.save_pretrained(folder)
        self.reference = base
        self.model, self.params = models.load(folder, **facts.options)
        self.ids = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)
        # The function by merged kernels: compiled once for all adapters.
        run = lambda params: self.model.apply({"params": params}, self.ids)
        self.run = jax.jit(run)

    @property
    def conv1d(self):
        return any(row.kind == "conv1d" for row in self.model.names)

    def fresh(self):
        return copy.deepcopy(self.reference)

    def theirs(self, model):
        torch = self.oracle.torch
        with torch.no_grad():
            return model(torch.tensor(self.ids)).logits.numpy()

    def ours(self, adapted):
        with jax.disable_jit():
            merged = jp.merge(adapted)
        return np.asarray(self.run(merged))

    def attach(self, params, adapter, targets, **patterns):
        key = jax.random.key(0)
        with jax.disable_jit():
            return jp.attach(
                params, adapter, targets, key=key, axes=self.model.axes, **patterns
            )

    def peft_model(self, config, seed=1):
        """PEFT's model with everything that it trains moved at random."""
        with quiet():
            model = self.oracle.peft.get_peft_model(self.fresh(), config)
        generator = self.oracle.torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = self.oracle.torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data + 0.3 * noise
        return model.eval()

    def prune(self, model):
        """AdaLoRA's: drops some components, different ones at each site."""
        pattern = {}
        for i, (name, module) in enumerate(model.base_model.model.named_modules()):
            if hasattr(module, "lora_E"):
                keep = [(i + j) % 3 != 0 for j in range(4)]
                weights = module.lora_E["default"].data
                weights *= self.oracle.torch.tensor(keep)[:, None]
                pattern[f"{name}.lora_E"] = keep
        model.peft_config["default"].rank_pattern = pattern

    def opened(self, folder):
        """PEFT's model from an adapter folder; it must have nothing to say."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model = self.oracle.peft.PeftModel.from_pretrained(self.fresh(), folder)
        said = [str(w.message) for w in heard]
        assert [s for s in said if "is_gradient_checkpointing" not in s] == []
        return model.eval()


@contextlib.contextmanager
def quiet():
    """What these libraries tell each other is nobody's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def scrambled(adapted, seed=0, scale=0.3):
    """Every trained leaf moved away from where it began; padding stays zero."""
    rng = np.random.default_rng(seed)
    trainable, frozen = jp.partition(adapted)

    def move(x):
        noise = jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
        return x + noise

    return jp.combine(jax.tree.map(move, trainable), frozen)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def close(mine, theirs, tolerance=2e-5):
    scale = max(1.0, float(np.max(np.abs(theirs))))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


def far(mine, theirs, least=0.1):
    assert np.max(np.abs(np.asarray(mine) - np.asarray(theirs))) > least
