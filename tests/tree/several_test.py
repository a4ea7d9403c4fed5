"""Adapters off a tree and onto a tree: names, switching, disabling, deleting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers
from contract_toolbox import METHODS, D, at_init, make_params, moved, net, same_bits

import jaxpeft as jp

PADDED = {"up": [1, 3, 2]}
AXES = {"up": "layer in out", "heads": "in out out"}
KEY = jax.random.key(0)


def small():
    return {
        "heads": {"kernel": numbers(6, 2, 3, seed=1)},
        "up": {"kernel": numbers(3, 6, 8, seed=2)},
        "norm": jnp.ones(6),
    }


def attach(params, adapter, **kwargs):
    targets = ["heads", "up"]
    return jp.attach(params, adapter, targets, key=KEY, axes=AXES, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_comes_off_and_goes_back(name):
    adapted, params = moved(name), make_params()
    off = jp.extract(adapted)
    leaves = jax.tree.leaves(off)
    assert not any(x is w for x in leaves for w in jax.tree.leaves(params))
    assert all(node.base is None for node in off.values())
    same_bits(jp.graft(params, off), adapted)
    if jp.lowrank._products.is_plain(next(iter(off.values())).adapter):
        kernels = sum(x.size for x in jax.tree.leaves(params))
        assert sum(x.size for x in leaves) < 0.6 * kernels


def test_names_are_the_keys_of_a_dictionary():
    params, x = make_params(), numbers(8, D, seed=9)
    adapters = {name: jp.extract(moved(name)) for name in ("lora", "kasa")}
    forward = jp.adapt(net)
    outputs = {
        name: forward(jp.graft(params, adapter), x)
        for name, adapter in adapters.items()
    }
    for name, output in outputs.items():
        assert np.array_equal(output, forward(moved(name), x))
    assert distance(outputs["lora"], outputs["kasa"]) > 1e-2
    trees = [jp.graft(params, adapter) for adapter in adapters.values()]
    for tree in trees:  # disabled: the base, bit for bit; and nothing was copied
        same_bits(jp.detach(tree), params)
        assert tree["dense"]["kernel"].base is params["dense"]["kernel"]


def test_a_folded_base_is_folded_again():
    params = small()
    adapted = attach(params, jp.pissa(rank=2, residual="folded"))
    assert distance(adapted["up"]["kernel"].base, params["up"]["kernel"]) > 0.1
    again = jp.graft(params, jp.extract(adapted))
    same_bits(again, adapted)


def test_unequal_ranks_and_dropout_keys():
    params = small()
    adapted = attach(params, jp.lora(2, dropout=0.5), rank_pattern=PADDED)
    off = jp.extract(jp.with_dropout(adapted, jax.random.key(1)))
    assert all(node.call is None for node in off.values())
    again = jp.graft(params, off)
    same_bits(again, adapted)
    assert again["up"]["kernel"].site.ranks == (1, 3, 2)


def test_it_traces_and_goes_where_the_kernel_lies():
    params = small()
    adapted = attach(params, jp.lora(2))
    same_bits(jax.jit(jp.graft)(params, jp.extract(adapted)), adapted)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jax.NamedSharding(mesh, jax.P(None, None, "x"))
    spread = {"kernel": jax.device_put(params["up"]["kernel"], where)}
    node = jp.graft(params | {"up": spread}, jp.extract(adapted))["up"]["kernel"]
    assert node.trainable["b"].sharding.spec == jax.P(None, None, "x")


def test_what_does_not_fit_is_listed_and_nothing_is_attached():
    params = small()
    off = jp.extract(attach(params, jp.lora(2)))
    other = {
        "heads": {"kernel": jnp.ones((6, 2, 4))},
        "upper": params["up"],
        "flat": {"kernel": jnp.ones((6, 8))},
        "norm": jp.attach(params["heads"], jp.lora(2), ["kernel"], key=KEY, axes={
            "kernel": "in out out"
        })["kernel"],
    }  # fmt: skip
    wrong = off | {"flat/kernel": off["up/kernel"], "norm": off["up/kernel"]}
    with pytest.raises(ValueError, match="nothing was attached") as told:
        jp.graft(other, wrong)
    for part in (
        "'heads/kernel' has shape (6, 2, 4), which the adapter's leaf 'b' of shape "
        "(2, 2, 3) does not fit",
        "no leaf 'up/kernel'; nearest: ['upper/kernel'",
        "'flat/kernel' has shape (6, 8), and the adapter's axes are 'batch in out'",
        "'norm' already carries 'lora'",
    ):
        assert part in str(told.value)
    with pytest.raises(ValueError, match=r"write adapter=extract\(adapted\)"):
        jp.graft(params, {"up/kernel": attach(params, jp.lora(2))["up"]["kernel"]})


def test_extract_needs_whole_adapters():
    with pytest.raises(ValueError, match="has no adapters"):
        jp.extract(small())
    with pytest.raises(ValueError, match="one half of a partition"):
        jp.extract(jp.partition(at_init("lora"))[0])
    with pytest.raises(ValueError, match=r"jaxpeft.graft\(params, adapter\)"):
        jp.describe(jp.extract(at_init("lora")))
