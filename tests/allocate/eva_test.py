"""EVA by hand, against scikit-learn's PCA, and against HF PEFT's own."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import allocate, numerics
from jaxpeft.allocate import KernelShape, Spectrum, eva

FLAT, STEEP = np.array([5, 5, 3, 3]) / 16, np.array([13, 1, 1, 1]) / 16


def spectrum_of(ratios):
    eye = np.broadcast_to(np.eye(ratios.shape[-1]), (*ratios.shape, ratios.shape[-1]))
    return Spectrum(ratios, eye, np.sqrt(ratios))


def test_by_hand():
    shapes = {name: KernelShape(None, 4, 4) for name in ("q", "v")}
    spectra = {"q": spectrum_of(STEEP), "v": spectrum_of(FLAT)}
    allocation = eva(shapes, spectra, rank=2, alpha=6)
    assert allocation.ranks() == {"q": 1, "v": 3}
    assert [s.alpha / s.rank for s in allocation.values()] == [3, 3]
    assert eva(shapes, spectra, rank=2, rho=1).ranks() == {"q": 2, "v": 2}
    fixed = eva(shapes, spectra, rank=2, alpha=6, adjust_alpha=False)
    assert [s.alpha for s in fixed.values()] == [6, 6]
    assert eva(shapes, spectra, rank=2, r_min=2).ranks() == {"q": 2, "v": 2}
    # The same two as layers of a stack; and a budget that takes the last one away.
    stack = {"s": KernelShape(2, 4, 4)}
    both = {"s": spectrum_of(np.stack([STEEP, FLAT]))}
    assert eva(stack, both, rank=2).ranks() == {"s": (1, 3)}
    assert eva(stack, both, rank=2, budget=3 * 8).ranks() == {"s": (1, 2)}
    all_of_it = eva(stack, both, budget=41)  # a mean rank of 2.56
    assert all_of_it.count(stack) == 40
    assert all_of_it["s"].rank == (1, 4)
    assert {a / r for r, a in all_of_it["s"].layers()} == {1.0}
    one = {"q": spectrum_of(np.array([1.0, 0, 0, 0])), "v": spectrum_of(FLAT)}
    assert eva(shapes, one, rank=1).ranks() == {"q": 1, "v": 1}
    assert eva(shapes, one | {"q": spectrum_of(np.full(4, 0.25))}, rank=1).ranks() == {
        "q": 0,
        "v": 2,
    }


def inputs(seed, rows=40, d=6, decay=0.5):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, d)) * decay ** np.arange(d)[None]
    return (x @ np.linalg.qr(generator.normal(size=(d, d)))[0] + 3).astype(np.float32)


def test_spectra_are_those_of_a_pca():
    """Any split into batches; padding does not count, whatever it holds."""
    from sklearn.decomposition import PCA

    x, mask = inputs(0), np.ones(40, np.int32)
    mask[::4] = 0
    x[::4] = np.nan
    expected = PCA().fit(x[mask == 1])
    step = jax.jit(lambda batch: {"q": allocate.input_moments(*batch)})
    for size in (10, 20, 40):
        parts = [(x[i : i + size], mask[i : i + size]) for i in range(0, 40, size)]
        found = allocate.spectrum(allocate.gather_moments(step, parts)["q"])
        np.testing.assert_allclose(
            found.ratios, expected.explained_variance_ratio_, atol=1e-5
        )
        np.testing.assert_allclose(found.singular, expected.singular_values_, rtol=1e-4)
        cosines = np.sum(found.directions.T[:4] * expected.components_[:4], 1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    raw = np.linalg.svd(x[mask == 1])[1] ** 2  # control: not centred
    assert np.max(np.abs(raw / raw.sum() - found.ratios)) > 0.1


WIDTHS = {"up": (6, 8), "mid": (8, 8), "down": (8, 5)}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_equal_to_pefts():
    """Ranks, alphas and directions on the same data, on one full batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import torch
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, sizes in WIDTHS.items():
                setattr(self, name, torch.nn.Linear(*sizes))

        def forward(self, x):
            for name in WIDTHS:
                x = torch.tanh(getattr(self, name)(x))
            return x

    net, x = Net(), torch.tensor(inputs(1, rows=64, decay=0.8)) - 3
    net.up.weight.data[1:] *= 0.01  # the others' inputs have one direction
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=list(WIDTHS),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99, use_label_mask=False),
    )
    model = peft.get_peft_model(net, config)
    simple = lambda layer_input, *_: (
        layer_input[0] if isinstance(layer_input, tuple) else layer_input
    )
    peft.initialize_lora_eva_weights(
        model,
        dataloader=[x],
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=simple,
        show_progress_bar=False,
    )
    theirs = {}
    for name in WIDTHS:
        layer = getattr(model.base_model.model, name)
        adapted = hasattr(layer, "r")
        theirs[name] = (layer.r["default"], layer.lora_alpha["default"]) * adapted

    params = {
        name: {
            "kernel": jnp.asarray(getattr(net, name).weight.detach().numpy().T)
            if not hasattr(getattr(net, name), "base_layer")
            else jnp.asarray(getattr(net, name).base_layer.weight.detach().numpy().T),
            "bias": jnp.asarray(getattr(net, name).bias.detach().numpy()),
        }
        for name in WIDTHS
    }

    def fn(p, x):
        for name in WIDTHS:
            x = jnp.tanh(x @ p[name]["kernel"] + p[name]["bias"][None])
        return x

    shapes = allocate.kernel_shapes(params, list(WIDTHS))
    for keep in (4, None):  # as many as PEFT keeps; all
        mask = jnp.ones(x.shape[:-1])
        reduce = lambda x, k=keep, m=mask: allocate.input_moments(x, m, k)
        call = jp.capture(fn, list(WIDTHS), reduce)
        step = lambda batch, call=call: call(params, batch)[1]
        moments = allocate.gather_moments(step, [jnp.asarray(x.numpy())])
        spectra = {path: allocate.spectrum(m) for path, m in moments.items()}
        allocation = eva(shapes, spectra, rank=2, alpha=4)
        ours = {p.partition("/")[0]: (s.rank, s.alpha) for p, s in allocation.sites}
        assert ours == theirs
    assert len({rank for rank, _ in ours.values()}) > 1  # control: not uniform
    adapted = jp.attach(params, jp.lora(), allocation, key=jax.random.key(0))
    started = allocate.eva_start(adapted, spectra)
    out = jp.adapt(fn)(started, jnp.asarray(x.numpy()))
    assert jnp.array_equal(out, fn(params, jnp.asarray(x.numpy())))
    for name, (rank, _) in ours.items():
        if rank:
            layer = getattr(model.base_model.model, name)
            a = layer.lora_A["default"].weight.detach().numpy()
            mine = np.asarray(started[name]["kernel"].trainable["a"])
            cosines = np.abs(np.sum(a * mine.T, 1))
            assert np.min(cosines) > 0.99
            before = np.asarray(adapted[name]["kernel"].trainable["a"])
            assert np.min(np.abs(np.sum(a * before.T, 1))) < 0.9  # control


