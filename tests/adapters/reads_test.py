"""One thin matmul for all that adapters of kernels on one input read of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import numbers, perturb
from jax.extend import core as jex
from mixtures_toolbox import alike, leaves_of

import jaxpeft as jp
from jaxpeft.tree._node import nodes

NAMES, WIDTHS, D = ("q", "k", "v"), (10, 11, 12), 6
MIXTURE = jp.molora(rank=2, experts=3)


def attached(**adapters):
    """Kernels ``q``, ``k`` and ``v`` of unequal widths, each with its adapter."""
    sizes = zip(NAMES, WIDTHS, strict=True)
    tree = {name: numbers(D, width, seed=width) for name, width in sizes}
    with jax.disable_jit():
        for name, adapter in adapters.items():
            tree = jp.attach(tree, adapter, [name], key=jax.random.key(0))
    return perturb(tree)


def use(params, x, precision="default"):
    dot = lambda w: jnp.matmul(x, w, precision=precision)
    return {name: dot(params[name]) for name in NAMES if name in params}


def products(call, *args):
    """``(width, precision)`` of the products of the input that are no kernel's."""
    found = []

    def search(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in jex.jaxprs_in_params(eqn.params):
                search(inner)
            if eqn.primitive.name == "dot_general":
                left, right = (v.aval.shape for v in eqn.invars)
                if left[-1] == D and right[-1] not in WIDTHS:
                    found.append((right[-1], eqn.params["precision"]))

    search(jax.make_jaxpr(call)(*args).jaxpr)
    return sorted(found, key=lambda pair: pair[0])


HIGH = (jax.lax.Precision.HIGHEST,) * 2
DEFAULT = (jax.lax.Precision.DEFAULT,) * 2
CASES = {
    "on a cpu": ("cpu", [(3 * 6 + 3 * 3, HIGH)]),
    "elsewhere": ("gpu", [(3 * 3, HIGH), (3 * 6, DEFAULT)]),
}


@pytest.mark.parametrize("case", CASES)
def test_mixtures_of_one_input_share_their_products(case):
    platform, expected = CASES[case]
    adapted, x = attached(**dict.fromkeys(NAMES, MIXTURE)), numbers(5, D, seed=7)
    assert products(jp.adapt(use, target=platform), adapted, x) == expected
    # What a router says of its tokens comes out of the same product.
    tapped = jp.adapt(use, taps="own", target=platform)
    assert products(tapped, adapted, x) == expected
    got, sums = tapped(adapted, x)
    for name in NAMES:
        leaves = leaves_of(adapted[name])
        kernel = adapted[name].base
        np.testing.assert_allclose(got[name], alike(x, kernel, leaves), rtol=2e-5)
        logits = np.asarray(x) @ leaves["router"]
        mean = jnp.sum(jax.nn.softmax(logits), 0)
        np.testing.assert_allclose(
            jnp.sum(sums[name]["probabilities"], 0), mean, rtol=1e-5
        )


def test_a_highest_precision_of_the_model_is_one_for_all():
    adapted, x = attached(q=MIXTURE), numbers(5, D, seed=7)
    exact = functools.partial(use, precision="highest")
    assert products(jp.adapt(exact, target="gpu"), adapted, x) == [(6 + 3, HIGH)]


def test_methods_that_differ_share_what_they_can():
    adapted = attached(q=MIXTURE, k=jp.lora(rank=5), v=jp.mosld(rank=2, experts=2))
    x = numbers(5, D, seed=7)
    assert products(jp.adapt(use), adapted, x) == [(6 + 5 + 2 + 3 + 2, HIGH)]
    got = jp.adapt(use)(adapted, x)
    for name in NAMES:
        own = jp.adapt(use)({name: adapted[name]}, x)[name]
        np.testing.assert_allclose(got[name], own, rtol=2e-5, atol=1e-6)


def test_dropout_leaves_the_routers_their_input():
    """Each site drops from its own copy of the input; routers read the whole one."""
    adapter = jp.molora(rank=2, experts=3, dropout=0.5)
    adapted = attached(**dict.fromkeys(NAMES, adapter))
    x = numbers(5, D, seed=7)
    keyed = jp.with_dropout(adapted, jax.random.key(3))
    assert [n for n, _ in products(jp.adapt(use), keyed, x)] == [6, 6, 6, 9]
    call = jp.adapt(use, taps="own")
    assert call(keyed, x)[0]["q"].tolist() != call(adapted, x)[0]["q"].tolist()
    for name in NAMES:
        whole, dropped = (call(t, x)[1][name]["gates"] for t in (adapted, keyed))
        np.testing.assert_allclose(whole, dropped, rtol=1e-5)


def test_the_router_of_a_lone_expert_is_computed_only_for_its_report():
    adapted, x = attached(q=jp.molora(rank=2, experts=1)), numbers(5, D, seed=7)
    assert [n for n, _ in products(jp.adapt(use), adapted, x)] == [2]
    tapped = jp.adapt(use, taps="own")
    assert [n for n, _ in products(tapped, adapted, x)] == [2 + 1]
    np.testing.assert_array_equal(tapped(adapted, x)[1]["q"]["gates"], 1)


def test_routers_are_read_in_float32_of_a_low_input():
    """The product is taken in float32; the input's own copy stays what it is."""
    d = 64
    x = numbers(4, d).astype(jnp.bfloat16)
    with jax.disable_jit():
        tree = {"w": jnp.zeros((d, 5), jnp.bfloat16)}
        adapted = jp.attach(tree, MIXTURE, ["w"], key=jax.random.key(0))
    adapted = perturb(adapted, scale=1.0)
    trainable, frozen = jp.partition(adapted)

    def call(trainable, x):
        fn = jp.adapt(lambda p, x: x @ p["w"], taps="own")
        return fn(jp.combine(trainable, frozen), x)

    (y, sums), pull = jax.vjp(call, trainable, x)
    assert y.dtype == jnp.bfloat16 and sums["w"]["z"].dtype == jnp.float32
    (node,) = nodes(adapted)
    router = np.asarray(node.trainable["router"], np.float64)
    z = lambda l: np.log(np.sum(np.exp(l), -1)) ** 2
    expected = z(np.asarray(x, np.float64) @ router)
    np.testing.assert_allclose(sums["w"]["z"], expected, rtol=1e-5)
    low = np.asarray(x @ router.astype(jnp.bfloat16), np.float64)
    assert np.max(np.abs(z(low) / expected - 1)) > 1e-3  # control
    kept = [v for v in jax.tree.leaves(pull) if hasattr(v, "shape")]
    assert any(v.shape == x.shape for v in kept)
    assert not any(v.shape == x.shape and v.dtype == jnp.float32 for v in kept)
