"""Gates given with the call, masks, and what routers are penalised for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers, perturb

import jaxpeft as jp
from jaxpeft import mixtures, numerics
from jaxpeft.tree import rebuild

D, L = 6, 2
AXES = {"w": "layer in out"}
X = numbers(3, 4, D, seed=7)
MASK = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def scanned(p, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
    return jax.lax.scan(layer, x, p["w"])[0]


def unrolled(p, x):
    for i in range(L):
        x = jnp.tanh(x @ p[f"layer_{i}"])
    return x


def tree(adapter):
    run = lambda p, k: jp.attach(p, adapter, ["w"], key=k, axes=AXES)
    params = {"w": numbers(L, D, D, seed=1, scale=0.4)}
    return perturb(jax.jit(run)(params, jax.random.key(0)), scale=0.5)


def test_the_penalty_of_routers_through_a_rematerialised_scan():
    """Values as worked out from the layers' own inputs; gradients where they belong."""
    adapter = jp.mosld(rank=2, experts=3, balance_coef=0.5, z_coef=0.25)
    adapted = tree(adapter)
    trainable, frozen = jp.partition(mixtures.with_mask(adapted, MASK))

    def loss(t):
        whole = jp.combine(t, frozen)
        out, statistics = jp.adapt(scanned, taps="own")(whole, X)
        auxiliary = mixtures.auxiliary(whole, statistics)
        return auxiliary["penalty"], (out, auxiliary, statistics)

    value, (out, auxiliary, statistics) = jax.jit(loss)(trainable)
    g = jax.jit(jax.grad(loss, has_aux=True))(trainable)[0]["w"].trainable
    node, x = adapted["w"], np.asarray(X, np.float64)
    expected = []
    for i in range(L):
        leaves = {n: np.asarray(v[i], np.float64) for n, v in node.trainable.items()}
        rows = x[np.asarray(MASK) > 0]
        l = rows @ leaves["router"]
        p = np.exp(l) / np.exp(l).sum(1, keepdims=True)
        kept = l >= np.sort(l, 1)[:, 1:2]
        f = kept.mean(0) / 2
        expected.append(
            (3 * np.sum(f * p.mean(0)), np.mean(np.log(np.exp(l).sum(1)) ** 2))
        )
        gates = np.where(kept, p, 0) / np.where(kept, p, 0).sum(1, keepdims=True)
        got = np.sum(statistics["w"]["gates"][i], 0)
        np.testing.assert_allclose(got, gates.sum(0), rtol=1e-5)
        one = {"w": jax.tree.map(lambda v: v[i : i + 1], node)}  # noqa: B023
        x = np.asarray(jp.adapt(scanned)(one, jnp.asarray(x, jnp.float32)), np.float64)
    balance, z = np.sum(expected, 0)
    np.testing.assert_allclose(value, 0.5 * balance + 0.25 * z, rtol=1e-5)
    np.testing.assert_allclose(auxiliary["balance"], balance / L, rtol=1e-5)
    # Within a site the penalty reaches the router alone; a and b of lower layers
    # move what higher ones read.
    assert np.all(g["a"][-1] == 0) and np.all(g["b"][-1] == 0)
    assert np.any(g["b"][0] != 0) and np.all(np.any(g["router"] != 0, (1, 2)))
    shown = np.asarray(MASK, bool)  # what is there is the same without the mask
    assert distance(out[shown], jp.adapt(scanned)(adapted, X)[shown]) == 0
    mean = rebuild(adapter, aux_reduce="mean")
    halved = mixtures.auxiliary({"w": node.replace(adapter=mean)}, statistics)
    np.testing.assert_allclose(halved["penalty"], value / L, rtol=1e-6)
    with pytest.raises(ValueError, match="no site with experts"):
        plain = jp.attach(
            {"w": jnp.ones((2, 2))}, jp.lora(1), ["w"], key=jax.random.key(0)
        )
        mixtures.with_mask(plain, MASK)
    wrong = mixtures.with_mask(adapted, MASK[:, :2])
    with pytest.raises(ValueError, match=r"`mask` has shape \(3, 2\)"):
        jp.adapt(scanned, taps="own")(wrong, X)


