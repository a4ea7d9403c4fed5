"""Adapted trees: split, join, fold, drop, count, mask, shard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import (
    distance,
    everything,
    gated,
    numbers,
    output_scale,
    pair,
    perturb,
    prepare,
)
from jax.sharding import PartitionSpec

import jaxpeft as jp

P = PartitionSpec
D, F, L = 12, 20, 3


@pytest.fixture
def params():
    return {
        "stack": {"kernel": numbers(L, D, F, seed=1), "bias": numbers(L, F, seed=2)},
        "plain": {"kernel": numbers(D, F, seed=3)},
        "ids": jnp.arange(4),
    }


AXES = {"stack": "layer in out"}


@pytest.fixture
def adapted(params, keys):
    return prepare(params, everything(), ["stack", "plain"], keys, axes=AXES)


def test_partition_and_combine(adapted):
    trainable, frozen = jp.partition(adapted)
    assert {p.split("/")[-1] for p in jp.tree.flat(trainable)} == set("abco")
    assert {p.split("/")[-1] for p in jp.tree.flat(frozen)} == {
        "base", "bias", "ids", "p", "q", "scale"
    }  # fmt: skip
    again = jp.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        assert x is y


def test_combine_refuses_what_does_not_fit(adapted):
    trainable, frozen = jp.partition(adapted)
    with pytest.raises(ValueError, match="in both halves"):
        jp.combine(adapted, frozen)
    with pytest.raises(ValueError):
        jp.combine(trainable, {"plain": frozen["plain"]})


def test_merge_is_the_formula(adapted, params):
    node = adapted["plain"]["kernel"]
    f, t = node.frozen, node.trainable
    product = f["scale"] * t["a"] @ t["b"] + f["p"] @ f["q"]
    expected = t["c"][:, None] * (node.base + product) * t["o"][None]
    merged = jp.merge(adapted)
    assert distance(merged["plain"]["kernel"], expected) < 1e-6
    assert np.array_equal(merged["ids"], params["ids"])
    for i in range(L):
        node = jax.tree.map(lambda x: x[i], adapted["stack"]["kernel"])  # noqa: B023
        f, t = node.frozen, node.trainable
        product = f["scale"] * t["a"] @ t["b"] + f["p"] @ f["q"]
        expected = t["c"][:, None] * (node.base + product) * t["o"][None]
        assert distance(merged["stack"]["kernel"][i], expected) < 1e-6


def test_merge_of_kernels_with_many_axes_equals_the_flat_one(keys):
    """Roles in any order: [out, layer, in, out, in] and its matrices."""
    shape, axes = (4, 2, 3, 5, 7), {"w": "out layer in out in"}
    w = numbers(*shape)
    adapted = prepare({"w": w}, pair(), ["w"], keys, axes=axes)
    node = adapted["w"]
    assert node.trainable["a"].shape == (2, 3, 7, 3)
    assert node.trainable["b"].shape == (2, 3, 4, 5)
    product = jnp.einsum("lier,lroh->olihe", node.trainable["a"], node.trainable["b"])
    assert (
        distance(jp.merge(adapted)["w"], w + node.frozen["scale"][0] * product) < 1e-6
    )


def test_merge_refuses_a_method_that_reads_the_input(params, keys):
    adapted = jp.attach(params, gated(), ["plain"], key=next(keys))
    assert not jp.mergeable(adapted)
    with pytest.raises(ValueError, match="plain/kernel.*depends on the input"):
        jp.merge(adapted)
    assert jp.mergeable(jp.attach(params, pair(), ["plain"], key=next(keys)))
    assert jp.mergeable(params)


def test_detach_gives_the_same_bits_back(adapted, params):
    for tree in (jp.detach(adapted), jax.jit(jp.detach)(adapted)):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)


def test_count(adapted, params):
    total = sum(x.size for x in jax.tree.leaves(params))
    trained = (L + 1) * (3 * (D + F) + D + F)
    assert jp.count(adapted) == (trained, total + trained)
    assert jp.count(params) == (0, total)


def test_describe_prints_every_site_and_pattern(params, keys):
    adapted = jp.attach(
        params,
        pair(),
        ["stack", "plain"],
        key=next(keys),
        axes=AXES,
        rank_pattern={"stack": [1, 2, 3]},
    )
    found = jp.describe(adapted)
    assert found.patterns == {
        "plain": ["plain/kernel"],
        "stack": ["stack/kernel"],
    }
    text = str(found)
    for part in ("stack/kernel", "plain/kernel", "3 x 12 x 20", "1,2,3", "pair"):
        assert part in text
    assert f"trainable {jp.count(adapted)[0]:,} of" in text
    assert str(jp.describe(jax.eval_shape(lambda: adapted))) == text


# --- layers of unequal rank ---

RANKS = (1, 4, 2)
PADDED = [pair(), everything(), jp.lora(), jp.kasa()]


def unequal(adapter, params, keys):
    return jp.attach(
        params,
        adapter,
        ["stack"],
        key=next(keys),
        rank_pattern={"stack": RANKS},
        axes=AXES,
    )


def used(adapter, name):
    """Where an entry of a trainable leaf ``[L, ...]`` is not padding."""

    def shape(rank):
        init = functools.partial(adapter.init, rank=rank, alpha=1.0)
        key, kernel = jax.random.key(0), jnp.ones((D, F))
        return jax.eval_shape(init, key, kernel)[1][name].shape

    mask = np.zeros((L, *shape(max(RANKS))), bool)
    for i, rank in enumerate(RANKS):
        mask[(i, *(slice(0, n) for n in shape(rank)))] = True
    return mask


def stirred(adapter, params, keys):
    """Perturbed where there is no padding."""
    adapted = unequal(adapter, params, keys)
    node = perturb(adapted)["stack"]["kernel"]
    trainable = {
        n: jnp.where(used(adapter, n), x, 0.0) for n, x in node.trainable.items()
    }
    kernel = {"kernel": node.replace(trainable=trainable)}
    return adapted | {"stack": adapted["stack"] | kernel}


def scanned(params, x):
    def layer(x, p):
        return x, x @ p["kernel"] + p["bias"][None]

    return jax.lax.scan(layer, x, params["stack"])[1]


@pytest.mark.parametrize("adapter", PADDED, ids=lambda a: a.name)
def test_padding_is_zero_and_each_layer_has_its_rank(adapter, params, keys):
    node = unequal(adapter, params, keys)["stack"]["kernel"]
    for name, leaf in node.trainable.items():
        mask = used(adapter, name)
        assert np.all(np.asarray(leaf)[~mask] == 0), name
    lone = {"w": params["stack"]["kernel"][1]}
    alone = jp.attach(lone, adapter, ["w"], key=next(keys), rank_pattern={"w": 4})["w"]
    for name, leaf in alone.trainable.items():
        assert node.trainable[name][1].shape == leaf.shape


@pytest.mark.parametrize("adapter", PADDED, ids=lambda a: a.name)
def test_padding_never_learns(adapter, params, keys):
    """Exactly zero gradients, and zero after AdamW with weight decay."""
    adapted = stirred(adapter, params, keys)
    trainable, frozen = jp.partition(adapted)
    x = numbers(5, D)

    def loss(trainable):
        tree = jp.combine(trainable, frozen)
        return jnp.mean(jp.adapt(scanned)(tree, x) ** 2) + jp.penalty(tree)

    optimizer = optax.adamw(0.1, weight_decay=0.1)

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, gradient

    state, start = optimizer.init(trainable), trainable
    for _ in range(3):
        trainable, state, gradient = step(trainable, state)
        for name in start["stack"]["kernel"].trainable:
            g, now, before = (
                np.asarray(tree["stack"]["kernel"].trainable[name])
                for tree in (gradient, trainable, start)
            )
            mask = used(adapter, name)
            assert np.all(g[~mask] == 0), f"{name}: padding learns"
            assert np.all(now[~mask] == 0), f"{name}: padding moved"
            assert np.any(g[mask] != 0), f"{name} never learns"
            assert np.all((now != before)[mask]), f"{name} did not move"


@pytest.mark.parametrize("adapter", PADDED, ids=lambda a: a.name)
def test_a_padded_stack_equals_its_layers(adapter, params, keys):
    """Outputs, merged kernels, penalty, count: as if every layer stood alone."""
    adapted = stirred(adapter, params, keys)
    node = adapted["stack"]["kernel"]
    alone, x = {}, numbers(5, D)
    for i, rank in enumerate(RANKS):
        w = {"kernel": params["stack"]["kernel"][i]}
        own = {"kernel": rank}
        lone = jp.attach(w, adapter, ["kernel"], key=next(keys), rank_pattern=own)
        lone = lone["kernel"]
        cut = lambda part, like: {
            n: part[n][i][tuple(slice(0, k) for k in leaf.shape)]  # noqa: B023
            for n, leaf in like.items()
        }
        alone[f"layer_{i}"] = {
            "kernel": lone.replace(
                trainable=cut(node.trainable, lone.trainable),
                frozen=cut(node.frozen, lone.frozen),
            )
        }
    expected = jp.merge(alone)
    got = jp.merge(adapted)["stack"]["kernel"]
    for i in range(L):
        assert distance(got[i], expected[f"layer_{i}"]["kernel"]) < 1e-6
    kernels = jnp.stack([expected[f"layer_{i}"]["kernel"] for i in range(L)])
    plain = {"stack": params["stack"] | {"kernel": kernels}}
    assert distance(jp.adapt(scanned)(adapted, x), scanned(plain, x)) < 1e-5
    assert jp.count(adapted)[0] == jp.count(alone)[0]
    np.testing.assert_allclose(jp.penalty(adapted), jp.penalty(alone), rtol=1e-5)


# --- shapes of large models ---


def llama_8b(scan: bool):
    """Llama-3-8B's kernels as shapes, bfloat16."""
    linears = {
        "q": (4096, 4096),
        "k": (4096, 1024),
        "v": (4096, 1024),
        "o": (4096, 4096),
        "gate": (4096, 14336),
        "up": (4096, 14336),
        "down": (14336, 4096),
    }
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    layer = lambda *lead: {n: {"kernel": shape(*lead, *s)} for n, s in linears.items()}
    layers = (
        {"layer": layer(32)} if scan else {f"layer_{i}": layer() for i in range(32)}
    )
    embedding = {"embedding": shape(128256, 4096)}
    return layers | {"embed": embedding, "lm_head": {"kernel": shape(4096, 128256)}}


