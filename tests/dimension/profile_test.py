"""Profiles over layers, their areas and differences."""

import functools

import numpy as np
import pytest
from dimension_toolbox import gaussian

from jaxpeft import dimension
from jaxpeft.dimension import normalized_auc

exact = functools.partial(dimension.twonn, backend="numpy")


@pytest.mark.parametrize("layers", [2, 5, 33])
def test_area(layers):
    assert normalized_auc([99.0] + [3.5] * layers) == pytest.approx(3.5)
    rising = np.linspace(2, 6, layers).tolist()
    assert normalized_auc([99.0, *rising]) == pytest.approx(4.0)
    assert normalized_auc([2.0, 6.0], include_layer0=True) == 4.0


def test_differences_by_hand():
    a, b, c = [0.0, 1.0, 3.0], [0.0, 2.0, 2.0], [7.0, 5.0, 6.0]
    runs = {"x": {"p": a, "q": b, "r": c}, "y": {"p": c, "q": c, "r": a}, "z": {"p": a}}
    table, used = dimension.difference_map(runs, ["p", "q", "r"])
    assert used == ["x", "y"]
    assert np.array_equal(table, -table.T)
    assert table[0].tolist() == [0.0, 0.0, (2 - 5.5 + 5.5 - 2) / 2]
    runs["y"]["q"] = b
    table, _ = dimension.difference_map(runs, ["p", "q", "r"])
    assert table[0, 1] == (0 + 5.5 - 2) / 2
    assert dimension.id_difference(c, a) == 3.5


def test_a_layer_without_a_dimension():
    states = [np.ones((50, 3)), gaussian(2, 5, 50, 0), gaussian(3, 5, 50, 1)]
    profile = dimension.id_profile(states, exact)
    assert [e.degenerate for e in profile] == [True, False, False]
    assert np.isnan(profile[0].dim)
    assert {e.method for e in profile} == {"twonn-linear"}
    assert normalized_auc(profile) == pytest.approx(
        (profile[1].dim + profile[2].dim) / 2
    )
    with pytest.raises(ValueError, match=r"no dimension at layers \[2\]"):
        normalized_auc([profile[1], profile[1], profile[0]])
    with pytest.raises(ValueError, match="1 layers from layer 1 on"):
        normalized_auc(profile[:2])
    with pytest.raises(ValueError, match="not finite"):
        dimension.id_profile([np.full((5, 2), np.nan)], exact)
    with pytest.raises(ValueError, match="none of 1 with all of the paradigms"):
        dimension.difference_map({"x": {"p": profile}}, ["p", "q"])


def test_errors_that_two_profiles_share_cancel():
    x = [gaussian(3, 8, 300, seed) for seed in range(3)]
    half = functools.partial(exact, sd="subsample")
    p = dimension.id_profile(x, half)
    moved = [y + 0.05 * np.random.default_rng(9).normal(size=y.shape) for y in x]
    q = dimension.id_profile(moved, half)
    apart = dimension.id_profile(x, functools.partial(half, seed=3))
    assert dimension.difference_sd(p, p) == 0
    assert 0 < dimension.difference_sd(p, q) < dimension.difference_sd(apart, q)
    with pytest.raises(ValueError, match="`q` has no halves"):
        dimension.difference_sd(p, dimension.id_profile(x, exact))
