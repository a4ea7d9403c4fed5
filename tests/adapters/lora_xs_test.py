"""LoRA-XS: fixed factors, a small core, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp
from jaxpeft.adapters import lora_xs
from jaxpeft.tree import Call


@pytest.mark.parametrize("shape", [(8, 12), (9, 9), (12, 6)])
def test_factors_are_the_best_approximation(shape, keys):
    kernel = jax.random.normal(next(keys), shape)
    frozen, trainable = lora_xs().init(next(keys), kernel, 3, 7.0)
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    best = u[:, :3] * s[:3] @ vt[:3]
    np.testing.assert_allclose(frozen["a0"] @ frozen["b0"], best, atol=1e-5)
    # All singular values on the in side; alpha is not divided out of them.
    np.testing.assert_allclose(frozen["b0"] @ frozen["b0"].T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(frozen["a0"], axis=0), s[:3], rtol=1e-4)
    assert set(trainable) == {"core"} and trainable["core"].shape == (3, 3)
    f = lora_xs().factors(kernel, frozen, {"core": jnp.eye(3)}, Call())
    np.testing.assert_allclose(change(f), 7 / 3 * best, atol=3e-5)


def test_power_iterations_find_nearly_the_same(keys):
    kernel = jax.random.normal(next(keys), (40, 30))
    products = []
    for iterations in (None, 10, 0):
        frozen, _ = lora_xs(iterations=iterations).init(
            jax.random.key(3), kernel, 4, 4.0
        )
        products.append(frozen["a0"] @ frozen["b0"])
    np.testing.assert_allclose(products[0], products[1], atol=5e-3)
    assert np.max(np.abs(products[0] - products[2])) > 0.1


def test_the_core_starts_next_to_nothing(keys):
    kernel = jax.random.normal(next(keys), (70, 60))
    _, trainable = lora_xs().init(next(keys), kernel, 50, 50.0)
    np.testing.assert_allclose(np.std(trainable["core"]), 1e-5, rtol=0.05)
    assert abs(np.mean(trainable["core"])) < 1e-6
    _, trainable = lora_xs(std=0).init(next(keys), kernel, 50, 50.0)
    assert np.all(trainable["core"] == 0)
    params = {"up": {"kernel": kernel}}
    f = lambda p, x: x @ p["up"]["kernel"]
    x = jax.random.normal(next(keys), (5, 70))
    key = next(keys)
    for std, away in ((1e-5, 1e-4), (0, 0)):
        adapted = jp.attach(params, lora_xs(std=std), ["up"], key=jax.random.clone(key))
        y, base = jp.adapt(f)(adapted, x), f(params, x)
        gap = np.max(np.abs(y - base)) / np.max(np.abs(base))
        assert gap <= away and (gap > 0) == (std > 0)


def test_the_cores_gradient_is_the_closed_form(keys):
    with jax.enable_x64(True):
        adapter = lora_xs(rank=3, alpha=7)
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, _ = adapter.init(next(keys), kernel, 3, 7.0)
        g = jax.random.normal(next(keys), (8, 6), jnp.float64)
        core = jax.random.normal(next(keys), (3, 3), jnp.float64)

        def task(core):
            f = adapter.factors(kernel, frozen, {"core": core}, Call())
            return jnp.sum(g * (kernel + change(f)))

        expected = 7 / 3 * frozen["a0"].T @ g @ frozen["b0"].T
        np.testing.assert_allclose(jax.grad(task)(core), expected, rtol=1e-10)


def test_a_site_has_rank_squared_parameters(keys):
    layer = {"kernel": jnp.eye(8, 12) + 1, "bias": jnp.ones(12)}
    adapted = jp.attach({"up": layer}, lora_xs(rank=2), ["up"], key=next(keys))
    assert jp.count(adapted) == (4, 8 * 12 + 12 + 4)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 up, got 0.*lora_xs\("),
        ({"std": -1e-5}, r"`std` must be at least 0 and finite, got -1e-05"),
        ({"std": float("nan")}, r"`std` must be at least 0 and finite, got nan"),
        ({"iterations": -1}, r"`iterations` must be at least 0.*got -1"),
        ({"scaling": "r"}, r"`scaling` must be one of alpha/r, alpha/sqrt_r"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        lora_xs(**options)


def test_ranks_up_to_the_smaller_side(keys):
    kernel = jax.random.normal(next(keys), (9, 5))
    lora_xs().init(next(keys), kernel, 5, 5.0)
    with pytest.raises(ValueError, match=r"at most 5.*\[9, 5\], got 6"):
        lora_xs().init(next(keys), kernel, 6, 5.0)
