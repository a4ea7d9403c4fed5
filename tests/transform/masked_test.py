"""What padding holds, NaN too, reaches neither a value nor a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import numbers, perturb

import jaxpeft as jp
from jaxpeft import numerics
from jaxpeft.tree import rebuild, structure

MIXTURES = [
    name
    for name in sorted(dir(jp.adapters))
    if not name.startswith("_")
    and callable(getattr(jp.adapters, name))
    and (method := getattr(jp.adapters, name)()).where.leaf == "kernel"
    and structure(method, method.where.rank).experts
]
MASK = jnp.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
FILLS = {"zeros": 0.0, "anything": 7.5, "nan": np.nan, "infinite": np.inf}


def two_of_an_input(params, x):
    """Query and key, whose adapters share a product, and what reads both."""
    real = lambda h: jnp.where(MASK[..., None] != 0, h, 0)
    h = real(x @ params["query"]) + jnp.sin(real(x @ params["key"]))
    return h @ params["out"]


def scanned(params, x):
    """Layers of a stack, rematerialised."""

    @jax.checkpoint
    def layer(x, w):
        return jnp.sin(jnp.where(MASK[..., None] != 0, x @ w, 0)), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def attached(name, fn):
    adapter = getattr(jp.adapters, name)(rank=2)
    if adapter.where.layers is not None:
        adapter = rebuild(adapter, experts=2)  # in every layer
    params = {n: numbers(5, 5) for n in ("query", "key", "out")}
    axes = None
    if fn is scanned:
        params, axes = {"layers": numbers(2, 5, 5)}, {"layers": "layer in out"}
    key = jax.random.key(0)
    return perturb(jp.attach(params, adapter, list(params), key=key, axes=axes))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "fn, taps", [(two_of_an_input, "own"), (scanned, "own"), (two_of_an_input, None)]
)
def test_a_mixture_learns_nothing_from_padding(name, fn, taps):
    adapted = jp.tree.with_call(attached(name, fn), mask=MASK)
    trainable, frozen = jp.partition(adapted)

    def loss(trainable, x):
        tree = jp.combine(trainable, frozen)
        if taps is None:
            y, sums = jp.adapt(fn)(tree, x), {}
        else:
            y, sums = jp.adapt(fn, taps=taps)(tree, x)
        y = jnp.where(MASK[..., None] != 0, y, 0)
        each = [numerics.balance_and_z(s) for s in sums.values() if s]
        more = jax.tree.map(jnp.sum, each)
        return jnp.sum(jnp.cos(y)) + sum(map(sum, more)), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    made = {}
    for fill, value in FILLS.items():
        x = jnp.where(MASK[..., None] != 0, numbers(3, 4, 5), value)
        made[fill] = step(trainable, x)
    grads = jax.tree.leaves(made["zeros"][1])
    assert any(np.any(g != 0) for g in grads)
    for fill, got in made.items():
        for x, y in zip(*map(jax.tree.leaves, (got, made["zeros"])), strict=True):
            assert np.array_equal(x, y), fill


def test_moments_of_inputs_have_gradients_without_padding():
    weight = jnp.array([1.0, 0.0, 1.0, 1.0])

    def loss(x):
        count, mean, centred = numerics.centre(x, weight)
        moments = numerics.input_moments(x, weight)
        sums = [jnp.sum(jnp.sin(v)) for v in (mean, centred, moments.scatter)]
        return sum(sums) + count

    x = numbers(4, 3)
    expected = jax.value_and_grad(loss)(x.at[1].set(0.0))
    for value in (7.5, jnp.nan, jnp.inf):
        got = jax.value_and_grad(loss)(x.at[1].set(value))
        assert np.array_equal(got[0], expected[0])
        assert np.array_equal(got[1], expected[1]) and np.all(got[1][1] == 0)


def test_what_is_shown_is_chosen():
    mask, x = jnp.array([True, False]), jnp.array([[2.0, 3.0], [jnp.nan, jnp.inf]])
    of = lambda x: jnp.sum(jnp.log(1 + numerics.where_shown(mask, x)) * x.shape[0])
    value, gradient = jax.value_and_grad(of)(x)
    assert np.isfinite(value) and np.all(gradient[1] == 0) and np.all(gradient[0] != 0)
    product = lambda x: jnp.sum(jnp.log(1 + mask[:, None].astype(x.dtype) * x))
    assert not np.isfinite(product(x))  # control
    assert numerics.where_shown(jnp.float32(0), x).shape == x.shape
    half = numerics.where_shown(jnp.array([0.5, 0.0]), x)
    assert half.tolist() == [[2.0, 3.0], [0.0, 0.0]]  # chosen, not weighted
