"""Dropout: on where a key is given, one mask a site, layer and use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import CLOSE, distance, everything, numbers, pair, prepare
from jax import lax

import jaxpeft as jp

D, F, L, RATE = 12, 20, 3, 0.4


@pytest.fixture
def x():
    return numbers(5, D)


@pytest.fixture
def params():
    w = numbers(D, F, seed=1, scale=0.3)
    return {"q": {"kernel": w}, "k": {"kernel": w}}


def both(p, x):
    return x @ p["q"]["kernel"], x @ p["k"]["kernel"]


@pytest.fixture
def adapted(params, keys):
    """The same factors at both sites, so that only masks can differ."""
    tree = prepare(params, pair(dropout=RATE), ["q", "k"], keys)
    q, k = tree["q"]["kernel"], tree["k"]["kernel"]
    return {"q": {"kernel": q}, "k": {"kernel": k.replace(trainable=q.trainable)}}


def test_without_a_key_it_is_off(adapted, x):
    got = jp.adapt(both)(adapted, x)
    again = jp.adapt(both)(adapted, x)
    expected = both(jp.merge(adapted), x)
    assert distance(got, expected) < CLOSE
    assert all(jnp.array_equal(a, b) for a, b in zip(got, again, strict=True))


def test_a_method_without_dropout_gets_no_key(params, x, keys):
    adapted = prepare(params, pair(), ["q"], keys)
    with_key = jp.with_dropout(adapted, next(keys))
    assert jax.tree.structure(with_key) == jax.tree.structure(adapted)
    assert jnp.array_equal(
        jp.adapt(both)(with_key, x)[0], jp.adapt(both)(adapted, x)[0]
    )


def test_the_same_key_gives_the_same_mask(adapted, x):
    run = jax.jit(lambda a, key, x: jp.adapt(both)(jp.with_dropout(a, key), x))
    first, second = jax.random.split(jax.random.key(3))
    one = run(adapted, jax.random.clone(first), x)
    same = run(adapted, first, x)
    other = run(adapted, second, x)
    assert all(jnp.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert distance(other, one) > 1e-2


def test_sites_draw_their_own_masks(adapted, x, keys):
    q, k = jp.adapt(both)(jp.with_dropout(adapted, next(keys)), x)
    assert distance(q, k) > 1e-2  # equal without dropout:
    q, k = jp.adapt(both)(adapted, x)
    assert jnp.array_equal(q, k)


def square_site(keys, rate):
    """One site whose low-rank output shows its input: a invertible, b = 1."""
    w = numbers(D, D, seed=1, scale=0.3)
    adapter = pair(rank=D - 1, alpha=float(D - 1), dropout=rate)
    adapted = jp.attach({"w": w}, adapter, ["w"], key=next(keys))
    node = adapted["w"]
    eye = jnp.eye(D)
    trainable = {"a": eye[:, : D - 1], "b": eye[: D - 1]}
    return w, {"w": node.replace(trainable=trainable)}


def test_inverted_dropout_of_the_input(keys):
    """Entries are dropped or scaled by 1 / (1 - rate), independently of each other."""
    w, adapted = square_site(keys, RATE)
    x = 1.0 + jnp.abs(numbers(400, D))
    y = jp.adapt(lambda p, x: x @ p["w"])(jp.with_dropout(adapted, next(keys)), x)
    seen = np.asarray((y - x @ w) / x)[:, : D - 1]
    kept = np.abs(seen) > 1e-3
    np.testing.assert_allclose(seen[kept], 1 / (1 - RATE), rtol=1e-3)
    # 4,400 draws: the standard deviation of the mean is 0.0074.
    assert abs(kept.mean() - (1 - RATE)) < 0.03
    assert len({row.tobytes() for row in kept}) > 300  # rows differ


def test_expectation_is_the_output_without_dropout(adapted, x, keys):
    draws = 4000
    run = lambda key: jp.adapt(both)(jp.with_dropout(adapted, key), x)[0]
    ys = jax.jit(jax.vmap(run))(jax.random.split(next(keys), draws))
    expected = jp.adapt(both)(adapted, x)[0]
    error = jnp.std(ys, 0) / draws**0.5
    assert jnp.all(jnp.abs(jnp.mean(ys, 0) - expected) < 5 * error + 1e-5)
    assert jnp.mean(error) > 1e-4  # control: something was random


def test_the_fixed_pair_is_untouched(params, x, keys):
    adapted = prepare(params, everything(dropout=RATE), ["q"], keys)
    node = adapted["q"]["kernel"]
    silent = node.replace(trainable=node.trainable | {"b": 0 * node.trainable["b"]})
    only_fixed = {"q": {"kernel": silent}, "k": adapted["k"]}
    key, same = next(keys), next(keys)
    run = lambda tree, key: jp.adapt(both)(jp.with_dropout(tree, key), x)[0]
    off = jp.adapt(both)(only_fixed, x)[0]
    assert distance(run(only_fixed, key), off) < CLOSE
    assert distance(run(adapted, same), jp.adapt(both)(adapted, x)[0]) > 1e-2


def layer(x, w):
    return x + jnp.tanh(x @ w), None


def deltas(body):
    """What each layer adds to a constant input, so that only masks differ."""
    return lambda p, x: lax.scan(lambda c, w: (c, body(x, w)[0]), 0, p["w"])[1]


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_draw_their_own_masks(remat, x, keys):
    w = jnp.broadcast_to(numbers(D, D, seed=1, scale=0.2), (L, D, D))
    axes = {"w": "layer in out"}
    tree = prepare({"w": w}, pair(dropout=RATE), ["w"], keys, axes=axes)
    first = jax.tree.map(
        lambda t: jnp.broadcast_to(t[:1], t.shape), tree["w"].trainable
    )
    tree = {"w": tree["w"].replace(trainable=first)}
    fn = deltas(jax.checkpoint(layer) if remat else layer)
    ys = jax.jit(jp.adapt(fn))(jp.with_dropout(tree, next(keys)), x)
    assert distance(ys[0], ys[1]) > 1e-2 and distance(ys[1], ys[2]) > 1e-2
    ys = jp.adapt(fn)(tree, x)
    assert distance(ys[0], ys[1]) < CLOSE  # control


def test_remat_recomputes_the_same_mask(x, keys):
    """Or else gradients would be those of another function."""
    w = numbers(L, D, D, seed=1, scale=0.2)
    axes = {"w": "layer in out"}
    tree = prepare({"w": w}, pair(dropout=RATE), ["w"], keys, axes=axes)
    trainable, frozen = jp.partition(jp.with_dropout(tree, next(keys)))
    results = []
    for body in (layer, jax.checkpoint(layer, prevent_cse=False)):
        fn = lambda p, x: lax.scan(body, x, p["w"])[0]  # noqa: B023
        loss = lambda t, f: jnp.sum(jnp.sin(jp.adapt(fn)(jp.combine(t, f), x)))  # noqa: B023
        results.append(jax.jit(jax.value_and_grad(loss))(trainable, frozen))
    assert distance(results[1], results[0]) < CLOSE


def test_uses_of_one_site_draw_their_own_masks(x, keys):
    tree = prepare({"w": numbers(D, F, seed=1)}, pair(dropout=RATE), ["w"], keys)
    tree = jp.with_dropout(tree, next(keys))
    y, z = jp.adapt(lambda p, x: (x @ p["w"], x @ p["w"]))(tree, x)
    assert distance(y, z) > 1e-2


def test_steps_of_a_scan_on_a_shared_weight_draw_their_own_masks(x, keys):
    """A shared weight has one key: steps must not all drop the same entries."""
    tree = prepare({"w": numbers(D, F, seed=1)}, pair(dropout=RATE), ["w"], keys)
    tree = jp.with_dropout(tree, next(keys))
    fn = lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, L)[1]
    ys = jp.adapt(fn)(tree, x)
    assert distance(ys[0], ys[1]) > 1e-2


def test_the_gradient_is_that_of_the_masked_function(adapted, x, keys):
    trainable, frozen = jp.partition(jp.with_dropout(adapted, next(keys)))
    loss = jax.jit(
        lambda t, f: jnp.sum(jnp.sin(jp.adapt(both)(jp.combine(t, f), x)[0]))
    )
    gradient = jax.grad(loss)(trainable, frozen)
    rng = np.random.default_rng(0)
    way = jax.tree.map(
        lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype), trainable
    )
    step = 1e-2
    at = lambda s: float(
        loss(jax.tree.map(lambda t, d: t + s * d, trainable, way), frozen)
    )
    slope = (at(step) - at(-step)) / (2 * step)
    dot = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, way)))
    # Central differences of a loss near 10 in float32: 1e-6 * 10 / 1e-2 = 1e-3.
    assert abs(slope - float(dot)) < 2e-2 * max(abs(slope), 1.0)


def test_keys_are_leaves_that_are_not_trained(adapted, keys):
    trainable, frozen = jp.partition(jp.with_dropout(adapted, next(keys)))
    kinds = [
        jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(frozen)
    ]
    assert sum(kinds) == 2
    assert all(
        jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable)
    )


def test_a_key_in_each_layer(keys):
    axes = {"w": "layer in out"}
    tree = prepare({"w": numbers(L, D, F)}, pair(dropout=RATE), ["w"], keys, axes=axes)
    tree = jp.with_dropout(tree, next(keys))
    assert tree["w"].call["key"].shape == (L,)
    data = jax.random.key_data(tree["w"].call["key"])
    assert len({tuple(np.asarray(row)) for row in data}) == L


def test_dropout_in_bfloat16_keeps_the_dtype(params, x, keys):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tree = prepare(low, pair(dropout=RATE), ["q", "k"], keys)
    y, _ = jp.adapt(both)(jp.with_dropout(tree, next(keys)), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(y)))
