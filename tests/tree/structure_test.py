"""Numbers are leaves: trees that differ in them are one structure."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers, perturb

import jaxpeft as jp
from jaxpeft import interop, mixtures
from jaxpeft.models import ModuleName
from jaxpeft.tree import Adapter, Factors, alphas_of, nodes, options_of

PARAMS = {"query": {"kernel": numbers(6, 5, seed=1)}}
X = numbers(2, 3, 6, seed=2)
KEY = jax.random.key(0)
NAMES = [ModuleName("query", "query", "linear")]


def net(params, x):
    return x @ params["query"]["kernel"]


def attached(adapter, target="query", **more):
    return perturb(jp.attach(PARAMS, adapter, [target], key=KEY, **more))


# Two of each method, that differ in every number and in every width of a draw.
TWO = {
    "lora": (jp.lora(2, alpha=1.0), jp.lora(2, alpha=0.3)),
    "rslora": (jp.rslora(2, alpha=1.0), jp.rslora(2, alpha=0.7)),
    "pissa": (jp.pissa(2, alpha=4.0), jp.pissa(2, alpha=3.0)),
    "dora": (jp.dora(2, alpha=1.0), jp.dora(2, alpha=5.0)),
    "kasa": (
        jp.kasa(2, alpha=3.0, beta=1e-3, gamma=0.1),
        jp.kasa(2, alpha=1.0, beta=0.2, gamma=1e-4),
    ),
    "adalora": (jp.adalora(2, gamma=0.1), jp.adalora(2, alpha=1.0, gamma=0.7)),
    "vera": (jp.vera(2, d_initial=0.1), jp.vera(2, d_initial=0.7)),
    "lora_xs": (jp.lora_xs(2, std=1e-5), jp.lora_xs(2, alpha=3.0, std=0.1)),
    "mosld": (
        jp.mosld(2, experts=3, top_k=None, a_std=0.1, z_coef=0.1),
        jp.mosld(
            2,
            alpha=3.0,
            experts=3,
            top_k=None,
            temperature=2.0,
            balance_coef=0.3,
            z_coef=0.7,
            router_std=0.3,
        ),
    ),
    "molora fixed": (
        jp.molora(2, experts=2, gates=(0.2, 0.8)),
        jp.molora(2, alpha=5.0, experts=2, gates=(0.3, 2.0)),
    ),
    "modula_res": (
        jp.modula_res(("law", "code"), 1, 2, slope=0.2),
        jp.modula_res(("law", "code"), 1, 2, slope=0.7, temperature=3.0),
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_two_that_differ_in_every_number_pass_through_one_program(name, tmp_path):
    one, other = (
        attached(adapter, target)
        for adapter, target in zip(TWO[name], ("query", "query/kernel"), strict=True)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    traced: list[int] = []
    same = jax.jit(lambda tree: traced.append(1) or tree)
    forward = jp.adapt(net, taps="own")
    for i, tree in enumerate((one, other)):
        through = same(tree)
        folder = interop.save_adapter(through, tmp_path / f"{i}")
        again = interop.load_adapter(folder, PARAMS)
        y, seen = forward(tree, X)
        for made in (through, again):
            (node,), (like,) = nodes(made), nodes(tree)
            assert facts(node) == facts(like)
            assert alphas_of(node) == alphas_of(like)
            got, sums = forward(made, X)
            assert distance(got, y) < 1e-6
            penalties = jp.penalty(made, sums), jp.penalty(tree, seen)
            np.testing.assert_allclose(*penalties, rtol=1e-6)
        check_peft(through, tree, tmp_path / f"peft_{i}")
    assert len(traced) == 1
    assert distance(forward(one, X)[0], forward(other, X)[0]) > 1e-3


def facts(node):
    """What a site's method is, without what is only told."""
    told = set(node.adapter.options.drawn) - set(node.adapter.options.numbers)
    return {n: v for n, v in options_of(node).items() if n not in told | {"alpha"}}


def check_peft(through, tree, folder):
    """What PEFT is told of a tree through jit is what it is told of the tree."""
    said = []
    for i, each in enumerate((through, tree)):
        try:
            interop.save_peft(each, folder / f"{i}", names=NAMES)
        except ValueError:
            said.append(None)
        else:
            said.append((folder / f"{i}" / "adapter_config.json").read_text())
    assert said[0] == said[1]


def test_pefts_config_has_the_numbers_of_the_leaves(tmp_path):
    tree = attached(jp.kasa(2, alpha=0.3, beta=1e-3))
    tree = jp.with_numbers(tree, alpha=0.1, beta=0.7)
    interop.save_peft(tree, tmp_path, names=NAMES, form="native")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 0.1
    assert config["kasa_config"] == {"beta": 0.7, "gamma": 1e-3}


