"""Norms and Gram distances: values, gradients, and the points where roots break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.numerics import (
    frobenius_norm,
    gram_distance,
    outer_gram_distance,
    safe_sqrt,
)


def orthonormal(key, n, r):
    return jnp.linalg.qr(jax.random.normal(key, (n, r)))[0]


def test_safe_sqrt_is_the_root_and_flat_at_zero():
    x = jnp.array([0.0, 1e-30, 0.25, 9.0])
    np.testing.assert_array_equal(safe_sqrt(x), jnp.sqrt(x))  # no eps inside
    slopes = np.asarray(jax.vmap(jax.grad(safe_sqrt))(x))
    assert slopes[0] == 0
    np.testing.assert_allclose(slopes[2:], [1.0, 1 / 6], rtol=1e-6)


def test_not_a_number_stays_one():
    assert np.isnan(safe_sqrt(jnp.array(jnp.nan)))
    assert np.isnan(gram_distance(jnp.array([[jnp.nan], [0.0]])))


def test_second_derivative_at_zero_is_finite():
    assert jax.grad(jax.grad(safe_sqrt))(0.0) == 0


@pytest.mark.parametrize("shape", [(), (2, 3), (3, 0)])
def test_frobenius_norm_of_any_shape(shape, keys):
    x = jax.random.normal(next(keys), shape)
    np.testing.assert_allclose(
        frobenius_norm(x), np.linalg.norm(np.asarray(x).ravel()), rtol=1e-6
    )
    zero = jnp.zeros(shape)
    value, gradient = jax.value_and_grad(frobenius_norm)(zero)
    assert value == 0
    assert np.all(gradient == 0)


def test_gram_distance_is_zero_with_zero_gradient_at_exact_orthonormality():
    a = jnp.eye(6)[:, :3]
    value, gradient = jax.value_and_grad(gram_distance)(a)
    assert value == 0
    assert np.all(gradient == 0)
    assert np.all(jax.grad(outer_gram_distance)(a) == 0)


@pytest.mark.parametrize(("n", "r"), [(40, 8), (4, 4)])
def test_both_distances_equal_the_literal_formulas(n, r, keys):
    with jax.enable_x64(True):
        a = jax.random.normal(next(keys), (n, r), jnp.float64)
        inner = jnp.linalg.norm(a.T @ a - jnp.eye(r))
        outer = jnp.linalg.norm(a @ a.T - jnp.eye(n))
        np.testing.assert_allclose(gram_distance(a), inner, rtol=1e-10)
        np.testing.assert_allclose(outer_gram_distance(a), outer, rtol=1e-10)
        np.testing.assert_allclose(
            jax.grad(outer_gram_distance)(a),
            jax.grad(lambda a: jnp.linalg.norm(a @ a.T - jnp.eye(n)))(a),
            rtol=1e-9,
        )


def test_gradients_are_the_closed_forms(keys):
    with jax.enable_x64(True):
        n, r = 20, 5
        a = jax.random.normal(next(keys), (n, r), jnp.float64)
        e = gram_distance(a)
        closed = 2 * a @ (a.T @ a - jnp.eye(r)) / e
        np.testing.assert_allclose(jax.grad(gram_distance)(a), closed, rtol=1e-10)
        weaker = e / jnp.sqrt(e**2 + n - r)
        np.testing.assert_allclose(
            jax.grad(outer_gram_distance)(a), closed * weaker, rtol=1e-10
        )


@pytest.mark.parametrize("distance", [gram_distance, outer_gram_distance])
def test_gradients_are_finite_differences(distance, keys):
    with jax.enable_x64(True):
        a = jax.random.normal(next(keys), (9, 4), jnp.float64)
        step = jax.random.normal(next(keys), a.shape, jnp.float64)
        h = 1e-6
        slope = (distance(a + h * step) - distance(a - h * step)) / (2 * h)
        exact = jnp.sum(jax.grad(distance)(a) * step)
        np.testing.assert_allclose(slope, exact, rtol=1e-7)


def test_nothing_larger_than_r_by_r_is_formed():
    n, r = 512, 4
    for distance in (gram_distance, outer_gram_distance):
        traced = jax.make_jaxpr(jax.grad(distance))(jnp.zeros((n, r)))
        sizes = [v.aval.size for eqn in traced.eqns for v in eqn.outvars]
        assert max(sizes) <= n * r


def test_a_matrix_wider_than_tall_is_refused():
    with pytest.raises(ValueError, match=r"`a` must have at least as many rows.*a\.T"):
        outer_gram_distance(jnp.zeros((2, 3)))
