"""AdaLoRA's triplets on single kernels; its budget is in ``tests/allocate``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user
from adapters_toolbox import cost

import jaxpeft as jp
from jaxpeft.adapters import adalora
from jaxpeft.tree import Call


def begin(adapter, key, kernel):
    return adapter.init(key, kernel, adapter.where.rank, adapter.where.alpha)


def test_the_start(keys):
    frozen, t = begin(adalora(rank=50), next(keys), jnp.zeros((300, 200)))
    for leaf in ("a", "b"):
        np.testing.assert_allclose(np.std(t[leaf]), 0.02, rtol=0.03)
    assert np.max(np.abs(t["a"])) > 0.06  # no uniform's tails end there
    assert t["e"].shape == (50,) and np.all(t["e"] == 0)
    np.testing.assert_allclose(frozen["scale"], 50 / (50 + 1e-5), rtol=1e-7)
    frozen, _ = begin(adalora(rank=2, alpha=7), next(keys), jnp.zeros((9, 9)))
    np.testing.assert_allclose(frozen["scale"], 7 / (2 + 1e-5), rtol=1e-7)


def test_a_small_layer_counts(keys):
    layer = {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}
    adapted = jp.attach({"up": layer}, adalora(rank=3), ["up"], key=next(keys))
    assert jp.count(adapted) == (63, 8 * 12 + 12 + 63)


def test_gradients_are_the_closed_forms(keys):
    with jax.enable_x64(True):
        adapter = adalora(rank=3, alpha=7)
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, start = begin(adapter, next(keys), kernel)
        g = jax.random.normal(next(keys), (8, 6), jnp.float64)

        def task(t):
            f = adapter.factors(kernel, frozen, t, Call())
            return jnp.sum(g * (kernel + change(f)))

        first = jax.grad(task)(start)
        assert np.all(first["a"] == 0) and np.all(first["b"] == 0)
        assert np.any(first["e"] != 0)
        t = start | {"e": jax.random.normal(next(keys), (3,), jnp.float64)}
        a, b, e, s = t["a"], t["b"], t["e"], 7 / (3 + 1e-5)
        got = jax.grad(task)(t)
        np.testing.assert_allclose(got["a"], s * g @ (e[:, None] * b).T, rtol=1e-10)
        np.testing.assert_allclose(got["b"], s * (a * e[None]).T @ g, rtol=1e-10)
        np.testing.assert_allclose(got["e"], s * jnp.diag(a.T @ g @ b.T), rtol=1e-10)


def test_the_penalty(keys):
    kernel = jnp.zeros((8, 6))
    adapter = adalora(rank=3, gamma=0.3)
    frozen, t = begin(adapter, next(keys), kernel)
    t = t | {"a": jax.random.normal(next(keys), (8, 3))}
    distance = lambda x: np.linalg.norm(np.asarray(x.T @ x) - np.eye(3))
    expected = 0.3 / 2 * (distance(t["a"]) + distance(t["b"].T))
    np.testing.assert_allclose(cost(adapter)(frozen, t), expected, rtol=1e-5)
    # Nothing at orthonormal factors, and its gradient there is finite.
    orthonormal = {"a": jnp.eye(8, 3), "b": jnp.eye(3, 6), "e": t["e"]}
    value, gradient = jax.value_and_grad(cost(adapter), 1)(frozen, orthonormal)
    assert value == 0 and all(np.all(x == 0) for x in gradient.values())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), t)
    assert cost(adapter)(frozen, half).dtype == jnp.float32
    assert "dot_general" not in str(
        jax.make_jaxpr(cost(adalora(rank=3, gamma=0)))(frozen, t)
    )


def test_sites_and_layers_share_the_penalty_evenly(keys):
    params = {
        "up": {"kernel": jnp.ones((8, 6))},
        "layers": {"kernel": jnp.ones((2, 8, 6))},
    }
    adapted = jp.attach(
        params,
        adalora(rank=2),
        ["up", "layers"],
        key=next(keys),
        axes={"layers": "layer in out"},
    )
    each = []
    for part in (adapted["up"]["kernel"], *(adapted["layers"]["kernel"],) * 2):
        t = part.trainable
        if t["a"].ndim == 3:
            t = {n: x[len(each) - 1] for n, x in t.items()}
        each.append(float(cost(part.adapter)({}, t)))
    np.testing.assert_allclose(jp.penalty(adapted), np.mean(each), rtol=1e-6)
    assert np.std(each) > 1e-5  # control: they differ


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 up, got 0.*adalora\("),
        ({"alpha": 0}, r"`alpha` must be positive, got 0"),
        ({"gamma": -1}, r"`gamma` must be at least 0, got -1; write adalora\(gamma=0"),
        ({"dropout": 1}, r"`dropout` must be in \[0, 1\), got 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        adalora(**options)
