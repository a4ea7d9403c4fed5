"""GeLoRA's rule on exact dimensions, and end to end on planted ones."""

import functools

import numpy as np
import pytest

from jaxpeft import allocate, dimension
from jaxpeft.allocate import KernelShape, gelora
from jaxpeft.allocate._gelora import ROUNDINGS
from jaxpeft.dimension import IdEstimate


def shapes(layers, d_in=64, d_out=64, stacked=False):
    if stacked:
        return {f"layers/{n}/kernel": KernelShape(layers, d_in, d_out) for n in "qkvo"}
    return {
        f"layer_{i}/{n}/kernel": KernelShape(None, d_in, d_out)
        for i in range(layers)
        for n in "qkvo"
    }


def ranks(dims, **options):
    """One rank a block."""
    allocation = gelora(shapes(len(dims) - 1), dims, **options)
    names, _, rows = allocation.grid()
    assert all(len(set(row)) == 1 for row in rows)
    assert names == [str(i) for i in range(len(dims) - 1)]
    return [row[0] for row in rows]


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ([2.0, 5.0, 5.0, 3.0, 8.0], ([4, 1, 1, 6],) * 3),
        ([3.0] * 4, ([1, 1, 1],) * 3),
        ([5.0, 4.2, 1.0], ([1, 1],) * 3),
        ([2.0, 4.5], ([4], [4], [3])),
        ([5.0, 5.02], ([1], [2], [1])),
    ],
    ids=["planted", "constant", "falling", "half", "noise"],
)
def test_the_rule(dims, expected):
    got = [ranks(dims, rounding=r) for r in ("round", "ceil", "floor")]
    assert got == list(expected)


def test_caps_and_scale():
    dims = [1.0, 9.0]
    assert ranks(dims, r_max=4) == [4]
    assert ranks(dims, offset=0, r_min=3) == [8]
    assert ranks([3.0, 3.0], r_min=3) == [3]
    narrow = {"layer_0/q/kernel": KernelShape(None, 64, 64)}
    narrow["layer_0/v/kernel"] = KernelShape(None, 64, 5)
    allocation = gelora(narrow, dims, alpha_over_r=2)
    assert allocation.ranks() == {"layer_0/q/kernel": 9, "layer_0/v/kernel": 5}
    assert [site.alpha / site.rank for site in allocation.values()] == [2, 2]


@pytest.mark.parametrize("stacked", [False, True])
def test_counts(stacked):
    """Four 768-wide kernels a block: 6,144 parameters a rank."""
    sites = shapes(4, 768, 768, stacked)
    allocation = gelora(sites, [2.0, 5.0, 5.0, 3.0, 8.0])
    assert allocation.count(sites) == 6144 * (4 + 1 + 1 + 6)
    if stacked:
        assert allocation["layers/q/kernel"].rank == (4, 1, 1, 6)
    small = gelora(sites, [2.0, 5.0, 5.0, 3.0, 8.0], budget=6144 * 9)
    assert small.count(sites) == 6144 * (3 + 1 + 1 + 3)
    same = allocate.uniform(sites, budget=allocation.count(sites))
    assert same.count(sites) == 6144 * 4 * 3
    with pytest.raises(ValueError, match="`budget` 100 is below the 24576 parameters"):
        gelora(sites, [2.0, 5.0, 5.0, 3.0, 8.0], budget=100)


def estimate(dim, sd=0.3, halves=(), degenerate=False):
    return IdEstimate(dim, sd, 500, 0, 0, degenerate, "twonn-linear", halves)


def test_noise():
    apart = [estimate(5.0), estimate(5.6)]
    assert ranks(apart, noise=0) == [2]
    assert ranks(apart) == ranks(apart, noise=2) == [1]  # 0.6 of 2 * 0.42
    assert ranks(apart, noise=1) == [2]
    assert ranks([estimate(5.0), 5.6]) == [2]  # of one the spread is not known
    # Errors that both share do not hide a rise.
    shared = [estimate(5.0, 0.3, (4.7, 5.3)), estimate(5.6, 0.3, (5.31, 5.89))]
    assert ranks(shared, noise=2) == [2]
    facts = gelora(shapes(1), apart, noise=2).facts["layers"]
    assert facts[0]["remark"] == "below noise"
    assert facts[0]["sd of it"] == pytest.approx(0.3 * 2**0.5)
    said = str(gelora(shapes(1), apart))
    assert "below noise: a rise within its noise, which raises no rank" in said
    facts = gelora(shapes(1), apart, noise=0).facts
    assert facts["layers"][0]["remark"] == "within two sds"
    assert list(facts["legend"]) == ["within two sds"]


def test_a_poor_fit_is_said():
    good = estimate(5.0)._replace(fit=0.1, fit_999=0.1)
    poor = estimate(9.0)._replace(fit=0.2, fit_999=0.1)
    found = gelora(shapes(2), [good, good, poor])
    assert [row["remark"] for row in found.facts["layers"]] == ["", "poor fit"]
    assert "poor fit: distances do not follow the law" in str(found)
    assert "poor fit" not in str(gelora(shapes(1), [good, good]))  # control
    assert ranks([good, good, poor]) == [1, 5]


def planted(seed, n=2000):
    """States of 2, 5, 5, 3 and 8 dimensions in 64 features."""
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(n, 8))
    return [
        np.tanh(z[:, :d] @ generator.normal(0, d**-0.5, (d, 64)))
        for d in (2, 5, 5, 3, 8)
    ]


