"""Exact neighbours in float32, against float64 on the host."""

import jax.numpy as jnp
import numpy as np
import pytest
from dimension_toolbox import gaussian

from jaxpeft import dimension
from jaxpeft.dimension import _neighbours as private


def brute(x, k):
    """By all differences, in float64."""
    x = np.asarray(x, np.float64)
    r = np.sqrt(np.sum((x[:, None] - x[None]) ** 2, -1))
    np.fill_diagonal(r, np.inf)
    order = np.argsort(r, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(r, order, 1), order


@pytest.mark.parametrize("offset", [0, 300])
@pytest.mark.parametrize("d", [1, 2, 8])
def test_float32_finds_what_float64_finds(d, offset):
    """Measured 2e-7, near points 2e-8; at 300, products alone see distances of 0."""
    x = gaussian(d, 40, 300, seed=d).astype(np.float32) + np.float32(offset)
    expected, order = brute(x, 3)
    for backend, tolerance in (("jax", 1e-5), ("numpy", 1e-9)):
        r, indices = dimension.neighbours(x, 3, backend=backend, block=128)
        np.testing.assert_allclose(r, expected, rtol=tolerance, atol=tolerance / 50)
        if backend == "numpy":
            assert np.array_equal(indices, order)
        assert np.mean(indices != order) < 1e-2  # ties in float32
    if offset:
        wide = x.astype(np.float32)
        squares = np.sum(wide**2, 1)
        gram = squares[:, None] + squares[None] - 2 * wide @ wide.T
        np.fill_diagonal(gram, np.inf)
        naive = np.sqrt(np.maximum(gram.min(1), 0))
        assert np.max(np.abs(naive / expected[:, 0] - 1)) > 1e-1  # control


def test_coarse_products_are_found_out():
    """With products in bfloat16 the proof fails and differences decide."""
    x = gaussian(3, 40, 200, seed=1).astype(np.float32)
    points, _ = private._scaled(x, np.float32, 64)
    expected, order = brute(points[:200], 2)
    r, indices = private._jax(points, 200, 2, 64, 2, gram_dtype=jnp.bfloat16)
    np.testing.assert_allclose(r, expected, rtol=1e-5)
    assert np.array_equal(indices, order)
    coarse, floors, ceilings = private._candidates(
        jnp.asarray(points), 200, block=64, kept=2, dtype=jnp.bfloat16
    )
    assert not np.array_equal(coarse[:200], order)  # control
    # What is called proved is true: no other point is nearer than it says.
    r = np.sqrt(np.sum((points[:200, None] - points[None, :200]) ** 2, -1))
    own = np.take_along_axis(r, np.asarray(coarse[:200]), 1)
    assert np.all(own[:, 1] > np.asarray(floors[:200, 1]))
    assert np.all(own.max(1) < np.asarray(ceilings[:200, 1]))
    np.put_along_axis(r, np.asarray(coarse[:200]), np.inf, 1)
    np.fill_diagonal(r, np.inf)
    assert np.all(r.min(1) > np.asarray(floors[:200, -1]))


@pytest.mark.parametrize("spread", [0.01, 1])
def test_many_features_are_seen_coarsely_first(spread, monkeypatch):
    """Narrow clusters leave too much open to bfloat16, wide ones next to nothing."""
    x = np.repeat(gaussian(30, 320, 10, seed=2), 40, 0)
    x = (x + spread * gaussian(30, 320, 400, seed=2)).astype(np.float32)
    used, candidates = [], private._candidates

    def noted(*args, dtype, **kwargs):
        used.append(dtype)
        return candidates(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(private, "_candidates", noted)
    r, indices = dimension.neighbours(x, 3, block=128)
    expected, order = brute(x, 3)
    np.testing.assert_allclose(r, expected, rtol=1e-5, atol=1e-6)
    assert np.mean(indices != order) < 1e-2  # ties in float32
    assert used == [jnp.bfloat16] + [jnp.float32] * (spread < 1)


def test_any_block_gives_the_same_indices():
    x = gaussian(4, 12, 101, seed=3)
    each = [dimension.neighbours(x, 5, block=b)[1] for b in (17, 101, 512)]
    assert np.array_equal(each[0], each[1])
    assert np.array_equal(each[0], each[2])
    few = [dimension.neighbours(x, 5, block=17, extra=e)[1] for e in (0, 95)]
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(each[0], each[0][::-1])
    x = gaussian(12, 300, 101, seed=3)  # by coarse products
    each = [dimension.neighbours(x, 5, block=b)[1] for b in (17, 101)]
    assert np.array_equal(*each)


@pytest.mark.parametrize("features", [40, 300])
def test_a_few_neighbours_will_do_where_none_is_suspicious(features):
    x = gaussian(6, features, 400, seed=4).astype(np.float32)
    options = dict(backend="jax", block=128)
    r, indices = dimension.neighbours(x, 10, **options)
    some, names = private.search(x, 10, few=2, near_tol=0.01, **options)
    assert np.array_equal(names, indices[:, :2])
    np.testing.assert_allclose(some, r[:, :2], rtol=1e-6)
    x[7] = x[3] + 1e-3 * (x[5] - x[3])
    whole, _ = private.search(x, 10, few=2, near_tol=0.01, **options)
    assert whole.shape == (400, 10)
    r, _ = dimension.neighbours(x, 10, **options)
    np.testing.assert_allclose(whole, r, rtol=1e-6)


def test_copies_are_neighbours_of_each_other():
    x = np.concatenate([np.zeros((2, 3)), np.ones((1, 3))])
    for backend in ("jax", "numpy"):
        r, indices = dimension.neighbours(x, 2, backend=backend)
        assert indices.tolist() == [[1, 2], [0, 2], [0, 1]]
        assert r[:, 0].tolist() == pytest.approx([0, 0, 3**0.5])


def test_refusals():
    x = np.ones((4, 2))
    with pytest.raises(ValueError, match="`k` is 4, but 4 points have 3 neighbours"):
        dimension.neighbours(x, 4)
    with pytest.raises(ValueError, match="not finite in 1 of 4 rows, .* row 2"):
        dimension.neighbours(np.where(np.arange(8).reshape(4, 2) == 5, np.nan, x), 2)
    with pytest.raises(ValueError, match="`x` must be points"):
        dimension.neighbours(np.ones((2, 2), complex), 1)
    with pytest.raises(ValueError, match="`backend` must be one of"):
        dimension.neighbours(x, 1, backend="torch")
