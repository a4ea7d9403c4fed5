"""DoRA against its dense form in float64, its golden site, and HF PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters_toolbox import as_a_user as as_a_user
from norms_toolbox import M_OUT, SCALE, A, B, G, W, dense_dora, made, merged

import jaxpeft as jp


def gradient_of(adapter, w, frozen, t, g):
    return jax.grad(lambda t: jnp.sum(merged(adapter, w, frozen, t) * g))(t)


@pytest.mark.parametrize("held", [True, False])
def test_golden_site(held):
    with jax.enable_x64(True):
        adapter = jp.dora(rank=1, alpha=SCALE, stop_gradient_norm=held)
        frozen, t = made(adapter, W, a=A, b=B, m_out=M_OUT)
        kernel = merged(adapter, W, frozen, t)
        golden = [[2.121320, 2, 0.980581], [2.121320, 0, 4.902903]]
        np.testing.assert_allclose(kernel, golden, atol=1e-6)
        gradient = gradient_of(adapter, W, frozen, t, G)
        g_a = [[2.041241], [-0.980581]] if held else [[1.661769], [-0.756618]]
        g_b = [2.121320, -4, -3.922323] if held else [2.121320, -4, -2.715454]
        np.testing.assert_allclose(gradient["a"], g_a, atol=1e-6)
        np.testing.assert_allclose(gradient["b"][0], g_b, atol=1e-6)
        np.testing.assert_allclose(
            gradient["m_out"], [0.707107, 0, 0.784465], atol=1e-6
        )


STARTS = ["uniform", "gaussian", "embedding", "pissa", "milora", "olora"]


@pytest.mark.parametrize("init", STARTS)
def test_factored_is_dense(init):
    """Identity at init; then kernel and both gradients of the dense form."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        w = jnp.asarray(rng.normal(size=(7, 12)))
        g = rng.normal(size=w.shape)
        for held in (True, False):
            adapter = jp.dora(rank=3, alpha=6, init=init, stop_gradient_norm=held)
            frozen, t = made(adapter, w)
            np.testing.assert_allclose(merged(adapter, w, frozen, t), w, atol=1e-12)
            t = {n: x + 0.3 * rng.normal(size=x.shape) for n, x in t.items()}
            s, start = frozen["scale"], frozen.get("a0")
            whole = w if start is None else w - s * start @ frozen["b0"]
            assert (start is None) == (init in STARTS[:3])
            expected, n = dense_dora(whole, s, t)
            np.testing.assert_allclose(merged(adapter, w, frozen, t), expected)
            dense = lambda t: jnp.sum(
                dense_dora(whole, s, t, held=n if held else None)[0] * g  # noqa: B023
            )
            got = gradient_of(adapter, w, frozen, t, g)
            for name, slope in jax.grad(dense)(t).items():
                np.testing.assert_allclose(got[name], slope, rtol=1e-10, atol=1e-12)


def test_a_dead_feature_has_no_magnitude():
    w = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)
    w[:, 5] = 0
    adapter = jp.dora(rank=2)
    frozen, t = made(adapter, w, b=0.1 * np.ones((2, 8)), a=np.ones((6, 2)))
    kernel = merged(adapter, w, frozen, t)
    gradient = gradient_of(adapter, w, frozen, t, np.ones_like(w))
    assert all(np.all(np.isfinite(x)) for x in [kernel, *gradient.values()])
    assert gradient["m_out"][5] == 0 and np.all(np.delete(gradient["m_out"], 5) != 0)
    scaled = frozen["scale"] * t["a"] @ t["b"]
    np.testing.assert_allclose(kernel[:, 5], scaled[:, 5])


@pytest.mark.interop
@pytest.mark.parametrize("shape", [(8, 12), (12, 5)], ids=str)
def test_equals_peft(shape):
    """Output, merged kernel and gradients of PEFT's DoRA on the same leaves."""
    import peft
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(*shape))
    base = {
        "kernel": jnp.asarray(net[0].weight.detach().numpy().T),
        "bias": jnp.asarray(net[0].bias.detach().numpy()),
    }
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(net, config)
    layer = theirs.base_model.model[0]
    weights = {
        "a": layer.lora_A["default"].weight,
        "b": layer.lora_B["default"].weight,
        "m_out": layer.lora_magnitude_vector["default"].weight,
    }
    start = weights["m_out"].detach().numpy().copy()
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.3 * torch.randn_like(weight)
    x = torch.randn(4, shape[0])
    out = theirs(x)
    torch.sum(out**2).backward()

    adapter = jp.dora(rank=3, alpha=7)
    adapted = jp.attach({"q": base}, adapter, ["q"], key=jax.random.key(0))
    node = adapted["q"]["kernel"]
    np.testing.assert_allclose(node.trainable["m_out"], start, rtol=1e-6)
    turned = lambda w: jnp.asarray(w.detach().numpy().T.copy())
    node = node.replace(trainable={n: turned(w) for n, w in weights.items()})
    trainable, frozen = jp.partition({"q": adapted["q"] | {"kernel": node}})
    forward = jp.adapt(lambda p, x: x @ p["q"]["kernel"] + p["q"]["bias"][None])
    x = jnp.asarray(x.numpy())
    run = lambda t: forward(jp.combine(t, frozen), x)
    np.testing.assert_allclose(run(trainable), out.detach().numpy(), atol=1e-5)
    gradient = jax.grad(lambda t: jnp.sum(run(t) ** 2))(trainable)
    for name, slope in gradient["q"]["kernel"].trainable.items():
        # PEFT's magnitude is kept as [out]; its factors are transposed.
        np.testing.assert_allclose(
            slope, weights[name].grad.numpy().T, rtol=1e-4, atol=1e-5, err_msg=name
        )
    merged_tree = jp.merge(jp.combine(trainable, frozen))
    whole = theirs.merge_and_unload()[0].weight.detach().numpy().T
    np.testing.assert_allclose(merged_tree["q"]["kernel"], whole, atol=1e-5)
    assert np.max(np.abs(whole - base["kernel"])) > 0.1  # control


def test_bad_options(as_a_user):
    with pytest.raises(ValueError, match="`init` must be one of uniform"):
        jp.dora(init="svd")
    params = {"q": {"kernel": jnp.ones((4, 6))}}
    with pytest.raises(ValueError, match="'q/kernel'.*`rank` must be"):
        adapter = jp.dora(rank=5, init="pissa")
        jp.attach(params, adapter, ["q"], key=jax.random.key(0))
