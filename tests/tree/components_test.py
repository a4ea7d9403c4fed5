"""Chosen components, layers of rank 0: what is refused, and what keeps its scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import allocate
from jaxpeft.allocate import Allocation, SiteRank


@pytest.fixture(scope="module")
def stack():
    kernel = jax.random.normal(jax.random.key(0), (3, 6, 5))
    return {"layer": {"q": {"kernel": kernel}}}


@pytest.fixture(scope="module")
def single():
    return {"q": {"kernel": jax.random.normal(jax.random.key(1), (8, 6))}}


def attached(params, adapter, targets=("q",), **options):
    axes = {"q": "layer in out"} if "layer" in params else None
    key = jax.random.key(2)
    return jp.attach(params, adapter, targets, key=key, axes=axes, **options)


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_the_sum_of_layers_without_rank(how, stack):
    trainable, frozen = jp.partition(
        attached(stack, jp.lora(2), rank_pattern=[2, 0, 1])
    )
    real = np.arange(2)[None] < np.array([2, 0, 1])[:, None]
    moved = {"b": jnp.where(real[..., None], jnp.full((3, 2, 5), 0.1), 0)}
    node = trainable["layer"]["q"]["kernel"]
    node = node.replace(trainable={**node.trainable, **moved})
    tree = jp.combine({"layer": {"q": {"kernel": node}}}, frozen)
    both = jp.weighted([tree, tree], [0.5, 0.5], how=how)
    base = stack["layer"]["q"]["kernel"]
    got, want = (jp.merge(x)["layer"]["q"]["kernel"] - base for x in (both, tree))
    times = 2 if how == "linear" else 1  # PEFT adds the factors, not the products
    np.testing.assert_allclose(got, times * want, atol=1e-5)
    assert not np.any(got[1]) and np.abs(got[0]).max() > 1e-2


def test_components_are_those_of_the_whole_rank(single):
    """MiLoRA's first components depend on how many there are."""
    chosen = Allocation.of(
        {"q/kernel": SiteRank(2, 2.0, (0, 1))}, {"out_of": {"q/kernel": [4]}}
    )
    whole = attached(single, jp.milora(rank=4))["q"]["kernel"]
    part = attached(single, jp.milora(rank=4), chosen)["q"]["kernel"]
    np.testing.assert_array_equal(part.trainable["a"], whole.trainable["a"][:, :2])
    assert attached(single, jp.kasa(rank=4), chosen)["q"]["kernel"].site.ranks == (2,)


@pytest.mark.parametrize("adapter", [jp.pissa(4, residual="folded"), jp.vera(4)])
def test_methods_whose_components_are_not_apart(adapter, single):
    chosen = Allocation.of({"q/kernel": SiteRank(2, 2.0, (0, 3))}, {})
    with pytest.raises(ValueError, match="folds all of them|shares its components"):
        attached(single, adapter, chosen)
    with pytest.raises(ValueError, match="no components that can be cut off"):
        allocate.compact(attached(single, adapter), chosen)


def test_the_graph_keeps_the_scale(single):
    tree = attached(single, jp.lora(rank=4, alpha=8.0))
    trainable, frozen = jp.partition(tree)
    allocator = allocate.ggm(
        2, 1, by="score", total_steps=9, initial_steps=0, collect_steps=3
    )
    state = allocator.init(trainable)
    for step in (1, 2, 3):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(x + s), trainable)
        moved = jax.tree.map(lambda x: x + 0.01, trainable)
        state, trainable = allocator.update(state, moved, grads, step, trainable)
    state, trainable, chosen = allocator.decide(state, trainable, frozen)
    assert chosen["q/kernel"].alpha == 2.0 * chosen["q/kernel"].rank
    again = attached(single, jp.lora(rank=4, alpha=8.0), chosen)["q"]["kernel"]
    assert float(again.frozen["scale"]) == float(tree["q"]["kernel"].frozen["scale"])


def test_alpha_0_is_for_rank_0_alone(stack):
    with pytest.raises(ValueError, match="alpha of site .* must be a finite number"):
        attached(stack, jp.lora(2), alpha_pattern=[8.0, 0.0, 8.0])
    attached(stack, jp.lora(2), rank_pattern=[2, 0, 2], alpha_pattern=[8.0, 0.0, 8.0])


def test_compact_takes_arrays_of_the_host(stack):
    chosen = Allocation.of(
        {"layer/q/kernel": SiteRank((1, 0, 1), (1.0, 0.0, 1.0), ((0,), (), (1,)))},
        {},
    )
    host = jax.device_get(attached(stack, jp.lora(2)))
    assert allocate.compact(host, chosen)["layer"]["q"]["kernel"].site.ranks == (
        1,
        0,
        1,
    )
