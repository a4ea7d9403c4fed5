"""KaSA, LoRA and full training against HF PEFT on the same weights.

Tolerance 1e-5: measured 1e-6 on outputs near 1 and gradients near 10.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_toolbox import LAYERS, apply, lora_leaves, parameters, to_jax, with_leaves

import jaxpeft as jp

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

RANKS, ALPHAS = {"mid": 2}, {"down": 5}
SITES = list(LAYERS)


def close(mine, theirs, scale=1.0):
    theirs = np.asarray(theirs.detach().numpy())
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * scale)


def far(mine, theirs):
    """The negative control: a wrong variant must be visibly off."""
    assert np.max(np.abs(mine - np.asarray(theirs.detach().numpy()))) > 0.1


def attach(params, adapter, sites=SITES):
    patterns = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS}
    return jp.attach(params, adapter, sites, key=jax.random.key(0), **patterns)


def gradients_of(adapted, ids, weights, penalty=False):
    trainable, frozen = jp.partition(adapted)

    def loss(trainable):
        tree = jp.combine(trainable, frozen)
        total = jnp.sum(jnp.asarray(weights) * jp.adapt(apply)(tree, ids))
        return total + jp.penalty(tree) if penalty else total

    return jax.grad(loss)(trainable)


def backward(oracle, model, ids, weights, penalty=False):
    torch = oracle.torch
    model.zero_grad()
    loss = (torch.tensor(weights) * model(torch.tensor(ids))).sum()
    if penalty:
        loss = loss + model.base_model._get_kasa_loss()
    loss.backward()


# --- KaSA


@pytest.fixture(scope="module")
def kasa_pair(oracle):
    """``(PEFT's model, our tree with its leaves, the plain parameters)``."""
    net = oracle.Net(0)
    params = parameters(net)
    config = oracle.peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=SITES,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        kasa_config=oracle.peft.KasaConfig(beta=0.2, gamma=0.1),
    )
    model = oracle.adapt(net, config, 1)

    @functools.cache
    def ours(**options):
        options = {"beta": 0.2, "gamma": 0.1, "reduction": "sum", **options}
        adapted = attach(params, jp.kasa(rank=3, alpha=7, **options))
        inner = model.base_model.model
        leaves = {name: lora_leaves(getattr(inner, name)) for name in SITES}
        return with_leaves(adapted, leaves)

    return model, ours, params


def test_kasa_truncates_the_same_base(kasa_pair):
    model, ours, params = kasa_pair
    adapted = ours()
    for name in SITES:
        base = getattr(model.base_model.model, name).base_layer.weight
        f = adapted[name]["kernel"].frozen
        kept = params[name]["kernel"] - (f["u_d"] * f["s_d"][None]) @ f["v_d"]
        close(kept.T, base)
        folded = ours(base="folded")[name]["kernel"].base
        close(folded.T, base)
        assert np.max(np.abs(params[name]["kernel"].T - base.detach().numpy())) > 1e-2


def test_kasa_computes_the_same(kasa_pair, oracle, ids):
    model, ours, params = kasa_pair
    theirs = model(oracle.torch.tensor(ids))
    close(jp.adapt(apply)(ours(), ids), theirs)
    close(jp.adapt(apply)(ours(base="folded"), ids), theirs)
    far(apply(params, ids), theirs)
    far(jp.adapt(apply)(ours(truncation="none"), ids), theirs)
    far(jp.adapt(apply)(ours(scaling="alpha/sqrt_r"), ids), theirs)


def test_kasa_has_the_same_penalty(kasa_pair):
    model, ours, _ = kasa_pair
    theirs = model.base_model._get_kasa_loss()
    close(jp.penalty(ours()), theirs)
    close(3 * jp.penalty(ours(reduction="mean")), theirs)
    far(jp.penalty(ours(orthogonality="official")), theirs)
    far(jp.penalty(ours(reduction="mean")), theirs)


def test_kasa_has_the_same_gradients(kasa_pair, oracle, ids, weights):
    model, ours, _ = kasa_pair
    backward(oracle, model, ids, weights, penalty=True)
    mine = gradients_of(ours(), ids, weights, penalty=True)
    without = gradients_of(ours(), ids, weights)
    for name in SITES:
        layer = getattr(model.base_model.model, name)
        leaves = mine[name]["kernel"].trainable
        close(leaves["a"].T, layer.lora_A["default"].weight.grad, 10)
        close(leaves["b"].T, layer.lora_B["default"].weight.grad, 10)
        close(leaves["sigma"], layer.lora_diag["default"].grad, 10)
        far(
            without[name]["kernel"].trainable["b"].T,
            layer.lora_B["default"].weight.grad,
        )


def test_kasa_merges_to_the_same_kernels(kasa_pair):
    model, ours, params = kasa_pair
    mine = jp.merge(ours())
    merged = copy.deepcopy(model).merge_and_unload()
    for name in SITES:
        close(mine[name]["kernel"].T, getattr(merged, name).weight)
        far(params[name]["kernel"].T, getattr(merged, name).weight)


# --- LoRA


