"""Factors to start from, against NumPy's decompositions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.numerics import bottom_factors, qr_factors, top_factors

SHAPES = [(9, 5), (6, 6), (5, 9)]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def decomposed(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_top_and_bottom_are_the_references(shape, keys):
    matrix = jax.random.normal(next(keys), shape)
    u, s, vt = decomposed(matrix)
    for find, part in ((top_factors, slice(0, 2)), (bottom_factors, slice(-2, None))):
        a, b = find(matrix, 2, scale=3.0)
        best = u[:, part] * s[part] @ vt[part]
        np.testing.assert_allclose(3.0 * a @ b, best, atol=1e-5)
        assert np.max(np.abs(a @ b - best)) > 0.1  # control: the scale matters
        # Half of each singular value on each side, and both in descending order.
        np.testing.assert_allclose(a.T @ a, np.diag(s[part]) / 3, atol=1e-5)
        np.testing.assert_allclose(b @ b.T, np.diag(s[part]) / 3, atol=1e-5)


def test_all_singular_values_on_the_in_side(keys):
    matrix = jax.random.normal(next(keys), (7, 5))
    s = decomposed(matrix)[1]
    a, b = top_factors(matrix, 3, scale=2.0, split="in")
    np.testing.assert_allclose(a.T @ a, np.diag(s[:3] / 2) ** 2, atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    even = top_factors(matrix, 3, scale=2.0)
    np.testing.assert_allclose(a @ b, even[0] @ even[1], atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_power_iterations_come_near_the_best(shape, keys):
    """On noise, the worst case; measured above the least: 3e-2, 2e-3 at 2, 1e-7."""
    matrix = jax.random.normal(next(keys), shape)
    least = np.linalg.norm(decomposed(matrix)[1][4:])

    def left(iterations):
        a, b = top_factors(matrix, 4, iterations=iterations, key=jax.random.key(1))
        return np.linalg.norm(matrix - a @ b) / least - 1

    assert -1e-6 < left(10) < 1e-5 < 1e-2 < left(0) < 0.1
    again = top_factors(matrix, 4, iterations=10, key=jax.random.key(1))
    same = top_factors(matrix, 4, iterations=10, key=jax.random.key(1))
    assert np.array_equal(again[0], same[0])


def test_power_iterations_are_exact_on_a_matrix_of_low_rank(keys):
    matrix = jax.random.normal(next(keys), (30, 4)) @ jax.random.normal(
        next(keys), (4, 20)
    )
    a, b = top_factors(matrix, 4, scale=0.5, iterations=0, key=next(keys))
    np.testing.assert_allclose(0.5 * a @ b, matrix, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_qr_is_the_references(shape, rank, keys):
    matrix = jax.random.normal(next(keys), shape)
    q, r = np.linalg.qr(np.asarray(matrix, np.float64).T)
    a, b = qr_factors(matrix, rank)
    np.testing.assert_allclose(a @ b, r[:rank].T @ q[:, :rank].T, atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-6)
    # R is a triangle: the first row of the matrix needs the first row of b alone.
    np.testing.assert_allclose(a[:rank], np.tril(a[:rank]), atol=1e-5)
    q, r = np.linalg.qr(np.asarray(matrix, np.float64))  # control: not W's own QR
    if rank < min(shape):
        assert np.max(np.abs(a @ b - q[:, :rank] @ r[:rank])) > 0.1


def test_jit_and_shapes_agree(keys):
    matrix = jax.random.normal(next(keys), (8, 6))
    fast = lambda w: top_factors(w, 2, iterations=3, key=jax.random.key(0))
    for find in (
        lambda w: top_factors(w, 2),
        fast,
        lambda w: bottom_factors(w, 2),
        lambda w: qr_factors(w, 2),
    ):
        loose, tight = find(matrix), jax.jit(find)(matrix)
        np.testing.assert_allclose(loose[0] @ loose[1], tight[0] @ tight[1], atol=1e-5)
        shapes = jax.eval_shape(find, jax.ShapeDtypeStruct((8, 6), jnp.float32))
        assert [x.shape for x in shapes] == [(8, 2), (2, 6)]
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(matrix), jnp.float64)
        for find in (top_factors, bottom_factors, qr_factors):
            assert {x.dtype for x in find(wide, 2)} == {jnp.dtype("float64")}


def test_bad_arguments_are_refused():
    matrix = jnp.ones((4, 3))
    for find in (top_factors, bottom_factors, qr_factors):
        for rank in (0, 4):
            with pytest.raises(
                ValueError, match=rf"`rank` must be from 1 to 3.*{rank}"
            ):
                find(matrix, rank)
    for find in (top_factors, bottom_factors):
        with pytest.raises(ValueError, match=r"`scale` must be positive, got -1"):
            find(matrix, 1, scale=-1)
    with pytest.raises(ValueError, match="`iterations` must be at least 0, got -1"):
        top_factors(matrix, 1, iterations=-1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`key` must be given.*iterations=4"):
        top_factors(matrix, 1, iterations=4)
