"""Domains of a mixture in slots: one under a fixed gate is a pair as any other."""

import jax
import pytest
from adapt_toolbox import distance, numbers
from slots_toolbox import AXES, TARGETS, D, base, chosen, filled, net, trained

import jaxpeft as jp
from jaxpeft import mixtures, serving

NAMES = ["law", "__base__", "code", "plain"]
X = numbers(len(NAMES), 4, D, seed=9)


@pytest.fixture(scope="module")
def flan():
    return trained(jp.modula_flan(("law", "code"), rank=2, rank_universal=3, alpha=4))


@pytest.fixture(scope="module")
def file(flan, tmp_path_factory):
    """One domain as it leaves the tree that it was trained in."""
    folder = tmp_path_factory.mktemp("domains")
    return mixtures.export_domain(flan, "law", folder / "law.npz")


def test_an_exported_domain_goes_into_a_slot(flan, file):
    empty = jp.modula_flan((), rank=2, rank_universal=1, alpha=4)
    run = lambda p, k: jp.attach(p, empty, TARGETS, key=k, axes=AXES)
    away = mixtures.import_domain(jax.jit(run)(base(), jax.random.key(5)), file)
    trees = {
        "law": mixtures.fix_gates(away, {"law": 1.0}),
        "code": mixtures.stage(flan, "domain:code"),
        "plain": trained(jp.lora(4)),
    }
    slots = filled(**trees)
    forward = jax.jit(jp.adapt(net))
    y, plain = forward(chosen(slots, NAMES), X), forward(base(), X)
    assert (y[1] == plain[1]).all()  # bit for bit
    trees["law"] = mixtures.fix_gates(flan, {"law": 1.0})  # where it was trained
    for name, tree in trees.items():
        row = NAMES.index(name)
        alone = forward(tree, X)[row]
        assert distance(y[row], alone) < 1e-6
        assert distance(plain[row], alone) > 1e-2


def test_what_is_no_pair_is_refused(flan, file):
    slots = serving.slots(base(), TARGETS, capacity=1, rank=4, axes=AXES)
    with pytest.raises(ValueError, match=r"Under fixed gates.*fix_gates\(.*'code'"):
        serving.load(slots, "routed", flan)
    with pytest.raises(ValueError, match="law.npz' is a file.*import_domain.*fix_gat"):
        serving.load(slots, "law", file)
    behind = trained(jp.modula_res(("law",), rank=2, rank_universal=2))
    alone = mixtures.fix_gates(behind, {"law": 1.0})
    folded = mixtures.fold_universal(mixtures.stage(behind, "domain:law"))
    layers = trained(jp.mola(1, experts=(2, 3, 3)), ["up"])
    for tree in (behind, alone, folded, layers):
        with pytest.raises(ValueError, match=r"no matrix. Serve its tree.*with_gates"):
            serving.load(slots, "behind", tree)
    universal = mixtures.fix_gates(behind, {})  # all that is left is a pair
    assert "law" in serving.load(slots, "law", universal).names