@pytest.fixture(scope="module", params=["alpha/r", "alpha/sqrt_r"])
def lora_pair(oracle, request):
    net = oracle.Net(2)
    params = parameters(net)
    config = oracle.peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=[*SITES, "tokens"],
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        use_rslora=request.param == "alpha/sqrt_r",
    )
    model = oracle.adapt(net, config, 3)
    inner = model.base_model.model

    @functools.cache
    def ours(scaling=request.param):
        adapted = attach(params, jp.lora(3, 7, scaling=scaling))
        adapted = jp.attach(
            adapted,
            jp.lora(3, 7, init="embedding", scaling=scaling),
            ["tokens"],
            key=jax.random.key(1),
        )
        leaves = {name: lora_leaves(getattr(inner, name)) for name in SITES}
        leaves["tokens"] = {
            "a": to_jax(inner.tokens.lora_embedding_A["default"]).T,
            "b": to_jax(inner.tokens.lora_embedding_B["default"]).T,
        }
        return with_leaves(adapted, leaves)

    other = "alpha/r" if request.param == "alpha/sqrt_r" else "alpha/sqrt_r"
    return model, ours, other, params


def test_lora_computes_the_same(lora_pair, oracle, ids):
    model, ours, other, params = lora_pair
    theirs = model(oracle.torch.tensor(ids))
    close(jp.adapt(apply)(ours(), ids), theirs)
    far(apply(params, ids), theirs)
    far(jp.adapt(apply)(ours(other), ids), theirs)


def test_lora_has_the_same_gradients(lora_pair, oracle, ids, weights):
    model, ours, other, _ = lora_pair
    backward(oracle, model, ids, weights)
    mine, wrong = (gradients_of(ours(*s), ids, weights) for s in ((), (other,)))
    inner = model.base_model.model
    for name in SITES:
        layer = getattr(inner, name)
        leaves = mine[name]["kernel"].trainable
        close(leaves["a"].T, layer.lora_A["default"].weight.grad, 10)
        close(leaves["b"].T, layer.lora_B["default"].weight.grad, 10)
        far(wrong[name]["kernel"].trainable["a"].T, layer.lora_A["default"].weight.grad)
    leaves = mine["tokens"]["embedding"].trainable
    close(leaves["a"].T, inner.tokens.lora_embedding_A["default"].grad, 10)
    close(leaves["b"].T, inner.tokens.lora_embedding_B["default"].grad, 10)


def test_lora_merges_to_the_same_kernels(lora_pair):
    model, ours, other, _ = lora_pair
    mine, wrong = jp.merge(ours()), jp.merge(ours(other))
    merged = copy.deepcopy(model).merge_and_unload()
    for name in SITES:
        close(mine[name]["kernel"].T, getattr(merged, name).weight)
        far(wrong[name]["kernel"].T, getattr(merged, name).weight)
    close(mine["tokens"]["embedding"], merged.tokens.weight)


@pytest.mark.parametrize("init", ["uniform", "gaussian"])
def test_lora_begins_alike(init, oracle):
    """Same distribution of a: range, and spread to within sampling noise."""
    net = oracle.torch.nn.Sequential(oracle.torch.nn.Linear(300, 40))
    config = oracle.peft.LoraConfig(
        r=32,
        target_modules=["0"],
        init_lora_weights=True if init == "uniform" else "gaussian",
    )
    layer = oracle.peft.get_peft_model(net, config).base_model.model[0]
    theirs = layer.lora_A["default"].weight.detach().numpy()
    kernel = jnp.zeros((300, 40))
    _, mine = jp.lora(32, init=init).init(jax.random.key(0), kernel, 32, 1)
    np.testing.assert_allclose(np.std(mine["a"]), np.std(theirs), rtol=0.03)
    widest = [np.max(np.abs(x)) for x in (mine["a"], theirs)]
    np.testing.assert_allclose(*widest, rtol=0.02 if init == "uniform" else 0.3)
    assert np.all(layer.lora_B["default"].weight.detach().numpy() == 0)
    assert np.all(mine["b"] == 0)


# --- full training of a module


def test_a_saved_module_trains_alike(oracle, ids, weights):
    net = oracle.Net(4)
    params = parameters(net)
    config = oracle.peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["up"], modules_to_save=["down"]
    )
    model = oracle.adapt(net, config, 5)
    inner = model.base_model.model
    head = inner.down.modules_to_save["default"]
    adapted = jp.attach(params, jp.lora(3, 7), ["up"], key=jax.random.key(0))
    adapted = with_leaves(adapted, {"up": lora_leaves(inner.up)})
    adapted = jp.attach(adapted, jp.full(), ["down"], key=jax.random.key(1))
    for name, value in {"kernel": head.weight.T, "bias": head.bias}.items():
        node = adapted["down"][name]
        adapted["down"][name] = node.replace(trainable={"value": to_jax(value)})
    theirs = model(oracle.torch.tensor(ids))
    close(jp.adapt(apply)(adapted, ids), theirs)
    far(apply(params, ids), theirs)
    backward(oracle, model, ids, weights)
    mine = gradients_of(adapted, ids, weights)
    close(mine["down"]["kernel"].trainable["value"].T, head.weight.grad, 10)
    close(mine["down"]["bias"].trainable["value"], head.bias.grad, 10)
    close(
        mine["up"]["kernel"].trainable["a"].T,
        inner.up.lora_A["default"].weight.grad,
        10,
    )
    detached = jp.detach(adapted)
    for old, new in zip(
        jax.tree.leaves(params), jax.tree.leaves(detached), strict=True
    ):
        assert np.array_equal(old, new)
