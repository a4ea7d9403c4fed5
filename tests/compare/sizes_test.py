"""What a run trained and what it must store, out of its folder."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import compare, interop
from jaxpeft.allocate import Allocation, SiteRank

# A component of a 12 x 8 kernel: a and b train, and their start is stored beside them.
TRAINS, STORED = 12 + 8, 2 * (12 + 8)
HEAD = 8 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of four components at each of two kernels, with a bias and a head."""
    folder = tmp_path_factory.mktemp("run")
    kernel = jax.random.normal(jax.random.key(0), (12, 8))
    params = {name: {"kernel": kernel, "bias": jnp.ones(8)} for name in ("one", "two")}
    params["head"] = {"kernel": jnp.ones((8, 3))}
    tree = jp.attach(params, jp.pc(rank=4), ["one", "two"], key=jax.random.key(1))
    tree = jp.attach(tree, jp.bitfit(), ["one"], key=jax.random.key(1))
    tree = jp.attach(tree, jp.full(), ["head"], key=jax.random.key(1))
    interop.save_adapter(tree, folder / "adapter")
    results = {"trainable": jp.count(tree)[0]}
    (folder / "report.json").write_text(json.dumps({"results": results}))
    return folder


def test_all_of_it_where_nothing_is_chosen(folder):
    sizes = compare.read_sizes(folder)
    assert sizes["trainable"] == 8 * TRAINS + 8 and sizes["head"] == HEAD
    assert sizes["stored"] == pytest.approx(8 * STORED + 8, abs=2)  # and scales


@pytest.mark.parametrize(
    ("unselected", "bias", "stored"),
    [
        ("keep", True, 8 * STORED + 8),
        ("revert", True, 4 * STORED + 8),
        ("revert", False, 4 * STORED),
    ],
)
def test_what_was_chosen_in_training(folder, unselected, bias, stored):
    sites = {
        "one/kernel": SiteRank(1, 1.0, (2,)),
        "two/kernel": SiteRank(3, 3.0, (0, 1, 3)),
    }
    facts = dict(
        unselected=unselected,
        trained=4 * TRAINS + 8 * bias + HEAD,
        biases={"one/bias": [bias]},
        out_of={"one/kernel": [4], "two/kernel": [4]},
    )
    Allocation.of(sites, facts).save(folder / "decided.json")
    sizes = compare.read_sizes(folder)
    (folder / "decided.json").unlink()
    assert sizes["trainable"] == 4 * TRAINS + 8 * bias
    assert sizes["stored"] == pytest.approx(stored, abs=2)
