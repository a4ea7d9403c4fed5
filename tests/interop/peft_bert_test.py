"""KaSA on a whole BERT and RoBERTa: our model and methods against HF's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_toolbox import lora_leaves

import jaxpeft as jp
from jaxpeft import models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "num_labels": 3,
}
TARGETS = ["query", "value", "intermediate.dense"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def pair(request, oracle, tmp_path_factory):
    """``(PEFT's model, the folder of its untouched base)``."""
    import transformers

    torch = oracle.torch
    config = transformers.AutoConfig.for_model(request.param, **SIZES)
    kind = transformers.AutoModelForSequenceClassification
    base = kind.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise if parameter.ndim > 1 else parameter.data + noise
    folder = tmp_path_factory.mktemp(request.param)
    base.save_pretrained(folder)
    config = oracle.peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=TARGETS,
        kasa_config=oracle.peft.KasaConfig(beta=0.2, gamma=0.1),
    )
    return oracle.adapt(base, config, 1), folder


def layer_leaves(model, kind):
    """PEFT's leaves by site: ``{path under the layer: [one dict per layer]}``."""
    layers = getattr(model.base_model.model, kind).encoder.layer
    sites = {
        "attention/query": lambda layer: layer.attention.self.query,
        "attention/value": lambda layer: layer.attention.self.value,
        "intermediate/dense": lambda layer: layer.intermediate.dense,
    }
    return {
        path: [lora_leaves(find(layer)) for layer in layers]
        for path, find in sites.items()
    }


def with_peft_leaves(adapted, leaves, scanned):
    trainable, frozen = jp.partition(adapted)
    named = {}
    for path, layers in leaves.items():
        for name in layers[0]:
            each = [layer[name] for layer in layers]
            if scanned:
                named[f"encoder/layer/{path}/kernel/{name}"] = jnp.stack(each)
            else:
                for i, value in enumerate(each):
                    named[f"encoder/layer_{i}/{path}/kernel/{name}"] = value
    assert {n: x.shape for n, x in named.items()} == {
        n: x.shape for n, x in jp.tree.flat(trainable).items()
    }
    return jp.combine(jp.tree.unflat(trainable, named), frozen)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_logits_and_penalty(pair, oracle, scanned):
    reference, folder = pair
    kind = "bert" if "bert" == reference.config.model_type else "roberta"
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (3, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 1, 0
    torch = oracle.torch
    with torch.no_grad():
        logits = reference(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    model, params = models.load(
        folder, head="classification", num_labels=3, scan_layers=scanned
    )
    adapter = jp.kasa(rank=3, alpha=7, beta=0.2, gamma=0.1, reduction="sum")
    targets = ["query", "value", "intermediate/dense"]
    adapted = jp.attach(
        params, adapter, targets, key=jax.random.key(0), axes=model.axes
    )
    adapted = with_peft_leaves(adapted, layer_leaves(reference, kind), scanned)
    run = lambda p: model.apply({"params": p}, ids, mask)
    mine = jp.adapt(run)(adapted)
    tolerance = 2e-5 * max(1, np.max(np.abs(logits)))
    np.testing.assert_allclose(mine, logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(run(jp.merge(adapted)), logits, rtol=0, atol=tolerance)
    loss = reference.base_model._get_kasa_loss().item()
    np.testing.assert_allclose(jp.penalty(adapted), loss, rtol=1e-5)
    # Controls: without the adapters, and on the untruncated base.
    assert np.max(np.abs(run(params) - logits)) > 1000 * tolerance
    whole = jax.tree.map(
        lambda node: (
            node.replace(
                frozen={**node.frozen, "s_d": jnp.zeros_like(node.frozen["s_d"])}
            )
            if isinstance(node, jp.tree.AdaptedKernel)
            else node
        ),
        adapted,
        is_leaf=lambda x: isinstance(x, jp.tree.AdaptedKernel),
    )
    assert np.max(np.abs(jp.adapt(run)(whole) - logits)) > 1000 * tolerance
