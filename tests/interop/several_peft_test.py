"""Weighted combinations against HF PEFT's ``add_weighted_adapter``.

Tolerance 1e-5: measured 1e-6 on changes near 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families_toolbox import quiet
from peft_toolbox import LAYERS, parameters, with_leaves

import jaxpeft as jp
from jaxpeft.tree._attach import site_key

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

WEIGHTS = [0.8, 0.5, -0.6]
RANKS = {"equal": [(3, 5), (3, 5), (3, 2)], "unequal": [(3, 5), (2, 5), (4, 2)]}
SITES = list(LAYERS)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def pairs(oracle):
    """``{equal or unequal: (PEFT's model with three adapters, ours)}``."""
    made = {}
    for word, settings in RANKS.items():
        net = oracle.Net(0)
        params, trees = parameters(net), []
        for i, (rank, alpha) in enumerate(settings):
            config = oracle.peft.LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=SITES
            )
            if i == 0:
                model = oracle.peft.get_peft_model(net, config, "adapter0")
            else:
                model.add_adapter(f"adapter{i}", config)
        generator = oracle.torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = oracle.torch.randn(parameter.shape, generator=generator)
                parameter.data = 0.5 * noise
        for i, (rank, alpha) in enumerate(settings):
            tree = jp.attach(params, jp.lora(rank, alpha), SITES, key=KEY)
            leaves = {n: leaves_of(model, n, f"adapter{i}") for n in SITES}
            trees.append(with_leaves(tree, leaves))
        made[word] = model, trees
    return made


def leaves_of(model, name, adapter):
    layer = getattr(model.base_model.model, name)
    factors = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    a, b = (jnp.asarray(x.detach().numpy().copy()).T for x in factors)
    return {"a": a, "b": b}


def changes(model, adapter="joined"):
    layer = lambda name: getattr(model.base_model.model, name)
    return {
        name: layer(name).get_delta_weight(adapter).detach().numpy().T for name in SITES
    }


def ours(adapted):
    found = {}
    for name in SITES:
        node = adapted[name]["kernel"]
        leaves = {**node.frozen, **node.trainable}
        found[name] = np.asarray(leaves["a"] @ (leaves["scale"] * leaves["b"]))
    return found


def theirs(model, how, weights=WEIGHTS, **options):
    names = [f"adapter{i}" for i in range(len(weights))]
    with quiet():
        if "joined" in model.peft_config:
            model.delete_adapter("joined")
        model.add_weighted_adapter(names, weights, "joined", how, **options)
    return changes(model)


def close(mine, others):
    for name in SITES:
        np.testing.assert_allclose(mine[name], others[name], rtol=0, atol=1e-5)


def far(mine, others):
    assert all(np.abs(mine[n] - others[n]).max() > 0.1 for n in SITES)


@pytest.mark.parametrize("ranks", list(RANKS))
@pytest.mark.parametrize(("how", "rank"), [("cat", None), ("svd", None), ("svd", 5)])
def test_exact_sum_and_best_rank(pairs, how, rank, ranks):
    model, trees = pairs[ranks]
    options = {"svd_rank": rank, "svd_full_matrices": False} if how == "svd" else {}
    expected = theirs(model, how, **options)
    joined = jp.weighted(trees, WEIGHTS, how, rank=rank)
    close(ours(joined), expected)
    their_rank = model.base_model.model.mid.lora_A["joined"].weight.shape[0]
    assert joined["mid"]["kernel"].site.ranks == (their_rank,)
    far(ours(jp.weighted(trees, [1, 1, 1], how, rank=rank)), expected)


@pytest.mark.parametrize(
    ("how", "density", "election"),
    [
        ("linear", None, "total"),
        ("magnitude_prune", 0.4, "total"),
        ("ties", 0.4, "total"),
        ("ties", 0.7, "frequency"),
        ("ties", 1.0, "total"),
    ],
)
def test_factors_joined_as_peft_joins_them(pairs, how, density, election):
    model, trees = pairs["equal"]
    options = {} if density is None else {"density": density}
    expected = theirs(model, how, majority_sign_method=election, **options)
    joined = jp.weighted(trees, WEIGHTS, how, election=election, **options)
    close(ours(joined), expected)
    far(ours(jp.weighted(trees, WEIGHTS)), expected)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_with_the_same_masks(pairs, how, oracle, monkeypatch):
    """PEFT's draws are replaced by ours; all else is its own code."""
    model, trees = pairs["equal"]
    masks = iter(our_masks(0.4))

    def bernoulli(probabilities):
        mask = next(masks)
        assert mask.shape == probabilities.shape
        assert abs(float(probabilities.min()) - 0.4) < 1e-6
        return oracle.torch.tensor(mask)

    monkeypatch.setattr(oracle.torch, "bernoulli", lambda input: bernoulli(input))
    expected = theirs(model, how, density=0.4)
    assert next(masks, None) is None
    close(ours(jp.weighted(trees, WEIGHTS, how, density=0.4, key=KEY)), expected)
    other = jax.random.key(8)
    far(ours(jp.weighted(trees, WEIGHTS, how, density=0.4, key=other)), expected)


def our_masks(density):
    """The masks in PEFT's order: module, factor, adapter; transposed."""
    for name, (d_in, d_out) in LAYERS.items():
        (layer,) = jax.random.split(site_key(KEY, f"{name}/kernel"), 1)
        key_a, key_b = jax.random.split(layer)
        for key, shape in ((key_a, (d_in, 3)), (key_b, (3, d_out))):
            keep = jax.random.bernoulli(key, density, (len(WEIGHTS), *shape))
            yield from (np.asarray(mask, np.float32).T for mask in keep)


def test_strength_is_peft_s_scale(pairs):
    model, trees = pairs["equal"]
    before = changes(model, "adapter0")
    for name in SITES:
        getattr(model.base_model.model, name).set_scale("adapter0", 0.3)
    after = changes(model, "adapter0")
    for name in SITES:
        getattr(model.base_model.model, name).set_scale("adapter0", 1.0)
    close(ours(jp.scaled(trees[0], 0.3)), after)
    far(before, after)