def mlp(seed, n=2000):
    """States of a residual MLP: a smooth map raises no dimension."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 3)) @ generator.normal(size=(3, 64))
    states = [x]
    for _ in range(5):
        w, back = generator.normal(0, 1 / 8, (2, 64, 64))
        x = x + np.tanh(x @ w) @ back
        states.append(x)
    return states


def test_planted_profiles_give_planted_ranks():
    for seed in range(2):
        profile = dimension.id_profile(planted(seed))
        found = np.array(ranks(profile))
        assert np.max(np.abs(found - [4, 1, 1, 6])) <= 1
        assert ranks(profile, rounding="ceil")[0] >= found[0]
        assert ranks(dimension.id_profile(mlp(seed))) == [1] * 5


def test_what_noise_alone_gives():
    """A constant dimension, drawn from the estimator's law: the mean rank."""
    expected = {
        (5, 500): (1.50, 1.06, 1.00),
        (10, 500): (1.56, 1.22, 1.06),
        (20, 500): (1.78, 1.49, 1.28),
        (20, 5000): (1.51, 1.11, 1.01),
        (10, 20000): (1.50, 1.00, 1.00),
    }
    generator = np.random.default_rng(0)
    for (d, n), row in expected.items():
        dims = n / generator.gamma(n, 1 / d, size=20_001)
        rise = np.maximum(np.diff(dims), 0)
        for rule, mean in zip(("ceil", "round", "floor"), row, strict=True):
            got = np.mean([ROUNDINGS[rule](x) for x in rise]) + 1
            assert got == pytest.approx(mean, abs=0.02), (d, n, rule)


def test_a_state_that_is_one_point():
    profile = [estimate(float("nan"), float("nan"), degenerate=True), estimate(6.0)]
    with pytest.raises(ValueError, match="no dimension at state 0.*degenerate='zero'"):
        gelora(shapes(1), profile)
    assert ranks(profile, degenerate="zero") == [7]


def test_blocks():
    sites = {"enc/q/kernel": KernelShape(None, 64, 64)}
    sites["dec/q/kernel"] = KernelShape(2, 64, 64)
    blocks = [(0, 1, "enc/.*"), (2, 3, "dec/.*"), (3, 4, "dec/.*")]
    blocks = [allocate.Block(*b) for b in blocks]
    allocation = gelora(sites, [1.0, 3.0, 2.0, 2.0, 7.0], blocks=blocks)
    assert allocation.ranks() == {"enc/q/kernel": 3, "dec/q/kernel": (1, 6)}
    with pytest.raises(ValueError, match="'dec/q/kernel' has 2 layers and lies in 1"):
        gelora(sites, [1.0, 3.0, 2.0, 2.0, 7.0], blocks=blocks[:2])
    with pytest.raises(ValueError, match="entry 2 goes from state 3 to 4"):
        gelora(sites, [1.0, 3.0, 2.0, 2.0], blocks=blocks)


def test_refusals():
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=f"has dimension {bad} at state 1"):
            gelora(shapes(1), [1.0, bad])
    with pytest.raises(ValueError, match="names layer 1, and `profile` has 1 blocks"):
        gelora(shapes(2), [1.0, 2.0])
    with pytest.raises(ValueError, match="has 2 layers, `profile` 2 states"):
        gelora(shapes(2, stacked=True), [1.0, 2.0])
    with pytest.raises(ValueError, match="names no layer"):
        gelora({"q/kernel": KernelShape(None, 4, 4)}, [1.0, 2.0])
    with pytest.raises(ValueError, match="`rounding` must be one of"):
        gelora(shapes(1), [1.0, 2.0], rounding="even")
    with pytest.raises(ValueError, match="`r_min` must be at least 1"):
        gelora(shapes(1), [1.0, 2.0], r_min=0)
    with pytest.raises(ValueError, match="`rank` .* and `budget` .* say the same"):
        allocate.uniform(shapes(1), rank=1, budget=10)
    with pytest.raises(ValueError, match="`budget` 10 is below the 512 parameters"):
        allocate.uniform(shapes(1), budget=10)


def test_few_texts():
    few = [estimate(5.0), estimate(6.0)._replace(n_used=499)]
    with pytest.warns(allocate.FewTextsWarning, match="from 499 distinct points"):
        assert ranks(few) == [2]


@pytest.mark.filterwarnings("ignore:`profile` has dimensions estimated")
def test_the_same_again():
    estimator = functools.partial(dimension.twonn, sd="subsample", backend="numpy")
    states = planted(3, n=200)[:2]
    once, again = (
        gelora(shapes(1), dimension.id_profile(states, estimator)) for _ in range(2)
    )
    assert once == again
    assert once.facts == again.facts


def test_noise_of_bare_numbers_is_refused():
    """It was taken as 0: nothing is known of their spread."""
    message = r"`noise` 2 .*none at states \[0, 1\].*id_profile, or noise=0"
    with pytest.raises(ValueError, match=message):
        gelora(shapes(1), [5.0, 5.6], noise=2)
    mixed = [estimate(5.0, 0.3), 5.6]
    with pytest.raises(ValueError, match=r"none at states \[1\]"):
        gelora(shapes(1), mixed, noise=2)
    assert ranks([5.0, 5.6]) == [2]
    # One point for all texts has a spread, which is 0.
    profile = [estimate(float("nan"), float("nan"), degenerate=True), estimate(6.0)]
    assert ranks(profile, noise=2, degenerate="zero") == [7]
