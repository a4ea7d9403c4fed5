"""Mixtures against a loop over tokens and experts, and the properties of their form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers, perturb
from adapters_toolbox import as_a_user as as_a_user
from mixtures_toolbox import (
    TWO,
    adapted_use,
    alike,
    domains,
    leaves_of,
    one,
    stirred,
    use,
)

import jaxpeft as jp
from jaxpeft.tree import fold_base, with_call, with_options

ALIKE = {
    "soft": jp.molora(rank=2, experts=3),
    "two kept": jp.mola(rank=2, experts=3),
    "shared": jp.hydralora(rank=2, experts=3),
    "shared, two kept": jp.mosld(rank=2, experts=4),
}
NAMED = {
    "beside": jp.modula_flan(TWO, rank=2, rank_universal=3, alpha=4),
    "beside, not routed": jp.modula_flan(TWO, rank=2, route_universal=False),
    "behind": jp.modula_res(TWO, rank=2, rank_universal=3, alpha=4),
    "behind, scale 1": jp.modula_res(TWO, rank=2, rank_universal=3, slope=0.2),
}


def options(node, *names):
    return (dict(node.adapter.options)[n] for n in names)


@pytest.mark.parametrize("name", ALIKE)
def test_a_loop_over_tokens_and_experts(name):
    with jax.enable_x64(True):
        adapted, x = stirred(ALIKE[name], dtype=jnp.float64), numbers(6, 5, seed=4)
        node, x = adapted["w"], x.astype(jnp.float64)
        (k,) = options(node, "top_k")
        expected = alike(x, node.base, leaves_of(node), k)
        assert distance(adapted_use(adapted, x), jnp.asarray(expected)) < 1e-10
        soft = alike(x, node.base, leaves_of(node))
        assert (np.max(np.abs(soft - expected)) > 1e-2) == (k is not None)


@pytest.mark.parametrize("name", NAMED)
def test_a_loop_over_domains(name):
    with jax.enable_x64(True):
        adapted, x = stirred(NAMED[name], dtype=jnp.float64), numbers(6, 5, seed=4)
        node, x = adapted["w"], x.astype(jnp.float64)
        residual = name.startswith("behind")
        leaves = leaves_of(node)
        slope = dict(node.adapter.options).get("slope", 0.0)
        gates = None
        if name == "beside, not routed":
            leaves["router.universal"] = np.zeros((5, 1))
            rows = [leaves[f"router.{n}"] for n in TWO]
            l = np.asarray(x) @ np.concatenate(rows, 1)
            g = np.exp(l) / np.exp(l).sum(1, keepdims=True)
            one_by_one = [
                domains(t[None], node.base, leaves, TWO, False, (0.0, *w))
                for t, w in zip(np.asarray(x), g, strict=True)
            ]
            expected = np.concatenate(one_by_one)
        else:
            expected = domains(x, node.base, leaves, TWO, residual, gates, slope)
        assert distance(adapted_use(adapted, x), jnp.asarray(expected)) < 1e-10


def column(*v):
    return jnp.array(v, jnp.float32)[:, None]


def test_mosld_by_hand():
    x, ln = jnp.ones((1, 2)), np.log
    leaves = {
        "a": column(1, 1),
        "b": jnp.array([[[1.0, 0]], [[0, 1.0]], [[5.0, 5.0]]]),
        "router": jnp.array([[ln(4), ln(3), 0], [0, 0, 0]]),
    }
    adapter = jp.mosld(rank=1, alpha=2, experts=3)
    adapted = one(adapter, jnp.zeros((2, 2)), **leaves)
    got = adapted_use(adapted, x)
    np.testing.assert_allclose(got, [[16 / 7, 12 / 7]], rtol=1e-6)
    # The mask [[1], [0]] at p = 0.5: a is [[2], [0]].
    halved = one(adapter, jnp.zeros((2, 2)), **leaves | {"a": column(2, 0)})
    np.testing.assert_allclose(adapted_use(halved, x), got, rtol=1e-6)
    other = jnp.array([[1.0, 3.0]])
    np.testing.assert_allclose(adapted_use(halved, other), got, rtol=1e-6)
    np.testing.assert_allclose(adapted_use(adapted, other), 2 * got, rtol=1e-6)


def res_by_hand(**options):
    leaves = {
        "a.universal": column(1, 1),
        "b.universal": jnp.array([[1.0, -1, 2]]),
        "a.law": column(1, 0, 0),
        "b.law": jnp.array([[1.0, 0, 0]]),
        "a.code": column(0, 1, 0),
        "b.code": jnp.array([[0, 0, 100.0]]),
        "router.law": column(np.log(3), 0),
        "router.code": column(0, 0),
    }
    adapter = jp.modula_res(TWO, rank=1, rank_universal=1, **options)
    return one(adapter, jnp.eye(2, 3), **leaves)


def test_modula_res_by_hand():
    x = jnp.array([[1.0, 2.0]])
    got = adapted_use(res_by_hand(), x)
    np.testing.assert_allclose(got, [[6.25, -1, 5.25]], rtol=1e-6)
    alone = adapted_use(res_by_hand(stage="domain:code"), x)
    np.testing.assert_allclose(alone, [[4, -1, 3]], rtol=1e-6)
    universal = res_by_hand(stage="universal")
    np.testing.assert_allclose(adapted_use(universal, x), [[4, -1, 6]], rtol=1e-6)
    np.testing.assert_allclose(x @ jp.merge(universal)["w"], [[4, -1, 6]], rtol=1e-6)


def flan_by_hand(**options):
    leaves = {
        "a.universal": column(1, 0),
        "b.universal": jnp.array([[1.0, 0]]),
        "a.law": column(0, 1),
        "b.law": jnp.array([[0, 2.0]]),
        "router.universal": column(0, 0),
        "router.law": column(0, np.log(3) / 4),
    }
    adapter = jp.modula_flan(("law",), rank=1, rank_universal=1, **options)
    return one(adapter, jnp.zeros((2, 2)), **leaves)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("all", [0.75, 6]), ("universal", [3, 0]), ("domain:law", [0, 8])],
)
def test_modula_flan_by_hand(stage, expected):
    adapted, x = flan_by_hand(stage=stage), jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(adapted_use(adapted, x)[0], expected, rtol=1e-5)
    assert jp.mergeable(adapted) == (stage != "all")
    if stage != "all":
        np.testing.assert_allclose((x @ jp.merge(adapted)["w"])[0], expected)


def test_one_expert_and_equal_experts_are_lora():
    x = numbers(6, 5, seed=4)
    lora = stirred(jp.lora(rank=2, alpha=16))
    leaves, expected = lora["w"].trainable, adapted_use(lora, x)
    for adapter in (jp.mosld(2, experts=1, top_k=1), jp.molora(2, experts=1)):
        shape = (1, 5, 2) if adapter.name == "molora" else (5, 2)
        own = {"a": leaves["a"].reshape(shape), "b": leaves["b"][None]}
        adapted = one(adapter, lora["w"].base, **own)
        assert distance(adapted_use(adapted, x), expected) < 1e-6
        assert distance(jp.merge(adapted), jp.merge(lora)) < 1e-6
    for adapter in (jp.mosld(2, experts=3, top_k=2), jp.hydralora(2, 16, experts=3)):
        tied = {"a": leaves["a"], "b": jnp.stack([leaves["b"]] * 3)}
        adapted = perturb(one(adapter, lora["w"].base), scale=2.0)["w"]
        adapted = {"w": adapted.replace(trainable=adapted.trainable | tied)}
        assert distance(adapted_use(adapted, x), expected) < 1e-5


def test_the_order_of_experts_does_not_matter():
    adapted, x = stirred(ALIKE["two kept"]), numbers(6, 5, seed=4)
    node, order = adapted["w"], jnp.array([2, 0, 1])
    t = node.trainable
    turned = {"a": t["a"][order], "b": t["b"][order], "router": t["router"][:, order]}
    other = {"w": node.replace(trainable=turned)}
    assert distance(adapted_use(other, x), adapted_use(adapted, x)) < 1e-6
    wrong = {"w": node.replace(trainable=t | {"router": turned["router"]})}
    assert distance(adapted_use(wrong, x), adapted_use(adapted, x)) > 1e-2  # control


def test_fixed_gates_fold_and_a_router_does_not():
    x = numbers(6, 5, seed=4)
    for adapter in (ALIKE["two kept"], ALIKE["shared"]):
        adapted = stirred(adapter)
        with pytest.raises(ValueError, match="'w'.*depends on the input"):
            jp.merge(adapted)
        node = with_options(adapted["w"], gates=(0.25, 0.0, 2.0))
        assert jp.mergeable({"w": node})
        leaves = leaves_of(node)
        a = jnp.broadcast_to(leaves["a"], (3, 5, 2))
        change = sum(g * a[k] @ leaves["b"][k] for k, g in ((0, 0.25), (2, 2.0)))
        expected = x @ (node.base + leaves["scale"] * change)
        assert distance(adapted_use({"w": node}, x), expected) < 1e-5
        assert distance(x @ jp.merge({"w": node})["w"], expected) < 1e-5
        as_lora = jp.weighted([{"w": node}], [1.0], into=jp.lora())
        assert distance(adapted_use(as_lora, x), expected) < 1e-5


def test_gates_by_row():
    """Rows of one call use other experts; a row of zeros is the base, bit for bit."""
    x = numbers(3, 4, 5, seed=4)
    for name in ("beside", "behind"):
        adapted = stirred(NAMED[name])
        node, rows = adapted["w"], jnp.array([[1.0, 0, 1], [0, 0, 0], [1, 0.5, 0.25]])
        got = adapted_use(with_call(adapted, gates=rows), x)
        assert np.array_equal(got[1], jax.jit(use)({"w": node.base}, x)[1])
        for i in (0, 2):
            fixed = with_options(node, gates=tuple(map(float, rows[i])))
            one_row = adapted_use({"w": fixed}, x[i])
            assert distance(got[i], one_row) < 1e-5
    with pytest.raises(TypeError, match="gate"):  # Python's own: a name that is none
        with_call(adapted, gate=rows)
    wrong = with_call(adapted, gates=rows[:2])
    with pytest.raises(ValueError, match="`gates` are for a batch of 2 rows.*3, 4"):
        adapted_use(wrong, x)


def test_a_universal_expert_without_domains_has_gates_by_row():
    x, adapted = numbers(3, 4, 5, seed=4), stirred(jp.modula_res((), 2, 3))
    gates = jnp.array([[1.0], [0.0], [0.5]])
    whole, base = adapted_use(adapted, x), jax.jit(use)({"w": adapted["w"].base}, x)
    got = adapted_use(with_call(adapted, gates=gates), x)
    assert np.array_equal(got[1], base[1])
    assert distance(got[0], whole[0]) < 1e-6
    assert distance(got[2], (whole[2] + base[2]) / 2) < 1e-6
    folded = with_options(adapted["w"], stage="router", folded=True)
    folded = {"w": folded.replace(base=fold_base(folded))}
    again = adapted_use(with_call(folded, gates=gates), x)
    assert distance(again, got) < 1e-5


def test_in_axes_may_change_places_but_not_under_a_tap():
    """What a gate reads moves with the kernel; a tap reads the kernel's own order."""
    x, w = numbers(4, 3, 2, seed=5), numbers(3, 2, 5, seed=6)
    straight = lambda p, x: jnp.tensordot(x, p["w"], 2)
    flipped = lambda p, x: jnp.tensordot(x.swapaxes(1, 2), p["w"].swapaxes(0, 1), 2)
    attach = lambda method: perturb(
        jp.attach(
            {"w": w}, method, ["w"], key=jax.random.key(0), axes={"w": "in in out"}
        )
    )
    plain, routed = attach(jp.lora(rank=1)), attach(jp.molora(rank=1, experts=2))
    for tree in (plain, routed):
        expected = jp.adapt(straight)(tree, x)
        assert distance(jp.adapt(flipped)(tree, x), expected) < 1e-5
        assert distance(expected, straight({"w": w}, x)) > 1e-2
    with pytest.raises(jp.UnsupportedError, match="a tap reads the input"):
        jp.adapt(flipped, taps=lambda x, *leaves: x.sum(0))(plain, x)


