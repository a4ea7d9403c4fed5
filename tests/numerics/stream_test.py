"""The incremental SVD against scikit-learn's, and against the whole covariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.numerics import _stream, join_leading, leading_rows, row_cosines


def cloud(n, d, decay, seed=0):
    """Far from the origin, with a drift: no two parts have one mean."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, d)) * decay ** np.arange(d)[None]
    x = x @ np.linalg.qr(generator.normal(size=(d, d)))[0]
    return (x + 4 + np.linspace(0, 2, n)[:, None]).astype(np.float32)


def exact(x):
    """Eigenvalues and directions of the scatter, and its trace, in float64."""
    x = x.astype(np.float64)
    values, vectors = np.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    return values[::-1], vectors[:, ::-1].T, values.sum()


def squares(found):
    return np.sum(np.square(found.rows, dtype=np.float64), -1)


def test_all_directions_are_exact_however_it_is_cut(monkeypatch):
    x, w = cloud(60, 12, 0.8), np.ones(60, np.int32)
    w[::5] = 0
    x[::5] = np.nan
    values, vectors, trace = exact(x[w == 1])
    for chunk, parts in ((256, 1), (7, 3)):
        monkeypatch.setattr(_stream, "CHUNK", chunk)
        leading = jax.jit(functools.partial(leading_rows, keep=12))
        cut = [
            leading(jnp.asarray(a), jnp.asarray(b))
            for a, b in zip(np.split(x, parts), np.split(w, parts), strict=True)
        ]
        found = cut[0]
        for other in cut[1:]:
            found = join_leading(found, other)
        assert found.count == 48
        np.testing.assert_allclose(found.mean, x[w == 1].mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.spread, trace, rtol=1e-5)
        np.testing.assert_allclose(squares(found) / trace, values / trace, atol=1e-6)
        cosines = np.sum(np.asarray(found.rows) * vectors, -1) / np.sqrt(values)
        np.testing.assert_allclose(np.abs(cosines[:6]), 1, atol=1e-4)


def test_what_is_kept_is_near_where_the_spectrum_decays(monkeypatch):
    """A stack of two, a hundred directions of which 16 are kept, as scikit-learn."""
    from sklearn.decomposition import IncrementalPCA

    monkeypatch.setattr(_stream, "CHUNK", 64)
    clouds = [cloud(640, 100, 0.85, seed=seed) for seed in (1, 2)]
    leading = jax.jit(jax.vmap(lambda x: leading_rows(x, jnp.ones(128), 16)))
    found = None
    for part in range(5):
        new = leading(jnp.stack([x[part::5] for x in clouds]))
        before, found = found, new if found is None else join_leading(found, new)
    for i, x in enumerate(clouds):
        values, _, trace = exact(x)
        shares = squares(found)[i][:8] / np.asarray(found.spread)[i]
        np.testing.assert_allclose(shares, values[:8] / trace, rtol=1e-2)
        control = squares(new)[i][:8] / np.asarray(new.spread)[i]  # one part alone
        assert np.max(np.abs(control / (values[:8] / trace) - 1)) > 0.05
        theirs = IncrementalPCA(16)
        for part in range(5):
            theirs.partial_fit(x[part::5])
        # Theirs cuts once a part, ours once more at the end of each.
        np.testing.assert_allclose(
            squares(found)[i][:8], theirs.singular_values_[:8] ** 2, rtol=2e-3
        )
    turned = row_cosines(before, found)
    assert turned.shape == (2, 16)
    assert np.all(turned[:, 0] > 0.9999) and 0.9 < np.min(turned) < 0.999
    np.testing.assert_allclose(row_cosines(found, found), 1, rtol=1e-5)


def test_widths_that_cannot_be():
    with pytest.raises(ValueError, match="`keep` must be from 1 to 4"):
        leading_rows(jnp.ones((3, 4)), jnp.ones(3), 5)
