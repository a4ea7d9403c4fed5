"""Whether a cloud follows the law that an estimator fits, and what to do if not."""

import functools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from dimension_toolbox import gaussian, roll, sphere
from scipy import optimize, stats

from jaxpeft import dimension
from jaxpeft.dimension import Points, PoorFitWarning, gride, mle, twonn
from jaxpeft.dimension import _law as law
from jaxpeft.dimension import _neighbours as searching

TABLE = Path(__file__).parents[2] / "benchmarks/results/dimension_fit.json"
mle_10 = functools.partial(mle, k=10)


def doubled(share, seed=0):
    """2,000 points of dimension 5, a tenth with another one so near, and their rest."""
    generator = np.random.default_rng(seed)
    x, way = generator.normal(size=(2000, 5)), generator.normal(size=(200, 5))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    near = np.median(dimension.neighbours(x, 1, backend="numpy")[0])
    return np.concatenate([x, x[:200] + share * near * way])


def mixed(seed=0):
    """A line of 1,000 points and as many of dimension 6."""
    generator = np.random.default_rng(seed)
    x = np.zeros((2000, 8))
    x[:1000, 0] = generator.normal(size=1000)
    x[1000:, 1:7], x[1000:, 7] = generator.normal(size=(1000, 6)), 5
    return x


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_points_that_nearly_stand_twice_are_seen(share):
    """TwoNN gave 0.76, 1.25 and 2.45 without a word; gride 4.9 to 5.0."""
    x = Points(doubled(share), k=25)
    with pytest.warns() as said:
        wrong = twonn(x)
    near = [dimension.DuplicateWarning] * (wrong.n_near > 0)  # the very nearest
    assert [one.category for one in said] == [*near, PoorFitWarning]
    assert "compare dimension.gride" in str(said[-1].message)
    assert wrong.poor and wrong.n_near < 10
    assert wrong.dim < 2.6
    with pytest.warns(PoorFitWarning, match="the law that mle-25-harmonic fits"):
        mle(x)
    right = gride(x)
    assert not right.poor  # and no warning, an error here
    assert abs(right.dim - 5) < 0.15