def test_sums_over_eight_devices_are_those_of_one():
    """Tokens of all devices are added up before f and P are multiplied."""
    adapter = jp.mosld(rank=2, experts=3, balance_coef=1.0, z_coef=0.5)
    adapted, x = tree(adapter), numbers(8, 4, D, seed=5)
    lengths = np.array([4, 1, 0, 3, 4, 2, 0, 4])  # two devices without any token
    mask = jnp.asarray(np.arange(4) < lengths[:, None], jnp.int32)
    trainable, frozen = jp.partition(adapted)

    def penalty(t, x, mask):
        whole = mixtures.with_mask(jp.combine(t, frozen), mask)
        statistics = jp.adapt(scanned, taps="own")(whole, x)[1]
        return mixtures.auxiliary(whole, statistics)["penalty"], statistics

    run = jax.jit(jax.value_and_grad(penalty, has_aux=True))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    (one, sums), g = run(trainable, x, mask)
    cut = [jax.device_put(value, rows) for value in (x, mask)]
    (eight, apart), h = run(trainable, *cut)
    assert len(cut[0].sharding.device_set) == len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert distance(apart["w"], sums["w"]) < 1e-5
    assert distance(h["w"].trainable, g["w"].trainable) < 1e-6
    # Control: the mean of each device's own balance is another number.
    own = [run(trainable, x[i : i + 1], mask[i : i + 1])[0][0] for i in range(8)]
    assert abs(np.sum(own) / np.sum(lengths > 0) - one) > 1e-2 * one


def test_what_has_no_router_says_nothing():
    lora = tree(jp.lora(rank=2))
    assert jp.adapt(scanned, taps="own")(lora, X)[1] == {}
    fixed = mixtures.fix_gates(tree(jp.molora(2, experts=2)), {"0": 1.0})
    assert jp.adapt(scanned, taps="own")(fixed, X)[1] == {}
    assert mixtures.auxiliary(fixed, {})["penalty"] == 0


def test_a_token_does_not_depend_on_the_others():
    adapted = tree(jp.mola(rank=2, experts=3))
    forward = jp.adapt(scanned)
    assert distance(forward(adapted, X[1:2, :3]), forward(adapted, X)[1:2, :3]) < 1e-6


def test_rows_by_name_and_the_base():
    adapter = jp.modula_res(("law", "code"), rank=2, rank_universal=3)
    adapted, forward = tree(adapter), jp.adapt(scanned)
    rows = mixtures.with_gates(adapted, ["code", "__base__", "law"])
    got = forward(rows, X)
    plain = jp.detach(adapted)
    assert np.array_equal(got[1], jax.jit(scanned)(plain, X)[1])
    for i, name in ((0, "code"), (2, "law")):
        alone = mixtures.fix_gates(adapted, {name: 1.0})
        assert distance(got[i], forward(alone, X)[i]) < 1e-5
        staged = mixtures.stage(adapted, f"domain:{name}")
        assert distance(forward(staged, X), forward(alone, X)) == 0
    again = mixtures.with_gates(rows, None)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert jax.tree.structure(mixtures.fix_gates(alone, None)) == jax.tree.structure(
        adapted
    )
    with pytest.raises(ValueError, match=r"names \['x'\].*'law', 'code', '__base__'"):
        mixtures.with_gates(adapted, ["x"])
    with pytest.raises(ValueError, match=r"must be \[batch, 3\].*\[3, 2\]"):
        mixtures.with_gates(adapted, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"names \['x'\]"):
        mixtures.fix_gates(adapted, {"x": 1.0})
    with pytest.raises(ValueError, match="no site with experts"):
        mixtures.fix_gates(tree(jp.lora(rank=2)), {"0": 1.0})


def test_rows_through_jit_grow_no_program():
    adapted = tree(jp.molora(rank=2, experts=3))
    call = jax.jit(lambda t, g, x: jp.adapt(scanned)(mixtures.with_gates(t, g), x))
    for g in (jnp.eye(3), jnp.ones((3, 3)) / 3):
        call(adapted, g, X)
    assert call._cache_size() == 1


def test_balance_of_several_sites_is_that_of_each():
    sums = {
        "tokens": jnp.ones((2, 1)),
        "load": jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]),
        "probabilities": jnp.array([[[1.0, 0.0]], [[0.5, 0.5]]]),
        "active": jnp.ones((2, 2)),
        "z": jnp.ones((2, 1)),
    }
    balance, _ = numerics.balance_and_z(sums)
    assert balance.tolist() == [2.0, 1.0]
