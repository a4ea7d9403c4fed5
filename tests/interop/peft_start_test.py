"""PiSSA, OLoRA and AdaLoRA against HF PEFT on the same weights.

Tolerance 1e-5 on outputs and kernels near 1, and 1e-4 on gradients near 10.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_toolbox import LAYERS, apply, lora_leaves, parameters, to_jax, with_leaves

import jaxpeft as jp
from jaxpeft import allocate

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]

SITES = list(LAYERS)


def close(mine, theirs, scale=1.0):
    theirs = np.asarray(theirs.detach().numpy())
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * scale)


def far(mine, theirs):
    """The negative control: a wrong variant must be visibly off."""
    assert np.max(np.abs(mine - np.asarray(theirs.detach().numpy()))) > 0.1


def gradients_of(adapted, ids, weights):
    trainable, frozen = jp.partition(adapted)

    def loss(trainable):
        tree = jp.combine(trainable, frozen)
        return jnp.sum(jnp.asarray(weights) * jp.adapt(apply)(tree, ids))

    return jax.grad(loss)(trainable)


# --- PiSSA and OLoRA


METHODS = {"pissa": jp.pissa, "olora": jp.olora}


@pytest.fixture(scope="module", params=sorted(METHODS))
def started(oracle, request):
    """``(PEFT's model, our tree, our constructor, the plain parameters)``."""
    net = oracle.Net(0)
    params = parameters(net)
    config = oracle.peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=SITES,
        rank_pattern={"mid": 2},
        alpha_pattern={"down": 5},
        init_lora_weights=request.param,
    )
    model = oracle.peft.get_peft_model(net, config).eval()

    def ours(method=METHODS[request.param], **options):
        patterns = {"rank_pattern": {"mid": 2}, "alpha_pattern": {"down": 5}}
        adapter = method(rank=3, alpha=7, **options)
        return jp.attach(params, adapter, SITES, key=jax.random.key(0), **patterns)

    return model, ours, params


def test_it_starts_from_the_same_factors(started, oracle, ids):
    model, ours, params = started
    adapted, folded = ours(), ours(residual="folded")
    for name in SITES:
        layer = getattr(model.base_model.model, name)
        f = adapted[name]["kernel"].frozen
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        close((f["a0"] @ f["b0"]).T, theirs)
        np.testing.assert_allclose(f["scale"], layer.scaling["default"], rtol=1e-6)
        close(folded[name]["kernel"].base.T, layer.base_layer.weight)
        far(params[name]["kernel"].T, layer.base_layer.weight)
    close(jp.adapt(apply)(adapted, ids), model(oracle.torch.tensor(ids)))


@pytest.fixture(scope="module")
def trained(started, oracle):
    """The same, with PEFT's factors moved and given to us."""
    model, ours, params = started
    model = copy.deepcopy(model)
    generator = oracle.torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = oracle.torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.2 * noise
    inner = model.base_model.model
    leaves = {name: lora_leaves(getattr(inner, name)) for name in SITES}
    return model, lambda *a, **k: _moved(ours(*a, **k), ours(), leaves), params


def _moved(adapted, ours, leaves):
    """Theirs minus their start plus ours: the signs of the factors are free."""
    moved = {}
    for name, theirs in leaves.items():
        f = ours[name]["kernel"].frozen
        # Signs of the singular vectors: those that turn their start into ours.
        sign = jnp.sign(jnp.sum(f["a0"] * theirs["a"], axis=0))
        moved[name] = {"a": theirs["a"] * sign[None], "b": theirs["b"] * sign[:, None]}
    return with_leaves(adapted, moved)


def test_it_computes_the_same(trained, oracle, ids):
    model, ours, params = trained
    theirs = model(oracle.torch.tensor(ids))
    close(jp.adapt(apply)(ours(), ids), theirs)
    close(jp.adapt(apply)(ours(residual="folded"), ids), theirs)
    far(apply(params, ids), theirs)
    plain = jax.tree.map(  # control: without the initial factors taken out
        lambda x: x * 0.0 if x is not None else None, jp.partition(ours())[0]
    )
    far(jp.adapt(apply)(jp.combine(plain, jp.partition(ours())[1]), ids), theirs)


def test_it_has_the_same_gradients(trained, oracle, ids, weights):
    model, ours, _ = trained
    model.zero_grad()
    torch = oracle.torch
    (torch.tensor(weights) * model(torch.tensor(ids))).sum().backward()
    mine = gradients_of(ours(), ids, weights)
    wrong = gradients_of(ours(scaling="alpha/sqrt_r"), ids, weights)
    for name in SITES:
        layer = getattr(model.base_model.model, name)
        for leaf, theirs in (("a", layer.lora_A), ("b", layer.lora_B)):
            theirs = theirs["default"].weight.grad.abs()  # the signs are free
            close(jnp.abs(mine[name]["kernel"].trainable[leaf]).T, theirs, 10)
            far(jnp.abs(wrong[name]["kernel"].trainable[leaf]).T, theirs)


