"""TwoNN and Levina-Bickel against scikit-dimension, and what must hold of them."""

import functools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from dimension_toolbox import gaussian, roll, sphere

from jaxpeft import dimension
from jaxpeft.dimension import DuplicateWarning, PrecisionWarning, mle, twonn

exact = functools.partial(twonn, backend="numpy")
PAIRS = {"harmonic": "mle", "mean": "mean", "median": "median"}


@pytest.fixture(scope="module")
def skdim():
    """Imported once: its compiler takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import skdim
    return skdim


@pytest.mark.parametrize("name", ["gaussian", "sphere", "roll"])
def test_equal_to_scikit_dimension(name, skdim):
    """Measured 1e-14: the same formulas in float64."""
    x = {
        "gaussian": lambda: gaussian(5, 30, 400, seed=0),
        "sphere": lambda: sphere(5, 400, seed=0),
        "roll": lambda: roll(400, seed=0),
    }[name]()
    r, _ = dimension.neighbours(x, 10, backend="numpy")
    for method, theirs in (("linear", "linear"), ("ml", "mle")):
        for discard in (0.1, 0.25):
            fit = skdim.id.TwoNN(discard, dist=True, method=theirs)
            expected = fit.fit(r[:, :2]).dimension_
            ours = dimension.twonn_fit(r[:, 0], r[:, 1], method, discard)
            assert ours == pytest.approx(expected, rel=1e-9)
            assert exact(x, method=method, discard=discard).dim == pytest.approx(
                skdim.id.TwoNN(discard, method=theirs).fit(x).dimension_, rel=1e-9
            )
    for comb, theirs in PAIRS.items():
        fit = skdim.id.MLE().fit(x, n_neighbors=10, comb=theirs)
        ours, local = mle(x, k=10, comb=comb, local=True, backend="numpy")
        assert ours.dim == pytest.approx(fit.dimension_, rel=1e-9)
        np.testing.assert_allclose(local, fit.dimension_pw_, rtol=1e-9)
    assert twonn(x).dim == pytest.approx(exact(x).dim, rel=1e-5)
    assert abs(twonn(x).dim - twonn(x, method="ml").dim) > 1e-3  # control


# The mean of one estimate and its sd at N = 2,000, over 100 seeds: TwoNN linear and
# maximum likelihood, Levina-Bickel mean and harmonic at k = 25.
TABLE = {
    "gaussian-2": ((2.02, 0.06), (2.01, 0.06), (2.12, 0.01), (2.03, 0.01)),
    "gaussian-10": ((9.63, 0.26), (9.66, 0.26), (9.44, 0.06), (9.02, 0.06)),
    "sphere": ((4.96, 0.16), (4.95, 0.15), (5.07, 0.03), (4.86, 0.03)),
    "roll": ((1.98, 0.06), (1.98, 0.05), (2.03, 0.01), (1.94, 0.01)),
}


@pytest.mark.parametrize("name", TABLE)
def test_dimensions_of_known_clouds(name):
    """The mean of four seeds within four sds of a mean."""
    makers = {
        "gaussian-2": lambda seed: gaussian(2, 50, 2000, seed),
        "gaussian-10": lambda seed: gaussian(10, 100, 2000, seed),
        "sphere": lambda seed: sphere(5, 2000, seed),
        "roll": lambda seed: roll(2000, seed),
    }
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is merged
        for seed in range(4):
            r = dimension.cloud(makers[name](seed), 25).r
            fits = [dimension.twonn_fit(r[:, 0], r[:, 1], m) for m in ("linear", "ml")]
            found.append(
                fits + [dimension.mle_fit(r, c)[0] for c in ("mean", "harmonic")]
            )
    for got, (expected, sd) in zip(np.mean(found, 0), TABLE[name], strict=True):
        # Half of the last printed digit is added.
        assert abs(got - expected) < 4 * sd / 4**0.5 + 0.01


def test_invariances():
    x = gaussian(3, 10, 500, seed=1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(10, 10)))[0]
    order = np.random.default_rng(3).permutation(500)
    variants = {
        "turned": x @ turn,
        "moved": x + 300,
        "small": x * 1e-6,
        "large": x * 1e6,
        "other order": x[order],
        "more features": np.concatenate([x, np.zeros((500, 4))], 1),
    }
    for name, other in variants.items():
        tolerance = 1e-9 if name != "moved" else 1e-7  # the shift rounds
        assert exact(other).dim == pytest.approx(exact(x).dim, rel=tolerance), name
        assert twonn(other.astype(np.float32)).dim == pytest.approx(
            exact(x).dim, rel=1e-2
        ), name
    stretched = x * np.linspace(0.1, 10, 10)[None]
    assert abs(exact(stretched).dim / exact(x).dim - 1) > 1e-3  # control


@pytest.mark.parametrize("jitter", [0.0, 1e-7, 1e-5])
@pytest.mark.parametrize("group", [2, 5])
def test_copies_do_not_count(jitter, group):
    """Pairs and larger groups; without merging the estimate collapses."""
    x = gaussian(4, 20, 800, seed=5)
    generator = np.random.default_rng(6)
    copies = np.repeat(x[:100], group - 1, axis=0)
    copies = copies + jitter * generator.normal(size=copies.shape)
    both = np.concatenate([x, copies])
    clean = exact(x)
    with pytest.warns(DuplicateWarning, match=f"of {len(both)} points") as said:
        merged = twonn(both, backend="numpy")
    assert len(said) == 1
    assert merged.n_exact == (0 if jitter else len(copies))
    assert merged.n_near == (len(copies) if jitter else 0)
    assert merged.n_used == 800
    assert abs(merged.dim - clean.dim) < 4 * clean.sd
    with pytest.raises(ValueError, match="write duplicates='merge' to leave them out"):
        twonn(both, duplicates="raise", backend="numpy")
    if jitter:
        with pytest.warns(dimension.PoorFitWarning):
            kept = exact(both, duplicates="keep")
        assert kept.n_near == 0
        assert abs(kept.dim / clean.dim - 1) > 0.05  # control: pairs collapse to 1
    else:
        with pytest.raises(ValueError, match="lie on another point"):
            exact(both, duplicates="keep")


def test_uncertainty():
    """Both standard deviations against the spread over seeds."""
    each = [exact(gaussian(3, 6, 400, seed)) for seed in range(40)]
    spread = np.std([e.dim for e in each], ddof=1)
    assert 0.8 < spread / each[0].sd < 1.6
    half = exact(gaussian(3, 6, 400, 0), sd="subsample", seed=1)
    assert len(half.halves) == 10
    assert half.dim == each[0].dim
    assert 0.5 < half.sd / spread < 2
    again = exact(gaussian(3, 6, 400, 0), sd="subsample", seed=1)
    assert again == half
    assert exact(gaussian(3, 6, 400, 0), sd="subsample", seed=2).sd != half.sd


def test_refusals():
    x = gaussian(2, 4, 30, seed=0)
    with pytest.raises(ValueError, match="`discard` must be above 0 with method='lin"):
        twonn(x, discard=0)
    with pytest.raises(ValueError, match=r"`discard` must be in \[0, 1\), got 1"):
        twonn(x, discard=1)
    with pytest.raises(ValueError, match="`method` must be one of"):
        twonn(x, method="fit")
    with pytest.raises(dimension.DegenerateError, match="1 distinct rows of 5"):
        twonn(np.ones((5, 3)))
    with pytest.raises(ValueError, match="`k` is 30, but there are 30 distinct points"):
        mle(x, k=30)
    with pytest.raises(ValueError, match="`k` must be at least 2, got 1"):
        mle(x, k=1)
    with pytest.raises(ValueError, match="`comb` must be one of"):
        mle(x, k=5, comb="mode")
    with pytest.raises(ValueError, match="`sd` must be one of"):
        twonn(x, sd="bootstrap")
    with pytest.raises(ValueError, match="a lattice"):
        exact(np.stack(np.meshgrid(*[np.arange(6.0)] * 2), -1).reshape(-1, 2))


def test_plateau():
    """A planted course over scales: the two that agree, whatever else there is."""
    seen = {400: 9.0, 200: 6.0, 100: 5.75, 50: 3.0}
    subsets = []

    def planted(x):
        subsets.append(set(x[:, 0].tolist()))
        n = len(x)
        return dimension.IdEstimate(seen[n], 1 / n, n, 0, 0, False, "planted")

    x = np.arange(400.0)[:, None]
    found = dimension.plateau(x, planted, least=50)
    assert found[:3] == (5.875, 1 / 100, 200)
    assert found.method == "planted-plateau"
    assert [len(s) for s in subsets] == list(seen)
    assert all(b < a for a, b in zip(subsets, subsets[1:], strict=False))
    with pytest.raises(ValueError, match="400 points; two scales need 402"):
        dimension.plateau(x, planted, least=201)


def test_points_in_bfloat16_are_warned_of():
    x = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    with pytest.warns(PrecisionWarning, match="float32"):
        twonn(x.astype(jnp.bfloat16))
    twonn(x.astype(np.float16))  # no warning: an error here
