"""Generation from parameters on a mesh: the tokens of one device."""

import jax
import pytest

import jaxpeft as jp
from jaxpeft import models, training

SIZES = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROMPTS = [[5, 9, 33, 2, 17], [7], [60, 3, 8]]


@pytest.fixture(scope="module")
def llama():
    model = models.from_config(SIZES, head="causal_lm", scan_layers=True)
    params = models.init(model, jax.random.key(0))
    # Wide, so that the likeliest token is far from the next: sums are added up in
    # another order on a mesh.
    return model, jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, params)


@pytest.mark.parametrize("method", ["none", "lora", "dora", "kasa"])
def test_a_mesh_writes_what_one_device_writes(llama, method):
    model, params = llama
    tree = params
    if method != "none":
        adapter = getattr(jp, method)(rank=2)
        key = jax.random.key(1)
        tree = jp.attach(params, adapter, "all-linear", key=key, axes=model.axes)
        trainable, frozen = jp.partition(tree)
        keys = iter(jax.random.split(jax.random.key(2), 99))
        trainable = jax.tree.map(
            lambda x: x + 0.5 * jax.random.normal(next(keys), x.shape), trainable
        )
        tree = jp.combine(trainable, frozen)
    mesh = training.make_mesh(data=2, fsdp=2, tensor=2)
    specs = training.param_specs(params, mesh, axes=model.axes)
    placed = training.place(tree, mesh, specs)
    cut = [leaf for leaf in jax.tree.leaves(placed) if not leaf.is_fully_replicated]
    assert len(cut) >= 7  # every projection at least
    wanted = models.generate(model, tree, PROMPTS, max_new_tokens=8)
    assert models.generate(model, placed, PROMPTS, max_new_tokens=8) == wanted
    assert len({token for row in wanted for token in row}) > 3
    if method == "lora":
        base = models.generate(model, params, PROMPTS, max_new_tokens=8)
        assert base != wanted, "the adapter acts"
