"""VeRA, IA3 and BitFit: against HF PEFT, and what is special to each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp

SIZES = {"up": (8, 12), "down": (12, 5)}


def apply(params, x):
    for name in SIZES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x


@pytest.fixture(scope="module")
def torch_net():
    """Makes ``(torch network, the same parameters in our layout)``."""
    import torch

    def make():
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({n: torch.nn.Linear(*s) for n, s in SIZES.items()})

        def forward(x):
            for name in SIZES:
                x = torch.tanh(net[name](x))
            return x

        net.forward = forward
        turn = lambda t: jnp.asarray(t.detach().numpy().T.copy())
        params = {
            n: {"kernel": turn(net[n].weight), "bias": turn(net[n].bias)} for n in SIZES
        }
        return net, params

    return make


def with_leaves(adapted, module, frozen=None, **trainable):
    node = adapted[module]["kernel"]
    assert set(trainable) == set(node.trainable)
    node = node.replace(trainable=trainable, frozen=node.frozen | (frozen or {}))
    return adapted | {module: adapted[module] | {"kernel": node}}


def stirred(parameter):
    import torch

    with torch.no_grad():
        parameter += 0.3 * torch.randn_like(parameter)
    return jnp.asarray(parameter.detach().numpy().copy())


def agree(adapted, theirs, base):
    """Output and merged weights are PEFT's, and not the base's."""
    import torch

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    out = theirs(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(jp.adapt(apply)(adapted, x), out, atol=1e-5)
    assert np.max(np.abs(out - apply(base, x))) > 0.05
    whole, merged = theirs.merge_and_unload(), jp.merge(adapted)
    for name in SIZES:
        expected = whole[name].weight.detach().numpy().T
        np.testing.assert_allclose(merged[name]["kernel"], expected, atol=1e-5)
        expected = whole[name].bias.detach().numpy()
        np.testing.assert_allclose(merged[name]["bias"], expected, atol=1e-6)


@pytest.mark.interop
def test_vera_equals_peft(torch_net):
    import peft

    net, params = torch_net()
    config = peft.VeraConfig(r=3, target_modules=list(SIZES))
    theirs = peft.get_peft_model(net, config)
    adapted = jp.attach(params, jp.vera(rank=3), list(SIZES), key=jax.random.key(0))
    assert jp.count(adapted)[0] == 23
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == 23
    first, second = (adapted[n]["kernel"] for n in SIZES)
    for name in ("vera_a", "vera_b"):
        assert first.frozen[name] is second.frozen[name]
    assert first.frozen["vera_a"].shape == (12, 3)
    assert first.frozen["vera_b"].shape == (3, 12)
    for name in SIZES:
        layer = theirs.base_model.model[name]
        start = layer.vera_lambda_d["default"].detach().numpy()
        np.testing.assert_allclose(adapted[name]["kernel"].trainable["lam_d"], start)
        pair = {
            "vera_a": jnp.asarray(layer.vera_A["default"].numpy().T),
            "vera_b": jnp.asarray(layer.vera_B["default"].numpy().T),
        }
        adapted = with_leaves(
            adapted,
            name,
            pair,
            lam_d=stirred(layer.vera_lambda_d["default"]),
            lam_b=stirred(layer.vera_lambda_b["default"]),
        )
    agree(adapted, theirs, params)


def test_vera_keeps_its_pair_once(tmp_path):
    """On disk, and after loading: two attaches have a pair each, no site its own."""
    from jaxpeft import interop

    kernel = lambda *s: {"kernel": jnp.ones(s)}
    names = ["a", "b", "c", "d"]
    params = {n: kernel(20, 30) for n in names}
    key, other = jax.random.split(jax.random.key(0))
    adapted = jp.attach(params, jp.vera(rank=40), names[:3], key=key)
    adapted = jp.attach(adapted, jp.vera(rank=40), names[3:], key=other)
    folder = interop.save_adapter(adapted, tmp_path / "vera")
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert size < 2 * 40 * 50 * 4 + 12_000
    back = interop.load_adapter(folder, params)
    pair = lambda n: back[n]["kernel"].frozen["vera_a"]
    assert pair("a") is pair("b") is pair("c") and pair("c") is not pair("d")
    assert not np.array_equal(pair("c"), pair("d"))
    bound = np.sqrt(6 / 20)
    assert bound * 0.9 < np.max(np.abs(pair("a"))) <= bound


@pytest.mark.interop
def test_ia3_equals_peft(torch_net):
    """Outputs scaled with their bias, inputs without."""
    import peft

    net, params = torch_net()
    config = peft.IA3Config(target_modules=list(SIZES), feedforward_modules=["down"])
    theirs = peft.get_peft_model(net, config)
    key = jax.random.key(0)
    adapted = jp.attach(params, jp.ia3(), ["up"], key=key)
    adapted = jp.attach(adapted, jp.ia3(scale="in"), ["down"], key=key)
    assert jp.count(adapted)[0] == 24
    for name in SIZES:
        vector = stirred(theirs.base_model.model[name].ia3_l["default"])
        adapted = with_leaves(adapted, name, l=vector.reshape(-1))
    agree(adapted, theirs, params)
    bias = jp.merge(adapted)
    assert not np.allclose(bias["up"]["bias"], params["up"]["bias"])
    assert np.array_equal(bias["down"]["bias"], params["down"]["bias"])


def test_ia3_scales_a_bias_that_trains():
    """The bias may be adapted itself; merge and adapt agree on both."""
    params = {"up": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    adapted = jp.attach(params, jp.ia3(), ["up/kernel"], key=jax.random.key(0))
    adapted = jp.attach(adapted, jp.bitfit(), ["up"], key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    adapted = jp.combine(jax.tree.map(lambda t: t + 1, trainable), frozen)
    x = jnp.ones((2, 3))
    fn = lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"][None]
    np.testing.assert_allclose(jp.adapt(fn)(adapted, x), np.full((2, 4), 10.0))
    np.testing.assert_allclose(fn(jp.merge(adapted), x), np.full((2, 4), 10.0))
    wrong = adapted | {"up": adapted["up"] | {"bias": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="'up/bias' has shape"):
        jp.merge(wrong)


def test_bitfit_trains_the_biases_as_full_training_does():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    params = {n: {"kernel": draw(*s), "bias": draw(s[1])} for n, s in SIZES.items()}
    params["norm"] = {"scale": jnp.ones(5), "bias": jnp.zeros(5)}
    run = lambda p, x: apply(p, x) * p["norm"]["scale"][None] + p["norm"]["bias"][None]
    adapted = jp.attach(params, jp.bitfit(), ".*", key=jax.random.key(0))
    assert jp.count(adapted)[0] == 12 + 5 + 5
    trainable, frozen = jp.partition(adapted)
    x = draw(4, 8)
    loss = lambda t: jnp.sum(jp.adapt(run)(jp.combine(t, frozen), x) ** 2)
    got = jax.grad(loss)(trainable)
    expected = jax.grad(lambda p: jnp.sum(run(p, x) ** 2))(params)
    for name in params:
        slope = got[name]["bias"].trainable["value"]
        np.testing.assert_allclose(slope, expected[name]["bias"], rtol=1e-5)
    only = jp.attach(params, jp.bitfit(), ["up"], key=jax.random.key(0))
    assert jp.count(only)[0] == 12
    bare = {"up": {"kernel": draw(8, 12)}}
    with pytest.raises(ValueError, match="no biases.*bitfit"):
        jp.attach(bare, jp.bitfit(), ".*", key=jax.random.key(0))


def test_bad_options(as_a_user):
    with pytest.raises(ValueError, match="`scale` must be one of out, in"):
        jp.ia3(scale="both")
    with pytest.raises(ValueError, match="`d_initial` of vera must be positive"):
        jp.vera(d_initial=0.0)
