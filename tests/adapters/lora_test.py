"""LoRA's initial values, scales and gradients on single kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp
from jaxpeft.adapters import lora, rslora
from jaxpeft.tree import Call


def begin(adapter, key, kernel, rank=None, alpha=None):
    return adapter.init(
        key, kernel, rank or adapter.where.rank, alpha or adapter.where.alpha
    )


def test_uniform_start(keys):
    _, t = begin(lora(rank=64), next(keys), jnp.zeros((400, 30)))
    bound = 1 / 20
    assert 0.99 * bound < np.max(np.abs(t["a"])) <= bound
    np.testing.assert_allclose(np.std(t["a"]), bound / np.sqrt(3), rtol=0.02)
    assert np.all(t["b"] == 0)


def test_gaussian_start(keys):
    _, t = begin(lora(rank=64, init="gaussian"), next(keys), jnp.zeros((400, 30)))
    np.testing.assert_allclose(np.std(t["a"]), 1 / 64, rtol=0.02)
    assert np.max(np.abs(t["a"])) > 3 / 64  # no uniform's tails end there
    assert np.all(t["b"] == 0)


def test_embedding_start(keys):
    _, t = begin(lora(rank=64, init="embedding"), next(keys), jnp.zeros((40, 300)))
    assert np.all(t["a"] == 0)
    np.testing.assert_allclose(np.std(t["b"]), 1, rtol=0.02)


@pytest.mark.parametrize(
    ("scaling", "rank", "alpha", "scale"),
    [
        ("alpha/r", 3, 7, 2.333333),
        ("alpha/sqrt_r", 3, 7, 4.041452),
        ("alpha/r", 2, 16, 8.0),
        ("alpha/r", 3, 8, 2.666667),
        ("alpha/sqrt_r", 4, 8, 4.0),
        ("alpha/r", 8, None, 1.0),
    ],
)
def test_scale(scaling, rank, alpha, scale, keys):
    adapter = lora(rank=rank, alpha=alpha, scaling=scaling)
    frozen, _ = begin(adapter, next(keys), jnp.zeros((9, 9)))
    np.testing.assert_allclose(frozen["scale"], scale, rtol=1e-6)


def test_a_site_uses_its_own_rank_and_alpha(keys):
    adapter = lora(rank=8, alpha=16)
    frozen, t = begin(adapter, next(keys), jnp.zeros((9, 9)), rank=4, alpha=2.0)
    assert frozen["scale"] == 0.5
    assert t["a"].shape == (9, 4)


@pytest.mark.parametrize("init", ["uniform", "gaussian", "embedding"])
def test_gradients_are_the_closed_forms(init, keys):
    with jax.enable_x64(True):
        adapter = lora(rank=3, alpha=7, init=init)
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, start = begin(adapter, next(keys), kernel)
        g = jax.random.normal(next(keys), (8, 6), jnp.float64)

        def gradients(t):
            def task(t):
                f = adapter.factors(kernel, frozen, t, Call())
                return jnp.sum(g * (kernel + change(f)))

            return jax.grad(task)(t)

        first = gradients(start)
        still, moves = ("b", "a") if init == "embedding" else ("a", "b")
        assert np.all(first[still] == 0)
        assert np.any(first[moves] != 0)
        t = {
            "a": jax.random.normal(next(keys), (8, 3), jnp.float64),
            "b": jax.random.normal(next(keys), (3, 6), jnp.float64),
        }
        later = gradients(t)
        np.testing.assert_allclose(later["a"], 7 / 3 * g @ t["b"].T, rtol=1e-10)
        np.testing.assert_allclose(later["b"], 7 / 3 * t["a"].T @ g, rtol=1e-10)


def test_rslora_is_lora_with_the_root_of_the_rank(keys):
    kernel, key = jnp.zeros((9, 6)), next(keys)
    one, other, option = (
        begin(adapter, jax.random.clone(key), kernel)
        for adapter in (
            lora(rank=4, alpha=6),
            rslora(rank=4, alpha=6),
            lora(rank=4, alpha=6, scaling="alpha/sqrt_r"),
        )
    )
    assert np.array_equal(one[1]["a"], other[1]["a"])
    assert other[0]["scale"] == option[0]["scale"] == 2 * one[0]["scale"] == 3
    t = {"a": one[1]["a"], "b": jax.random.normal(next(keys), (4, 6))}
    plain, rooted = (
        adapter.factors(kernel, frozen, t, Call())
        for adapter, frozen in ((lora(), one[0]), (rslora(), other[0]))
    )
    np.testing.assert_allclose(change(rooted), 2 * change(plain), rtol=1e-5)
    assert rslora(rank=4).name == "rslora" and rslora() is rslora(8)
    with pytest.raises(ValueError, match=r"`rank` .* got 0; write rslora\(rank=8\)"):
        rslora(rank=0)


def test_no_penalty(keys):
    adapter = lora()
    adapted = jp.attach({"w": jnp.zeros((9, 9))}, adapter, ["w"], key=next(keys))
    assert jp.penalty(adapted) == 0


def test_equal_arguments_are_one_adapter():
    assert lora(rank=4) is lora(4)
    assert lora(rank=4) is not lora(rank=5)
    assert lora(rank=4).name == "lora"


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 up, got 0"),
        ({"rank": 2.0}, r"`rank` must be a whole number from 1 up, got 2\.0"),
        ({"alpha": 0}, r"`alpha` must be positive, got 0"),
        ({"alpha": float("inf")}, r"`alpha` must be positive, got inf"),
        ({"dropout": -0.1}, r"`dropout` must be in \[0, 1\), got -0\.1"),
        ({"init": "zeros"}, r"`init` must be one of uniform, gaussian, embedding"),
        ({"scaling": "r"}, r"`scaling` must be one of alpha/r, alpha/sqrt_r, got 'r'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        lora(**options)


def test_a_rank_below_one_is_refused_at_the_site(keys):
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        lora().init(next(keys), jnp.zeros((4, 4)), 0, 8.0)