def test_few_directions_of_wide_inputs(monkeypatch):
    """As good as all, where they decay; and no more batches than it takes."""
    monkeypatch.setattr(numerics._stream, "CHUNK", 32)
    parts = np.split(inputs(3, rows=960, d=40, decay=0.7), 8)
    seen = []

    @functools.partial(jax.jit, static_argnums=1)
    def moments(x, keep):
        found = lambda x: allocate.input_moments(x, jnp.ones(len(x)), keep)
        return {"s": jax.vmap(found)(jnp.stack([x, x * 2]))}

    def gathered(keep, **options):
        seen.clear()
        step = lambda x: seen.append(1) or moments(x, keep)
        return allocate.spectrum(allocate.gather_moments(step, parts, **options)["s"])

    whole, few = gathered(None), gathered(16)
    assert few.ratios.shape == (2, 16) and few.directions.shape == (2, 40, 16)
    np.testing.assert_allclose(few.ratios[:, :8], whole.ratios[:, :8], rtol=1e-2)
    np.testing.assert_allclose(few.singular[:, :8], whole.singular[:, :8], rtol=1e-2)
    cosines = np.sum(few.directions[..., :6] * whole.directions[..., :6], 1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)
    shapes = {"s": KernelShape(2, 40, 40)}
    found = eva(shapes, {"s": few}, rank=3)
    assert found == eva(shapes, {"s": whole}, rank=3) and found["s"].rank == (3, 3)
    with pytest.raises(ValueError, match="have 16 directions.*up to 18: .*keep=72"):
        eva(shapes, {"s": few}, rank=9)
    assert len(seen) == len(parts)
    early = gathered(16, tau=0.99, watch=4)
    assert 1 < len(seen) < len(parts)
    np.testing.assert_allclose(early.ratios[:, :4], whole.ratios[:, :4], rtol=0.2)
    gathered(16, tau=1.1, watch=4)  # control: never
    assert len(seen) == len(parts)
    with pytest.raises(ValueError, match="`tau` is for leading directions"):
        gathered(None, tau=0.99)


