"""Scores of nodes: to a matrix, to a ranking, to a choice."""

import inspect

import numpy as np
import pytest
import scipy.stats

from benchmarks import graph_recovery
from jaxpeft.numerics import (
    important_nodes,
    node_scores,
    rank_correlation,
    rank_nodes,
    select_nodes,
)


def draw(steps=60, n=9, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(steps, 1))  # a gradient's scale
    return np.exp(common + rng.normal(size=(steps, n)) @ rng.normal(size=(n, n)))


# --- the matrix


def test_the_matrix_is_a_shrunk_correlation_of_centred_logarithms():
    scores = draw()
    x = np.log(scores)
    x = x - x.mean(1, keepdims=True)
    found = node_scores(scores, row="center")
    expected = 0.8 * np.corrcoef(x.T) + 0.2 * np.eye(9)
    np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
    np.testing.assert_allclose(found.mean, np.log(scores).mean(0))
    unit = np.log(scores) / np.linalg.norm(np.log(scores), axis=1, keepdims=True)
    theirs = node_scores(scores, row="unit", standardise=False, shrink=0, thin=2)
    np.testing.assert_allclose(theirs.matrix, np.cov(unit[::2].T), atol=1e-15)
    raw = node_scores(scores, shrink=0).matrix
    np.testing.assert_allclose(raw, np.corrcoef(np.log(scores).T), atol=1e-12)


def test_a_steps_scale_and_a_nodes_scale_do_not_matter():
    scores = draw()
    scaled = scores * np.linspace(1, 9, 60)[:, None] * np.linspace(1, 7, 9)[None, :]
    one, other = (node_scores(x, row="center") for x in (scores, scaled))
    np.testing.assert_allclose(other.matrix, one.matrix, atol=1e-12)
    assert np.max(np.abs(other.mean - one.mean)) > 1


def test_a_graph_is_as_good_with_a_steps_scale_and_better_uncentred():
    """Why rows are not centred unless it is asked for: planted chains, four seeds."""
    omega, planted = graph_recovery.chain_graph()
    important, found = list(graph_recovery.IMPORTANT), {}
    for row in ("none", "center"):
        for seed in range(4):
            scores = graph_recovery.sample(omega, 500, seed, common=1.0)
            matrix = node_scores(scores, row=row)
            values = rank_nodes(matrix, important, power=1.0).values
            chosen = select_nodes(values, important, count=8 + len(planted))
            found.setdefault(row, []).append(len(set(planted) & set(chosen.tolist())))
    assert np.mean(found["none"]) > np.mean(found["center"]) + 1


def test_dead_and_constant_nodes_are_apart():
    scores = draw()
    scores[:, 2], scores[:, 5], scores[7, 0] = 0.0, 0.3, 0.0
    found = node_scores(scores)
    assert np.flatnonzero(found.silent).tolist() == [2, 5]
    assert np.all(np.isfinite(found.matrix))
    for node in (2, 5):
        np.testing.assert_array_equal(found.matrix[node], np.eye(9)[node])
    assert found.mean[2] == -np.inf and np.isclose(found.mean[5], np.log(0.3))
    assert 2 not in important_nodes(found.mean, 8)
    # They take no part in what is common to a step.
    alive = [0, 1, 3, 4, 6, 7, 8]
    alone = node_scores(scores[:, alive]).matrix
    np.testing.assert_allclose(found.matrix[np.ix_(alive, alive)], alone, atol=1e-12)
    for by in ("ggm", "cov", "ridge", "pinv", "score", "random"):
        values = rank_nodes(found, [0, 1], by=by).values
        assert np.flatnonzero(values == -np.inf).tolist() == [2, 5]
        assert not {2, 5} & set(select_nodes(values, [0, 1], count=7).tolist())
    with pytest.raises(ValueError, match="to the 7 that can be chosen, got 8"):
        select_nodes(values, [0, 1], count=8)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (draw(steps=9), {"shrink": 0}, "collect more than 9 steps, or write shrink"),
        (draw(steps=1), {}, "at least 2 steps, got 1"),
        (draw(), {"thin": 60}, "at least 2 steps, got 1"),
        (draw(), {"thin": 0}, "`thin` must be at least 1"),
        (draw(), {"shrink": 1.1}, "`shrink` must be from 0 to 1"),
        (-draw(), {}, "finite and at least 0"),
        (draw() * np.nan, {}, "finite and at least 0"),
        (np.ones((60, 9)), {}, "no node's scores vary"),
        (np.zeros((60, 9)), {}, "no node's scores vary"),
        (np.ones(60), {}, r"\[steps, n\], got shape \(60,\)"),
    ],
)
def test_scores_that_say_nothing(scores, options, message):
    with pytest.raises(ValueError, match=message):
        node_scores(scores, **options)