@pytest.mark.parametrize(
    "adapter, targets, expected, scan",
    [
        (jp.lora(rank=16), ["q", "v"], 6_815_744, False),
        (jp.lora(rank=16), "all-linear", 41_943_040, False),
        (jp.kasa(rank=16), ["q", "v"], 6_816_768, True),
        (jp.kasa(rank=16), "all-linear", 41_946_624, True),
        (jp.kasa(rank=16, core="full"), "all-linear", 42_000_384, True),
    ],
    ids=str,
)
def test_an_8b_model_costs_no_memory(adapter, targets, expected, scan):
    params = llama_8b(scan)
    axes = {r"layer/.*": "layer in out"} if scan else None
    attach = functools.partial(jp.attach, adapter=adapter, targets=targets, axes=axes)
    shapes = jax.eval_shape(lambda p, k: attach(p, key=k), params, jax.random.key(0))
    assert {type(x) for x in jax.tree.leaves(shapes)} == {jax.ShapeDtypeStruct}
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert jp.count(shapes) == (expected, total + expected)
    assert len(jp.describe(shapes).rows) == (1 if scan else 32) * (
        2 if targets != "all-linear" else 7
    )
    merged = jax.eval_shape(jp.merge, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


# --- shardings, names ---


def test_specs_are_those_of_the_kernel(adapted):
    specs = {
        "stack": {"kernel": P("layers", "fsdp", "tensor"), "bias": P()},
        "plain": {"kernel": P(("fsdp", "data"))},
        "ids": P(),
    }
    inherited = jp.tree.inherit_specs(adapted, specs)
    flat = jp.tree.flat(inherited)
    assert flat["stack/kernel/base"] == P("layers", "fsdp", "tensor")
    assert flat["stack/kernel/a"] == P("layers", "fsdp", None)
    assert flat["stack/kernel/b"] == P("layers", None, "tensor")
    assert flat["stack/kernel/c"] == P("layers", "fsdp")
    assert flat["stack/kernel/o"] == P("layers", "tensor")
    assert flat["stack/kernel/p"] == P("layers", "fsdp", None)
    assert flat["stack/kernel/scale"] == P("layers")
    assert flat["plain/kernel/a"] == P(("fsdp", "data"), None)
    assert flat["plain/kernel/o"] == P(None)
    assert jax.tree.structure(inherited, is_leaf=lambda s: isinstance(s, P)) == (
        jax.tree.structure(adapted)
    )


def test_flat_names_every_leaf_once(adapted):
    flat = jp.tree.flat(adapted)
    assert len(flat) == len(jax.tree.leaves(adapted))
    assert {"plain/kernel/base", "plain/kernel/a", "stack/bias", "ids"} < set(flat)
    again = jp.tree.unflat(adapted, flat)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)


def test_unflat_lists_what_is_missing_and_left_over(adapted):
    flat = jp.tree.flat(adapted)
    flat["extra"] = flat.pop("plain/kernel/a")
    with pytest.raises(ValueError, match="plain/kernel/a.*left over.*extra"):
        jp.tree.unflat(adapted, flat)


def test_penalty_is_zero_without_one_and_a_scalar(adapted, params, keys):
    assert jp.penalty(adapted) == 0 and jp.penalty(adapted).shape == ()
    assert jp.penalty(params) == 0
    scaled = jp.attach(params, output_scale(), ["plain"], key=next(keys))
    assert jp.penalty(scaled) == 0
