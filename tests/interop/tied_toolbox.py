"""Tied models, PEFT's adapters on them, and how ours read them."""

import copy
import warnings
from types import SimpleNamespace

import jax
import numpy as np
from families_toolbox import quiet

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.tree._node import nodes

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}
IDS = np.random.default_rng(0).integers(3, 48, (2, 5)).astype(np.int32)
LOOKUP = "embed_tokens/lookup/embedding"
HEAD = "lm_head/embedding"
BOTH = "embed_tokens/embedding"
Q, E, H = "q_proj", "embed_tokens", "lm_head"
APART = [LOOKUP, HEAD]


def tied_models(oracle, tmp_path_factory):
    """Tied models by family, twice: transformers' and ours."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = _tied(kind, oracle, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def _tied(kind, oracle, folder):
    import transformers

    torch = oracle.torch
    sizes = GPT2 if kind == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():  # padding's row too: none may be zero
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.3 * noise
    with quiet():
        base.save_pretrained(folder)
    model, params = models.load(folder, head="causal_lm")
    run = jax.jit(lambda params: model.apply({"params": params}, IDS))
    return SimpleNamespace(
        base=base, folder=folder, model=model, params=params, run=run, **vars(oracle)
    )


def trained(of, folder, *, method="LoraConfig", whole="auto", **fields):
    """A PEFT adapter with everything it trains moved; writes it, returns its logits."""
    fields = {"task_type": "CAUSAL_LM"} | fields
    if method == "LoraConfig":
        fields = {"r": 3} | fields
    with quiet():
        config = getattr(of.peft, method)(**fields)
        made = of.peft.get_peft_model(copy.deepcopy(of.base), config)
        generator = of.torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            if parameter.requires_grad:
                noise = of.torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.3 * noise  # in place: tied factors share it
        made.save_pretrained(folder, save_embedding_layers=whole)
    return theirs(of, made.eval())


def theirs(of, model):
    with of.torch.no_grad():
        return model(of.torch.tensor(IDS)).logits.numpy()


def opened(of, folder):
    """PEFT's model of a folder; it must find every leaf in its place."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = of.peft.PeftModel.from_pretrained(copy.deepcopy(of.base), folder)
    usual = ("is_gradient_checkpointing", "tie_word_embeddings", "fan_in_fan_out")
    said = [str(w.message) for w in heard]
    assert [s for s in said if not any(word in s for word in usual)] == []
    return model.eval()


def read(of, folder, **options):
    with jax.disable_jit():  # a handful of operations once each
        return interop.load_peft(
            folder, of.params, names=of.model.names, axes=of.model.axes, **options
        )


def merged(tree):
    with jax.disable_jit():
        return jp.merge(tree)


def tables(tree):
    """Paths of the leaves that are embedding or head, and of the adapters there."""
    paths = [path for path, _ in jp.tree._node.leaves_with_path(tree)]
    own = [p for p in paths if "embed_tokens" in p or "lm_head" in p or "wte" in p]
    adapted = {node.site.path for node in nodes(tree)}
    return own, [path for path in own if path in adapted]