# --- the ranking


def test_selectors_are_what_they_say():
    found, important = node_scores(draw()), [1, 4]
    norms = lambda matrix: np.linalg.norm(matrix[important], axis=0)
    rho = found.correlation
    expected = {
        "score": found.mean,
        "cov": norms(rho),
        "ridge": norms(np.linalg.inv(0.5 * rho + 0.5 * np.eye(9))),
        "pinv": norms(np.linalg.pinv(found.covariance, rcond=1e-6)),
    }
    for by, values in expected.items():
        got = rank_nodes(found, important, by=by, rcond=1e-6)
        np.testing.assert_allclose(got.values, values, rtol=1e-6)
        assert got.graph is None
    by_omega = rank_nodes(found, important, tau=0.2)
    by_delta = rank_nodes(found, important, tau=0.2, rank_by="delta")
    np.testing.assert_array_equal(by_omega.values, norms(by_omega.graph.omega))
    np.testing.assert_array_equal(by_delta.values, norms(by_delta.graph.delta))
    assert by_delta.graph.zero_columns == np.sum(by_delta.values == 0) > 0
    one, other = (rank_nodes(found, important, by="random", seed=s) for s in (0, 1))
    assert not np.array_equal(one.values, other.values)


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    for one in (rng.normal(size=30), rng.integers(0, 5, 30)):
        other = rng.integers(0, 9, 30)
        expected = scipy.stats.spearmanr(one, other).statistic
        np.testing.assert_allclose(rank_correlation(one, other), expected)
    assert rank_correlation(np.ones(5), np.arange(5)) == 0


# --- the choice


def test_important_nodes_come_first_and_ties_in_order():
    values = [0.0, 2.0, 1.0, 2.0, 2.0, 9.0]
    assert important_nodes([1.0, 3.0, 3.0, 3.0], 2).tolist() == [1, 2]
    assert select_nodes(values, [2, 0], count=2).tolist() == [0, 2]
    assert select_nodes(values, [2, 0], count=4).tolist() == [0, 1, 2, 5]
    sizes = [10, 4, 10, 4, 4, 8]
    # 20 for the important, then 8, 4, 4: the next does not fit.
    chosen = select_nodes(values, [0, 2], budget=39, sizes=sizes)
    assert chosen.tolist() == [0, 1, 2, 3, 5]
    for count in (1, 7):
        with pytest.raises(ValueError, match=f"to the 6 that can be .* got {count}"):
            select_nodes(values, [0, 2], count=count)
    with pytest.raises(ValueError, match="below the 20 parameters of the 2"):
        select_nodes(values, [0, 2], budget=19, sizes=sizes)
    with pytest.raises(ValueError, match="one of `count` and `budget`"):
        select_nodes(values, [0, 2])
    with pytest.raises(ValueError, match="from 1 to the 1 nodes that have a score"):
        important_nodes([-np.inf, 2.0], 2)


def test_choices_that_are_not():
    # Under test the annotations object first, as they should.
    plain = lambda f: inspect.unwrap(f)
    with pytest.raises(ValueError, match="`row` must be one of center, unit, none"):
        plain(node_scores)(draw(), row="middle")
    for wrong in ({"by": "graph"}, {"rank_by": "omicron"}):
        with pytest.raises(ValueError, match="must be one of .*ggm|omega, delta"):
            plain(rank_nodes)(node_scores(draw()), [0], **wrong)


def test_the_planted_experiment_runs():
    found = graph_recovery.recall("chain", 500, 0)
    assert set(found) == set(graph_recovery.SELECTORS)
    assert found["ggm"] > found["random"]
    rows = [
        {"graph": "hub", "steps": 50, "selector": "cov", "mean": 0.5, "sd": 0.1},
        {"graph": "hub", "steps": 50, "selector": "ggm", "mean": 1.0, "sd": 0.0},
    ]
    assert graph_recovery.show(rows).splitlines()[1:] == [
        "cov                         0.50 ±0.10",
        "ggm                         1.00 ±0.00",
    ]
