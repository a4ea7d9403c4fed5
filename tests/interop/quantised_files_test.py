"""Adapters of quantised bases in files: our own, and HF PEFT's on the float base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_toolbox import LAYERS, apply, parameters

import jaxpeft as jp
from jaxpeft import interop
from jaxpeft.models import ModuleName
from jaxpeft.testing._compare import perturb

SITES = list(LAYERS)
NAMES = [ModuleName(name, name, "linear") for name in LAYERS]


def base(params, kind="nf4"):
    return jp.quantise(params, kind, SITES, group=4)


@pytest.fixture(scope="module")
def params():
    normal = lambda i, *s: 0.3 * jax.random.normal(jax.random.key(i), s)
    kernels = {
        name: {"kernel": normal(i, *sizes), "bias": jnp.zeros(sizes[1])}
        for i, (name, sizes) in enumerate(LAYERS.items())
    }
    return kernels | {"tokens": {"embedding": normal(9, 11, LAYERS["up"][0])}}


def adapted(params, adapter):
    def make(params):
        tree = jp.attach(params, adapter, SITES, key=jax.random.key(1))
        return perturb(tree, scale=0.3)

    return jax.jit(make)(params)


def test_a_file_knows_its_codes(params, tmp_path):
    tree = adapted(base(params), jp.lora(rank=2))
    interop.save_adapter(tree, tmp_path)
    again = interop.load_adapter(tmp_path, base(params))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for one, other in zip(*map(jax.tree.leaves, (again, tree)), strict=True):
        assert np.array_equal(one, other)
    on = r"'up/kernel' is {}, and the adapter was trained on quantised as nf4; check_"
    for other, kind in (
        (params, "floats"),
        (base(params, "int8"), "quantised as int8"),
    ):
        with pytest.raises(ValueError, match=on.format(kind)):
            interop.load_adapter(tmp_path, other)
        interop.load_adapter(tmp_path, other, check_base=False)
    moved = {**params, "up": params["up"] | {"kernel": params["up"]["kernel"] + 0.5}}
    with pytest.raises(ValueError, match="'up/kernel' is not the kernel.*fingerprint"):
        interop.load_adapter(tmp_path, base(moved))


def test_an_adapter_of_floats_says_so_of_codes(params, tmp_path):
    interop.save_adapter(adapted(params, jp.lora(rank=2)), tmp_path)
    with pytest.raises(
        ValueError, match="is quantised as nf4, and .* trained on floats"
    ):
        interop.load_adapter(tmp_path, base(params))


def test_folded_terms_go_into_the_codes_again(params, tmp_path):
    folds = jp.pissa(rank=2, residual="folded")
    tree = adapted(base(params), folds)
    interop.save_adapter(tree, tmp_path)
    again = interop.load_adapter(tmp_path, base(params))
    for name in SITES:
        one, other = again[name]["kernel"].base, tree[name]["kernel"].base
        assert np.mean(one.codes != other.codes) < 0.02  # of rounding, not of the base
    with pytest.raises(ValueError, match="is floats"):
        interop.load_adapter(tmp_path, params)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_peft_runs_it_on_the_float_base(oracle, ids, tmp_path):
    net = oracle.Net(0)
    params = parameters(net)
    tree = adapted(base(params, "int8"), jp.lora(rank=2))
    interop.save_peft(tree, tmp_path / "peft", names=NAMES)
    assert "quantised as int8" in (tmp_path / "peft/README.md").read_text()
    model = oracle.peft.PeftModel.from_pretrained(net, tmp_path / "peft").eval()
    theirs = model(oracle.torch.tensor(ids)).detach().numpy()
    ours = jp.adapt(apply)(tree, ids)
    # They differ by what the codes lose, some 0.5% of each kernel, and no more.
    assert 1e-5 < np.abs(theirs - ours).max() < 0.05
    plain = jp.adapt(apply)(jp.detach(tree), ids)
    assert np.abs(theirs - plain).max() > 0.1  # control: the adapter is at work
