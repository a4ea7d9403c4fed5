"""The graph's solver against cvxpy and scikit-learn, its pieces against brute force."""

import numpy as np
import pytest

from benchmarks.graph_recovery import chain_graph, correlation
from jaxpeft.numerics import _graph, group_graph, shrink_norm

CHAIN = 0.6 ** np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
FIRST = [0, 1, 2]


def random_matrix(n, steps, seed, shrink=0.2):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.2) + np.eye(n)
    found = np.corrcoef((rng.normal(size=(steps, n)) @ mixed).T)
    return (1 - shrink) * found + shrink * np.eye(n)


# --- the scalar problem


@pytest.mark.parametrize("power", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weight", [0.05, 0.7])
def test_norms_shrink_to_the_minimum(weight, power):
    h = (2 * weight * (1 - power)) ** (1 / (2 - power)) if power < 1 else 0.0
    edge = h + weight * power * h ** (power - 1) if power < 1 else weight
    above = edge * np.array([1 + 1e-3, 1.01, 1.2, 3.0, 20.0])
    below = edge * np.array([0.0, 0.5, 0.99, 1 - 1e-9])
    value = lambda d, x: 0.5 * (d - x) ** 2 + weight * d**power
    got = shrink_norm(above, weight, power)
    for x, d in zip(above, got, strict=True):
        grid = np.linspace(0, x, 20001)
        best = grid[np.argmin(value(grid, x))]
        around = np.clip(best + np.linspace(-1, 1, 20001) * x / 20000, 0, None)
        best = around[np.argmin(value(around, x))]
        assert value(d, x) <= value(best, x) + 1e-9
        assert abs(d - best) <= 1e-4
    assert np.all(shrink_norm(below, weight, power) == 0)
    assert np.all(np.diff(got) > 0) and np.all(got <= above)
    if power == 1:
        np.testing.assert_array_equal(got, above - weight)


# --- the whole problem


@pytest.mark.parametrize("power", [0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("lambda0", "tau"), [(0.3, 0.05), (5.0, 2.0)])
def test_the_objective_never_rises(power, lambda0, tau):
    matrix = random_matrix(14, 9, seed=1, shrink=0.3)  # fewer steps than nodes
    options = {"lambda0": lambda0, "tau": tau, "power": power, "tolerance": 1e-10}
    found = group_graph(matrix, [0, 5, 6], **options)
    assert found.converged and found.change <= 1e-10
    assert np.max(np.diff(found.objective)) <= 1e-10
    assert np.array_equal(found.omega, found.omega.T)
    assert np.linalg.eigvalsh(found.omega)[0] > 0
    # What is reported is the objective of what is returned.
    block = np.ix_([0, 5, 6], [i for i in range(14) if i not in (0, 5, 6)])
    norms = np.linalg.norm(found.delta[block], axis=0)
    expected = -np.linalg.slogdet(found.omega)[1] + np.sum(matrix * found.omega)
    expected += lambda0 * np.sum((found.omega - found.delta) ** 2)
    expected += tau * np.sum(norms**power)
    np.testing.assert_allclose(found.objective[-1], expected, atol=1e-7)


@pytest.mark.parametrize(("lambda0", "tau"), [(1.0, 0.2), (5.0, 0.5)])
def test_at_power_one_it_is_cvxpys_minimum(lambda0, tau):
    import cvxpy

    others = list(range(3, 12))
    omega = cvxpy.Variable((12, 12), symmetric=True)
    delta = cvxpy.Variable((12, 12))
    columns = sum(cvxpy.norm(delta[:3, j], 2) for j in others)
    fit = -cvxpy.log_det(omega) + cvxpy.trace(CHAIN @ omega)
    apart = lambda0 * cvxpy.sum_squares(omega - delta)
    problem = cvxpy.Problem(cvxpy.Minimize(fit + apart + tau * columns))
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10)
    options = {"lambda0": lambda0, "power": 1, "tolerance": 1e-12}
    found = group_graph(CHAIN, FIRST, tau=tau, **options)
    assert abs(found.objective[-1] - problem.value) <= 1e-8
    np.testing.assert_allclose(found.omega, omega.value, atol=1e-4)
    other = group_graph(CHAIN, FIRST, tau=2 * tau, **options)
    assert np.max(np.abs(other.omega - omega.value)) > 1e-3


@pytest.mark.parametrize("lambda0", [0.1, 1.0, 10.0])
def test_without_a_penalty_it_is_the_inverse(lambda0):
    options = {"lambda0": lambda0, "tolerance": 1e-12}
    found = group_graph(CHAIN, FIRST, tau=0, **options)
    np.testing.assert_allclose(found.omega, np.linalg.inv(CHAIN), atol=1e-9)
    nearly = group_graph(CHAIN, FIRST, tau=1e-9, power=1, **options)
    np.testing.assert_allclose(nearly.omega, found.omega, atol=1e-6)


def test_below_one_the_lower_of_two_ends_is_taken():
    """Where the problem is not convex, the start decides which minimum is found."""
    options = dict(power=0.3, tau=0.3)
    ends = [
        group_graph(CHAIN, FIRST, start=start, **options)
        for start in (np.eye(len(CHAIN)), np.linalg.inv(CHAIN))
    ]
    values = [end.objective[-1] for end in ends]
    assert abs(values[0] - values[1]) > 0.01  # they differ, or this shows nothing
    best = group_graph(CHAIN, FIRST, **options)
    np.testing.assert_array_equal(best.omega, ends[np.argmin(values)].omega)
    assert best.objective[-1] == min(values)
    # For p = 1 there is one minimum.
    one, other = (
        group_graph(CHAIN, FIRST, power=1, tolerance=1e-10, start=start)
        for start in (None, np.linalg.inv(CHAIN))
    )
    np.testing.assert_allclose(one.omega, other.omega, atol=1e-6)


def test_single_entries_tend_to_the_graphical_lasso():
    """Every entry a group of its own, and Delta held ever closer to Omega."""
    from sklearn.covariance import graphical_lasso

    alpha, matrix = 0.1, random_matrix(8, 100, seed=3)
    _, expected = graphical_lasso(matrix, alpha, tol=1e-7, enet_tol=1e-10)
    assert np.any(expected == 0)
    far = []
    for lambda0 in (10.0, 100.0):

        def copy(omega, lambda0=lambda0):
            off = ~np.eye(8, dtype=bool)
            short = np.sign(omega) * shrink_norm(np.abs(omega), alpha / 2 / lambda0, 1)
            delta = np.where(off, short, omega)
            return delta, alpha * float(np.sum(np.abs(delta[off])))

        start = np.linalg.inv(matrix)
        omega, *_ = _graph._descend(matrix, copy, lambda0, 1e-12, 30_000, start)
        far.append(np.max(np.abs(omega - expected)))
    assert far[1] <= 2e-3 and far[1] < far[0] / 2, far
    assert np.max(np.abs(np.linalg.inv(matrix) - expected)) > 0.1


def test_momentum_changes_the_way_and_not_the_end():
    def ends(momentum):
        inside = np.isin(np.arange(12), FIRST)
        block = np.ix_(np.flatnonzero(inside), np.flatnonzero(~inside))

        def copy(omega):
            delta = omega.copy()
            norms = np.linalg.norm(delta[block], axis=0)
            short = shrink_norm(norms, 0.1, 1)
            delta[block] *= short / np.where(norms > 0, norms, 1.0)
            return delta, 0.2 * float(np.sum(short))

        return _graph._descend(CHAIN, copy, 1.0, 1e-11, 5000, momentum=momentum)

    plain, quick = ends(False), ends(True)
    np.testing.assert_allclose(quick[0], plain[0], atol=1e-8)
    assert len(quick[2]) < len(plain[2]) / 2


def test_delta_is_omega_where_it_is_free():
    found = group_graph(random_matrix(12, 200, seed=5), FIRST, tau=0.1, tolerance=1e-12)
    inside = np.isin(np.arange(12), FIRST)
    block = np.outer(inside, ~inside)
    np.testing.assert_array_equal(found.delta[~block], found.omega[~block])
    columns = found.delta[:3, 3:], found.omega[:3, 3:]
    kept = np.any(columns[0] != 0, axis=0)
    assert kept.any() and found.zero_columns == np.sum(~kept)
    ratio = columns[0][:, kept] / columns[1][:, kept]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape))
    assert np.all((ratio > 0) & (ratio < 1))
    all_zero = group_graph(CHAIN, FIRST, tau=50.0)
    assert all_zero.zero_columns == 9 and np.all(all_zero.delta[:3, 3:] == 0)