CLEAN = {
    **{str(d): functools.partial(gaussian, d, d + 2) for d in (1, 2, 5, 10)},
    "sphere": functools.partial(sphere, 5),
    "roll": roll,
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_clouds_are_not_warned_of(name):
    fits = []
    for seed in range(25):
        x = Points(CLEAN[name](n=500, seed=seed), k=25)
        for estimator in (twonn, mle, gride):
            found = estimator(x)  # a warning is an error, of copies as well
            fits.append((found.fit, found.fit_95, found.fit_999))
    fit, usual, most = np.transpose(fits)
    assert 0.3 < np.median(fit / usual) < 1 and np.all(usual < most)


def test_a_mixture_loses_no_genuine_points():
    """39 of them were taken for copies: close pairs are common on a line."""
    with pytest.warns(PoorFitWarning) as said:
        found = twonn(mixed())
    assert len(said) == 1  # not of copies
    assert (found.n_used, found.n_near) == (2000, 0)
    both = np.concatenate([mixed(), mixed()[1500:1600] + 1e-7])
    with pytest.warns() as said:
        found = dimension.cloud(both, 2)
    assert [one.category for one in said] == [dimension.DuplicateWarning]
    assert found.n_near == 100 and np.array_equal(found.rows, np.arange(2000))


def test_the_limits_are_what_clean_clouds_give():
    """Rounded up, by a tenth at most, or to a limit of fewer neighbours."""
    drawn = json.loads(TABLE.read_text())["limits"]
    for kind, table in law.LIMITS.items():
        for at, row in table.items():
            names = [n for n in drawn if re.fullmatch(rf"{kind}\S* {at}(\.0)?", n)]
            if at == 2:  # one ratio, as TwoNN's
                names = ["twonn-ml 0.0"]
            for level, limit in zip(law.LEVELS, row, strict=True):
                found = max(drawn[name][level] for name in names)
                assert found <= limit <= max(1.1 * found + 0.05, 1.7), (kind, at)


def test_laws_against_scipy():
    x, local = np.linspace(0.01, 3, 50), np.linspace(0.5, 9, 50)
    for n1, n2 in ((1, 2), (3, 7), (16, 40)):
        expected = stats.beta(n1, n2 - n1).sf(np.exp(-2.5 * x))
        np.testing.assert_allclose(law.gride_law(x, 2.5, n1, n2), expected, atol=1e-12)
    np.testing.assert_allclose(law.twonn_law(x, 2.5), law.gride_law(x, 2.5, 1, 2))
    for k in (2, 25, 100):
        expected = stats.gamma(k - 1).cdf((k - 1) * 2.5 / local)
        np.testing.assert_allclose(law.mle_law(2.5, local, k), expected, atol=1e-12)
    u = np.random.default_rng(0).uniform(size=300) ** 1.2
    theirs = stats.ks_1samp(u, stats.uniform.cdf).statistic
    assert law.law_distance(u) == pytest.approx(theirs, rel=1e-12)
    assert law.law_distance(u**3, 0.5) < law.law_distance(u**3)


@pytest.mark.parametrize(("n1", "n2"), [(1, 2), (2, 4), (3, 4), (8, 16), (1, 20)])
def test_gride_is_the_maximum_of_its_likelihood(n1, n2):
    """As scipy has it, of the law of mu^-d."""
    x = gaussian(4, 12, 300, seed=2)
    r, _ = dimension.neighbours(x, n2, backend="numpy")
    logs = np.log(r[:, n2 - 1] / r[:, n1 - 1])

    def loss(d):
        log_pdf = stats.beta(n1, n2 - n1).logpdf(np.exp(-d * logs))
        return -np.sum(log_pdf + np.log(d) - d * logs)

    best = optimize.minimize_scalar(loss, bounds=(0.5, 20), options={"xatol": 1e-10})
    found = gride(x, n1=n1, n2=n2, backend="numpy")
    assert found.dim == pytest.approx(best.x, rel=1e-6)
    step = 1e-3 * found.dim
    curve = loss(found.dim + step) + loss(found.dim - step) - 2 * loss(found.dim)
    assert found.sd == pytest.approx(step / curve**0.5, rel=1e-3)
    assert found.method == f"gride-{n1}-{n2}"
    if (n1, n2) == (1, 2):
        ml = twonn(x, method="ml", backend="numpy")
        assert found.dim == pytest.approx(ml.dim * 300 / 299)
        assert found.fit == pytest.approx(ml.fit, abs=0.01)


def test_gride_of_planted_ratios_and_refusals():
    u = np.random.default_rng(0).beta(8, 8, size=20_000)
    dim, sd = dimension.gride_fit(np.ones(20_000), u ** (-1 / 7))
    assert abs(dim - 7) < 4 * sd < 0.2
    half = gride(gaussian(2, 4, 200, 0), sd="subsample", backend="numpy")
    assert len(half.halves) == 10 and half.sd == np.std(half.halves, ddof=1)
    assert gride(gaussian(2, 4, 200, 0), n1=3, backend="numpy").method == "gride-3-6"
    for n1, n2 in ((0, 2), (3, 3)):
        with pytest.raises(ValueError, match=f"got {n1} and {n2}; write n1=8, n2=16"):
            gride(np.ones((9, 2)), n1=n1, n2=n2)
    with pytest.raises(ValueError, match="lattice has no such"):
        dimension.gride_fit(np.ones(3), np.ones(3))


@pytest.mark.parametrize("sd", ["analytic", "subsample"])
def test_one_search_serves_all_estimators_of_a_layer(sd, monkeypatch):
    several = {
        name: functools.partial(f, sd=sd, backend="numpy")
        for name, f in {"twonn": twonn, "mle": mle_10, "gride": gride}.items()
    }
    states = [gaussian(d, 6, 100, d) for d in (1, 2, 3)]
    alone = {name: dimension.id_profile(states, f) for name, f in several.items()}
    sizes, search = [], searching.search

    def counted(x, k, **options):
        sizes.append(len(x))
        return search(x, k, **options)

    for module in (searching, dimension._duplicates):
        monkeypatch.setattr(module, "search", counted)
    together = dimension.id_profile(states, several, k=16)
    assert sizes == [100, *[50] * (10 if sd == "subsample" else 0)] * 3
    sizes.clear()
    dimension.id_profile(states, several)  # of the first layer as many as k rises
    assert sizes.count(100) == 4
    for name, profile in alone.items():
        for one, other in zip(profile, together[name], strict=True):
            assert one.method == other.method
            numbers = [(x.dim, x.sd, x.fit, *x.halves) for x in (one, other)]
            np.testing.assert_allclose(*numbers, rtol=1e-9)


def test_a_profile_warns_once():
    states = [gaussian(2, 8, 2000, 0), mixed(), mixed(1)]
    with pytest.warns(PoorFitWarning, match=r"the points of layers \[1, 2\]") as said:
        profile = dimension.id_profile(states)
    assert len(said) == 1
    assert [one.poor for one in profile] == [False, True, True]
    with pytest.warns(PoorFitWarning) as said:
        found = dimension.plateau(mixed(), least=500)
    assert len(said) == 1 and found.poor
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dimension.plateau(states[0], least=500).poor