def test_it_merges_to_the_same_kernels(trained):
    model, ours, params = trained
    mine = jp.merge(ours())
    merged = copy.deepcopy(model).merge_and_unload()
    for name in SITES:
        close(mine[name]["kernel"].T, getattr(merged, name).weight)
        far(params[name]["kernel"].T, getattr(merged, name).weight)


# --- AdaLoRA


TIMING = {"initial_steps": 2, "final_steps": 4, "total_steps": 20, "every": 2}


@pytest.fixture(scope="module")
def adaptive(oracle):
    """``(PEFT's model, our tree with its leaves, the plain parameters)``."""
    net = oracle.Net(6)
    params = parameters(net)
    config = oracle.peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=TIMING["initial_steps"],
        tfinal=TIMING["final_steps"],
        deltaT=TIMING["every"],
        total_step=TIMING["total_steps"],
        lora_alpha=7,
        target_modules=SITES,
    )
    model = oracle.adapt(net, config, 7).train()
    inner = model.base_model.model

    @functools.cache
    def ours(rank=4, **options):
        adapter = jp.adalora(rank=rank, alpha=7, **options)
        adapted = jp.attach(params, adapter, SITES, key=jax.random.key(0))
        return with_leaves(adapted, {n: triplets(getattr(inner, n)) for n in SITES})

    return model, ours, params


def triplets(layer):
    return {
        "a": to_jax(layer.lora_A["default"]).T,
        "b": to_jax(layer.lora_B["default"]).T,
        "e": to_jax(layer.lora_E["default"])[:, 0],
    }


def their_loss(oracle, model, ids, weights):
    """The task's loss, and PEFT's penalty, which it adds to a model's own loss only."""
    torch = oracle.torch
    loss = (torch.tensor(weights) * model(torch.tensor(ids))).mean()
    distances = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            distances.append(torch.norm(gram - torch.eye(4), p="fro"))
    return loss + 0.5 * sum(distances) / len(distances)


def my_loss(trainable, frozen, ids, weights):
    tree = jp.combine(trainable, frozen)
    task = jnp.mean(jnp.asarray(weights) * jp.adapt(apply)(tree, ids))
    return task + jp.penalty(tree)


def test_adalora_computes_and_merges_the_same(adaptive, oracle, ids, weights):
    model, ours, params = adaptive
    theirs = model(oracle.torch.tensor(ids))
    close(jp.adapt(apply)(ours(), ids), theirs)
    far(apply(params, ids), theirs)
    merged = copy.deepcopy(model).merge_and_unload()
    mine = jp.merge(ours())
    for name in SITES:
        close(mine[name]["kernel"].T, getattr(merged, name).weight)
    loss = their_loss(oracle, model, ids, weights)
    args = (*jp.partition(ours()), ids, weights)
    np.testing.assert_allclose(my_loss(*args), loss.item(), rtol=1e-5)
    far(my_loss(*jp.partition(ours(gamma=0)), ids, weights), loss)


def test_adalora_prunes_the_same_over_a_run(adaptive, oracle, ids, weights):
    """Twenty steps of SGD: the same weights, the same components, at every step."""
    model, ours, _ = adaptive
    model = copy.deepcopy(model)
    trainable, frozen = jp.partition(ours())
    allocation = allocate.importance(target_rank=2, **TIMING)
    state = allocation.init(trainable)
    optimizer = oracle.torch.optim.SGD(
        [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad],
        lr=0.1,
    )

    @jax.jit
    def step(trainable, state, number):
        grads = jax.grad(my_loss)(trainable, frozen, ids, weights)
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)
        state, trainable = allocation.update(state, trainable, grads, number)
        return trainable, state

    counts = []
    for number in range(1, TIMING["total_steps"] + 1):
        optimizer.zero_grad()
        their_loss(oracle, model, ids, weights).backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        trainable, state = step(trainable, state, number)
        count = 0
        for name in SITES:
            theirs = triplets(getattr(model.base_model.model, name))
            mine = trainable[name]["kernel"].trainable
            assert np.array_equal(mine["e"] != 0, theirs["e"] != 0), number
            count += int(jnp.sum(mine["e"] != 0))
            for leaf in mine:
                np.testing.assert_allclose(mine[leaf], theirs[leaf], atol=2e-5)
        counts.append(count)
    # Pruned at 4, 6, ..., 16; back in between; what 16 removed stays removed.
    expected = allocate.budgets(12, 6, **{n: TIMING[n] for n in TIMING if n != "every"})
    assert counts[:3] == [12, 12, 12] and counts[16:] == [6, 6, 6, 6]
    assert counts[3:16:2] == expected[4:17:2] and counts[4] == 12