def test_start_of_a_stack():
    """Layers of unequal rank: what is padding stays 0; whitened on request."""
    params = {"s": {"kernel": jnp.ones((2, 4, 5))}}
    allocation = allocate.Allocation.of(
        {"s/kernel": allocate.SiteRank((1, 3), (1.0, 3.0))}
    )
    adapted = jp.attach(
        params, jp.lora(), allocation, key=jax.random.key(0), axes={"s": "layer in out"}
    )
    spectra = {"s/kernel": spectrum_of(np.stack([STEEP, FLAT]))}
    a = allocate.eva_start(adapted, spectra)["s"]["kernel"].trainable["a"]
    expected = np.stack([np.eye(4)[:, :3] * [1, 0, 0], np.eye(4)[:, :3]])
    assert np.array_equal(a, expected)
    a = allocate.eva_start(adapted, spectra, whiten=True)["s"]["kernel"].trainable["a"]
    assert a[0, 0, 0] == pytest.approx((13 / 16) ** -0.25)
    with pytest.raises(ValueError, match="no site of the tree"):
        allocate.eva_start(adapted, {"x": spectra["s/kernel"]})


def test_refusals():
    shapes = {"q": KernelShape(None, 4, 4)}
    spectra = {"q": spectrum_of(FLAT)}
    with pytest.raises(ValueError, match="`spectra` has none of site 'v'"):
        eva({"v": KernelShape(None, 4, 4)}, spectra)
    with pytest.raises(ValueError, match=r"of inputs \(4,\), not \(2, 4\)"):
        eva({"q": KernelShape(2, 4, 4)}, spectra)
    with pytest.raises(ValueError, match="`rho` must be at least 1"):
        eva(shapes, spectra, rho=0.5)
    with pytest.raises(ValueError, match="takes a `budget` of 8"):
        eva(shapes, spectra, budget=7)
    with pytest.raises(ValueError, match="no batch"):
        allocate.gather_moments(lambda batch: {}, [])
    one = allocate.Moments(np.float64(1), np.zeros(2), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="counts 1 inputs"):
        allocate.spectrum(one)
    with pytest.raises(ValueError, match="no variance"):
        allocate.spectrum(one._replace(count=np.float64(3)))
    # Of a constant, rounding is no variance; three inputs have two directions.
    x = jnp.full((300, 4), 3.7)
    step = lambda x: {"q": allocate.input_moments(x, jnp.ones(len(x)))}
    moments = allocate.gather_moments(step, [x, x])
    with pytest.raises(ValueError, match="no variance"):
        allocate.spectrum(moments["q"])
    few = jnp.asarray(inputs(0, rows=3, d=4))
    spectra = {"q": allocate.spectrum(allocate.gather_moments(step, [few])["q"])}
    assert eva(shapes, spectra, rank=2).ranks() == {"q": 2}
    with pytest.raises(ValueError, match="'q' vary along 2 directions only"):
        eva(shapes, spectra, rank=3)
    with pytest.raises(ValueError, match="inputs of 'q' are not finite"):
        allocate.gather_moments(step, [few * jnp.nan])


def test_a_budget_that_is_spent_asks_for_no_more_directions():
    shapes = {"q": KernelShape(None, 8, 8)}
    shares = np.array([5, 3, 2, 0, 0, 0, 0, 0]) / 10
    spectra = {"q": allocate.Spectrum(shares, np.eye(8), shares)}
    assert allocate.eva(shapes, spectra, budget=48, rho=4).ranks() == {"q": 3}
    with pytest.raises(ValueError, match="vary along 3 directions only"):
        allocate.eva(shapes, spectra, budget=64, rho=4)


@pytest.mark.parametrize("whiten", [False, True])
def test_a_start_in_directions_that_are_not_there(whiten):
    params = {"q": {"kernel": jnp.ones((8, 8))}}
    shares = np.array([5, 3, 2, 0, 0, 0, 0, 0]) / 10
    spectra = {"q/kernel": allocate.Spectrum(shares, np.eye(8), shares)}
    tree = jp.attach(params, jp.lora(4), ["q"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="vary along 3 directions only, its rank is 4"):
        allocate.eva_start(tree, spectra, whiten=whiten)


def test_a_batch_without_inputs_does_not_end_the_gathering():
    rng = np.random.default_rng(0)
    seen = []

    def step(batch):
        x, mask = batch
        seen.append(mask.sum())
        return {"q": allocate.input_moments(x, mask, keep=2)}

    some, none = np.ones(20), np.zeros(20)
    batches = [
        (jnp.asarray(rng.normal(size=(20, 4)), jnp.float32), mask)
        for mask in (some, none, some, some)
    ]
    allocate.gather_moments(step, batches, tau=1 - 1e-9, watch=2)
    assert len(seen) == 4