def test_permuted_nodes_permute_the_answer():
    matrix, order = (
        random_matrix(12, 60, seed=7),
        np.random.default_rng(0).permutation(12),
    )
    one = group_graph(matrix, FIRST, tolerance=1e-12)
    where = [int(np.flatnonzero(order == i)[0]) for i in FIRST]
    other = group_graph(matrix[np.ix_(order, order)], where, tolerance=1e-12)
    np.testing.assert_allclose(other.omega, one.omega[np.ix_(order, order)], atol=1e-9)
    np.testing.assert_allclose(other.delta, one.delta[np.ix_(order, order)], atol=1e-9)


def test_indirect_nodes_are_told_from_direct_ones():
    """The one thing that a graph can do and a covariance cannot."""
    omega, direct = chain_graph()
    matrix, important = correlation(omega), list(range(8))
    chains = list(range(17, 26))
    found = group_graph(matrix, important, tau=0.05, power=0.9)
    strength = np.linalg.norm(found.omega[important], axis=0)
    assert strength[direct].min() > strength[17:].max()
    columns = np.linalg.norm(found.delta[important], axis=0)
    assert np.flatnonzero(columns[8:]).tolist() == [i - 8 for i in direct]
    by_covariance = np.linalg.norm(matrix[important], axis=0)
    assert by_covariance[chains].max() > by_covariance[direct].min()


def test_a_descent_that_stops_early_says_so():
    with pytest.warns(UserWarning, match="not converged in 3 iterations"):
        found = group_graph(CHAIN, FIRST, max_iterations=3)
    assert not found.converged and len(found.objective) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": np.ones((4, 4))}, "not positive definite"),
        ({"matrix": np.ones((4, 3))}, "must be square"),
        ({"matrix": np.full((4, 4), np.nan)}, "not finite"),
        ({"matrix": np.triu(np.ones((4, 4)))}, "must be symmetric"),
        ({"important": []}, "`important` must be different indices from 0 to 11"),
        ({"important": [0, 0]}, "`important` must be different"),
        ({"important": [12]}, "`important` must be different"),
        ({"lambda0": 0}, "`lambda0` must be positive"),
        ({"tau": -1}, "`tau` must be at least 0"),
        ({"power": 0}, "`power` must be above 0"),
        ({"power": 1.5}, "`power` must be above 0"),
        ({"tolerance": 0}, "`tolerance` must be positive"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(change, message):
    given = {"matrix": CHAIN, "important": FIRST} | change
    with pytest.raises(ValueError, match=message):
        group_graph(**given)