# --- bad input ---


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.mosld(router_std=0), "`router_std` of mosld is 0.*one plain LoRA"),
        (lambda: jp.hydralora(router_std=0.0), "`router_std` of hydralora is 0"),
        (lambda: jp.mola(experts=2, top_k=3), "`top_k` is 3, .* at most 2 experts"),
        (lambda: jp.mola(top_k=0), "`top_k` must be a whole number from 1 up"),
        (lambda: jp.molora(experts=0), "`experts` must be whole numbers from 1 up"),
        (lambda: jp.molora(experts=()), "`experts` is empty"),
        (lambda: jp.molora(experts=3, gates=(1, 0)), "one number for each of 3"),
        (lambda: jp.molora(temperature=0), "`temperature` of molora must be positive"),
        (lambda: jp.mosld(balance_coef=-1), "`balance_coef` must be at least 0"),
        (lambda: jp.mosld(aux_reduce="max"), "`aux_reduce` must be one of sum, mean"),
        (lambda: jp.mosld(dropout_on="x"), "`dropout_on` must be one of a, b, input"),
        (lambda: jp.modula_res(("law", "law")), r"names \['law'\] twice"),
        (lambda: jp.modula_res(("universal",)), "cannot be named 'universal'"),
        (lambda: jp.modula_flan(("a/b",)), "letters, digits, .* got 'a/b'"),
        (lambda: jp.modula_flan(TWO, stage="domain:la"), "universal, router, domain:l"),
        (lambda: jp.modula_flan(TWO, inactive=("x",)), r"`inactive` names \['x'\]"),
        (lambda: jp.modula_flan(TWO, gates=(1, 0)), "`gates` must hold 3 numbers"),
        (lambda: jp.modula_flan(router_std=None), "`router_std` of modula_flan"),
        (lambda: jp.modula_res(TWO, folded=True), "stage 'all' trains it"),
        (lambda: jp.modula_res(slope=1.5), r"`slope` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_lone_kept_expert_without_a_balance_loss_is_warned_of():
    with pytest.warns(UserWarning, match=r"mola\(top_k=1.*never learns"):
        jp.mola(experts=4, top_k=1)
    with pytest.warns(UserWarning, match=r"modula_flan\(top_k=1.*never learns"):
        jp.modula_flan(TWO, top_k=1)
    jp.modula_flan(("law",), route_universal=False, top_k=1)
    jp.modula_res(TWO, top_k=1, z_coef=0.01)
    jp.mola(experts=4, top_k=1, balance_coef=0.01)
    jp.mola(experts=4, top_k=1, renormalise=False)
