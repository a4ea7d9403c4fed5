"""Slots beside a decoder: files of both sorts, and text for every row's adapter."""

import dataclasses

import jax
import pytest
from adapt_toolbox import perturb

import jaxpeft as jp
from jaxpeft import interop, models, serving

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
PROMPTS = [[5, 9, 33, 2, 17], [7], [60, 3, 8], [5, 9, 33, 2, 17]]
NAMES = ["own", "__base__", "peft", "peft"]


@pytest.fixture(scope="module")
def base():
    model = models.from_config(CONFIG, head="causal_lm", scan_layers=True)
    params = models.init(model, jax.random.key(0))
    # Wider than at a real start, so that the likeliest token is far from the next.
    return model, jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


def trained(base, method, targets, seed):
    model, params = base
    adapted = jp.attach(
        params, method, targets, key=jax.random.key(seed), axes=model.axes
    )
    return perturb(adapted, seed=seed, scale=0.5)


@pytest.fixture(scope="module")
def loaded(base, tmp_path_factory):
    """``(slots, adapted trees by name)``; both adapters come from their files."""
    model, params = base
    folder = tmp_path_factory.mktemp("adapters")
    trees = {
        "own": trained(base, jp.rslora(3), ["q_proj", "v_proj", "lm_head"], 1),
        "peft": trained(base, jp.lora(2, alpha=4), ["q_proj", "down_proj"], 2),
    }
    interop.save_adapter(trees["own"], folder / "own")
    interop.save_peft(trees["peft"], folder / "peft", names=model.names)
    slots = serving.slots(
        params,
        ["q_proj", "v_proj", "down_proj", "lm_head"],
        capacity=3,
        rank=4,
        axes=model.axes,
        modules=model.names,
    )
    for name in trees:
        slots = serving.load(slots, name, folder / name)
    return slots, trees | {"__base__": params}, folder


def test_rows_go_on_as_they_would_alone(base, loaded):
    model, _ = base
    slots, trees, _ = loaded
    tree = serving.with_rows(slots.tree, serving.rows(slots, NAMES))
    got = models.generate(model, tree, PROMPTS, max_new_tokens=6)
    alone = [
        models.generate(model, trees[name], PROMPTS, max_new_tokens=6)[i]
        for i, name in enumerate(NAMES)
    ]
    assert got == alone
    assert got[0] != got[3]  # one prompt, two adapters


def test_files_that_do_not_fit(base, loaded, tmp_path):
    model, params = base
    slots, trees, folder = loaded
    with pytest.raises(FileNotFoundError, match="neither adapter.json nor adapter_con"):
        serving.load(slots, "new", tmp_path)
    nameless = dataclasses.replace(slots, modules=())
    with pytest.raises(ValueError, match=r"modules=model.names"):
        serving.load(nameless, "new", folder / "peft")
    other = jax.tree.map(lambda x: x + 1, params)
    other = serving.slots(other, ["q_proj", "v_proj", "lm_head"], axes=model.axes)
    with pytest.raises(ValueError, match="not the kernel that the adapter was trained"):
        serving.load(other, "new", folder / "own")
    again = serving.load(other, "new", folder / "own", check_base=False)
    assert again.names[1] == "new"