def test_numbers_compile_nothing():
    traces = []

    def counted(params, x):
        traces.append(1)
        return net(params, x)

    forward = jp.adapt(counted)
    trees = [attached(jp.lora(2), alpha_pattern={"query": a}) for a in (3.0, 4.0)]
    trees += [attached(jp.lora(2)), attached(jp.lora(2, alpha=0.7), "query/kernel")]
    for tree in trees:
        forward(tree, X)
    assert len(traces) == 1
    mixed = attached(jp.molora(rank=1, experts=2))
    for weight in (0.2, 0.3, 0.4):
        forward(mixtures.fix_gates(mixed, {"0": weight, "1": 1 - weight}), X)
    assert len(traces) == 2
    average = jax.tree.map(lambda a, b: (a + b) / 2, trees[0], trees[1])
    assert alphas_of(average["query"]["kernel"]) == (3.5,)


def test_attach_compiles_once_for_all_alphas():
    from jaxpeft.tree._begin import _initialise

    jp.attach(PARAMS, jp.pissa(2, alpha=1.0), ["query"], key=KEY)
    before = _initialise._cache_size()
    for alpha in (2.0, 3.0, 0.1):
        jp.attach(PARAMS, jp.pissa(2, alpha=alpha), ["query"], key=KEY)
    assert _initialise._cache_size() == before
    # A width of a draw is in the program: two of them are two draws.
    wide = [
        jp.attach(PARAMS, jp.vera(2, d_initial=d), ["query"], key=KEY) for d in (1, 2)
    ]
    leaves = [tree["query"]["kernel"].trainable["lam_d"] for tree in wide]
    assert np.array_equal(2 * leaves[0], leaves[1])


def test_a_tree_is_mapped_over_its_numbers():
    tree = attached(jp.kasa(2, alpha=2.0))
    alphas, weights = jnp.array([0.5, 1.0, 4.0]), jnp.array([0.0, 0.1, 0.2])

    def run(alpha, beta):
        own = jp.with_numbers(tree, alpha=alpha, beta=beta)
        return jp.adapt(net)(own, X), jp.penalty(own)

    together = jax.vmap(run)(alphas, weights)
    for i, (alpha, beta) in enumerate(zip(alphas, weights, strict=True)):
        one = attached(jp.kasa(2, alpha=float(alpha), beta=float(beta) or 1e-30))
        y = jp.adapt(net)(one, X)
        assert distance(together[0][i], y) < 1e-5
        np.testing.assert_allclose(together[1][i], jp.penalty(one), rtol=1e-5)


def test_whole_adapters_are_mapped():
    trees = [attached(jp.lora(2, alpha=a)) for a in (1.0, 3.0)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    together = jax.vmap(lambda tree: jp.adapt(net)(tree, X))(stacked)
    for i, tree in enumerate(trees):
        assert distance(together[i], jp.adapt(net)(tree, X)) < 1e-6


def test_numbers_change_and_come_back(tmp_path):
    tree = attached(jp.kasa(2, alpha=4.0, beta=0.25))
    moved = jp.with_numbers(tree, alpha=0.3, beta=0.7)
    (node,) = nodes(moved)
    assert alphas_of(node) == (0.3,) and options_of(node)["beta"] == 0.7
    assert "0.3" in str(jp.describe(moved))
    folder = interop.save_adapter(moved, tmp_path / "a")
    (again,) = nodes(interop.load_adapter(folder, PARAMS))
    assert alphas_of(again) == (0.3,) and options_of(again)["beta"] == 0.7
    assert jp.penalty(moved) == jp.penalty(interop.load_adapter(folder, PARAMS))


def test_a_number_that_is_not_there_is_an_error():
    tree = attached(jp.kasa(2, gamma=0))
    with pytest.raises(ValueError, match="no site has a number 'gamma'.*'beta'.*is 0"):
        jp.with_numbers(tree, gamma=0.1)
    with pytest.raises(ValueError, match="'temprature'"):
        jp.with_numbers(tree, temprature=1.0)


def test_a_number_of_another_shape_is_an_error():
    tree = attached(jp.molora(2, experts=3, gates=(0.2, 0.3, 0.5)))
    moved = jp.with_numbers(tree, gates=(0.6, 0.2, 0.2))
    (node,) = nodes(moved)
    assert options_of(node)["gates"] == (0.6, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"`gates` must be 3 numbers.*shape \[2\]"):
        jp.with_numbers(tree, gates=(0.2, 0.3))
    with pytest.raises(ValueError, match=r"`alpha` must be one number.*shape \[2\]"):
        jp.with_numbers(tree, alpha=np.ones(2))


def test_structure_is_structure():
    base = jax.tree.structure(attached(jp.kasa(2)))
    for other in (jp.kasa(1), jp.kasa(2, beta=0), jp.kasa(2, dropout=0.1)):
        assert jax.tree.structure(attached(other)) != base


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match="`alpha` must be finite"):
        jp.with_numbers(attached(jp.lora(2)), alpha=value)


def test_the_contract_stays_small():
    assert len(Adapter._fields) <= 9
    assert len(dataclasses.fields(Factors)) <= 4
