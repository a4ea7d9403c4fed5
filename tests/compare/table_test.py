"""Means, spreads and differences of a comparison, against other code."""

import numpy as np
import pytest
import scipy.stats

from jaxpeft import compare


def result(seed, right, method="lora", metric="accuracy", **more):
    right = np.asarray(right, bool)
    return {
        "row": {"task": "t", "method": method, "point": {}, "seed": seed},
        "metric": metric,
        "trainable": 10,
        "stored": 12,
        "head": 3,
        "steps": 5,
        "cost": {"processor_seconds": 1.0 + seed, "peak_bytes": 100},
        "test": {
            "scores": {metric: float(right.mean())},
            "rows": len(right),
            "right": np.packbits(right).tobytes().hex(),
            "checksum": "",
        },
    } | more


def drawn(share, seed, rows=400):
    return np.random.default_rng(seed).random(rows) < share


def test_the_table_has_means_and_both_spreads():
    mine = [result(seed, drawn(0.8, seed), "kasa") for seed in range(3)]
    ours = [result(seed, drawn(0.7, seed + 9)) for seed in range(3)]
    made = compare.table({("t", "lora"): ours, ("t", "kasa"): mine}, reference="lora")
    best, reference = made["rows"]
    assert (best["method"], reference["method"]) == ("kasa", "lora")
    values = [r["test"]["scores"]["accuracy"] for r in mine]
    assert best["mean"] == pytest.approx(np.mean(values))
    assert best["sd"] == pytest.approx(np.std(values, ddof=1))
    share = scipy.stats.binom(400, best["mean"]).std() / 400
    assert best["binomial_sd"] == pytest.approx(share)
    assert best["processor_seconds"] == 2.0
    assert best["apart"] and "difference" not in reference


def test_a_loss_that_is_small_is_better():
    low, high = (
        result(0, [1, 0, 0, 0], "a", "loss"),
        result(0, [1, 1, 0, 0], "b", "loss"),
    )
    made = compare.table({("t", "b"): [high], ("t", "a"): [low]}, reference="b")
    assert [row["method"] for row in made["rows"]] == ["a", "b"]
    assert made["rows"][0]["sd"] is None


def test_the_interval_of_rows_is_scipys():
    """One seed: what is left is the bootstrap over paired rows."""
    one = drawn(0.75, 1)
    other = one ^ drawn(0.1, 2)  # right on nearly the same rows: pairing matters
    found = compare.difference([result(0, one, "kasa")], [result(0, other)])
    gain = one.astype(float) - other
    theirs = scipy.stats.bootstrap(
        (gain,), np.mean, method="percentile", n_resamples=10_000, random_state=0
    ).confidence_interval
    assert found["difference"] == pytest.approx(gain.mean())
    np.testing.assert_allclose(
        [found["low"], found["high"]], [theirs.low, theirs.high], atol=4e-3
    )


def mixed(seed, one, two, method="lora"):
    """A result on two tasks, whose score is the mean of two shares."""
    row = result(seed, np.concatenate([one, two]), method, "mean")
    row["test"] |= {"rows": {"one": len(one), "two": len(two)}}
    row["mode"] = "max"  # of a mean it is the task that says so
    row["test"]["scores"] = {"mean": (np.mean(one) + np.mean(two)) / 2}
    return row


def test_tasks_of_a_mixture_count_alike_whatever_their_rows():
    small, large = drawn(0.6, 1, 50), drawn(0.9, 2, 800)
    gain = large & drawn(0.97, 3, 800)
    rows = [mixed(0, small, large, "kasa")]
    other = [mixed(0, small, gain)]
    made = compare.table({("t", "lora"): other, ("t", "kasa"): rows}, reference="lora")
    best = made["rows"][0]
    assert best["method"] == "kasa" and best["test_rows"] == 850
    assert best["difference"] == pytest.approx((large.mean() - gain.mean()) / 2)
    # Rows are drawn within a task: of "one", with no difference, none is added.
    spread = (large.astype(float) - gain).std() / np.sqrt(800) / 2
    assert (best["high"] - best["low"]) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    variance = [x.mean() * (1 - x.mean()) / len(x) for x in (small, large)]
    assert best["binomial_sd"] == pytest.approx(np.sqrt(sum(variance)) / 2)


def test_equal_methods_are_not_told_apart_and_seeds_are_paired():
    rows = [result(seed, drawn(0.7, seed)) for seed in (0, 1, 2)]
    found = compare.difference(rows, rows[::-1])
    assert found["difference"] == found["low"] == found["high"] == 0
    assert not found["apart"]
    assert compare.difference(rows[:1], rows[2:]) == {}


def test_how_often_the_interval_misses():
    """Of methods that are equally good, few are told apart."""
    wrong = 0
    for trial in range(60):
        mine, ours = (
            [result(s, drawn(0.8, 1000 * trial + 10 * side + s, 200)) for s in range(5)]
            for side in (0, 1)
        )
        wrong += compare.difference(mine, ours, draws=300)["apart"]
    assert wrong <= 9  # 5% of 60 would be 3


def test_without_bits_seeds_alone_are_drawn():
    def without(seed, score):
        row = result(seed, [1])
        row["test"] |= {"right": None, "scores": {"accuracy": score}}
        return row

    mine = [without(0, 0.5), without(1, 0.7)]
    ours = [without(0, 0.4), without(1, 0.3)]
    found = compare.difference(mine, ours)
    assert found["difference"] == pytest.approx(0.25)
    assert (found["low"], found["high"]) == (pytest.approx(0.1), pytest.approx(0.4))


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "a=2"), ("loss", "a=1")])
def test_the_point_is_the_best_mean_of_the_validation_scores(metric, best):
    rows = [
        compare.Row("t", "m", {"x.a": a}, seed, None) for seed in (0, 1) for a in (1, 2)
    ]
    # Means of 0.35 and 0.5; the best single accuracy is that of the other point.
    found = [
        {"metric": metric, "validation": {metric: score}}
        for score in (0.1, 0.5, 0.6, 0.5)
    ]
    chosen = compare.choose(rows, found)
    assert chosen["point"] == best and len(chosen["validation"]["a=1"]) == 2
