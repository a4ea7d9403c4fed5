"""KaSA's equations on single kernels, against dense formulas and pinned numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user
from adapters_toolbox import cost

from jaxpeft.adapters import kasa
from jaxpeft.tree import Call

SHAPES = [(12, 7), (9, 9), (7, 12)]


def begin(adapter, key, kernel, rank=None, alpha=None):
    return adapter.init(
        key, kernel, rank or adapter.where.rank, alpha or adapter.where.alpha
    )


def randomise(key, trainable, std=0.5):
    """Moves every leaf away from its initial value (b = 0 hides gradients)."""
    return {
        name: std * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, (name, x) in enumerate(sorted(trainable.items()))
    }


def dense(adapter, kernel, frozen, trainable):
    """The merged kernel, spelled out from the factors."""
    f = adapter.factors(kernel, frozen, trainable, Call())
    return kernel + change(f)


def dropped(frozen):
    if "s_d" not in frozen:
        return 0.0
    return (
        np.asarray(frozen["u_d"])
        * np.asarray(frozen["s_d"])
        @ np.asarray(frozen["v_d"])
    )


def count_dropped(shape, rank, truncation):
    adapter = kasa(rank=rank, truncation=truncation)
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen, _ = jax.eval_shape(
        lambda k, w: adapter.init(k, w, rank, adapter.where.alpha), key, kernel
    )
    return frozen["s_d"].shape[0] if "s_d" in frozen else 0


# --- what is dropped


@pytest.mark.parametrize(
    ("shape", "svd"),
    [*((shape, "exact") for shape in SHAPES), ((7, 12), "gram"), ((9, 9), "inverse")],
)
def test_what_was_dropped(shape, svd, keys):
    kernel = jax.random.normal(next(keys), shape)
    frozen, _ = begin(kasa(rank=3, svd=svd), next(keys), kernel)
    kept = np.asarray(kernel, np.float64) - dropped(frozen)
    lost = np.linalg.svd(dropped(frozen), compute_uv=False)
    s_d = frozen["s_d"]
    np.testing.assert_allclose(np.linalg.norm(kernel - kept), np.linalg.norm(s_d), 1e-5)
    np.testing.assert_allclose(lost[0], s_d[0], rtol=1e-5)
    values = np.linalg.svd(kept, compute_uv=False)
    true = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    np.testing.assert_allclose(values[-3:], 0, atol=1e-5)
    np.testing.assert_allclose(values[:-3], true[:-3], rtol=1e-2)
    np.testing.assert_allclose(frozen["base_norm"], np.linalg.norm(kernel), rtol=1e-6)
    np.testing.assert_allclose(frozen["base_top"], true[0], rtol=1e-5)


def test_exactly_the_smallest_components_go(keys):
    with jax.enable_x64(True):
        kernel = jax.random.normal(next(keys), (9, 6), jnp.float64)
        frozen, _ = begin(kasa(rank=2), next(keys), kernel)
        u, s, vt = np.linalg.svd(np.asarray(kernel), full_matrices=False)
        np.testing.assert_allclose(frozen["s_d"], s[-2:], rtol=1e-10)
        np.testing.assert_allclose(
            dropped(frozen), u[:, -2:] * s[-2:] @ vt[-2:], atol=1e-12
        )


OFFICIAL = {  # at rank 8
    (768, 768): 8,
    (3072, 768): 0,
    (768, 3072): 8,
    (4096, 1024): 0,
    (11008, 4096): 0,
    (4096, 14336): 8,
    (4096, 4092): 4,
}


@pytest.mark.parametrize("shape", OFFICIAL, ids=str)
def test_the_official_rule_counts(shape):
    assert count_dropped(shape, 8, "min") == 8
    assert count_dropped(shape, 8, "none") == 0
    if OFFICIAL[shape]:
        assert count_dropped(shape, 8, "official") == OFFICIAL[shape]
        return
    message = rf"truncation='official' drops nothing.*{shape[0]}, {shape[1]}.*'min'"
    with pytest.warns(UserWarning, match=message):
        assert count_dropped(shape, 8, "official") == 0


def test_ranks_up_to_the_smaller_side(keys):
    kernel = jax.random.normal(next(keys), (9, 5))
    frozen, trainable = begin(kasa(rank=4), next(keys), kernel)
    assert frozen["s_d"].shape == (4,)
    assert trainable["a"].shape == (9, 4)
    for rank in (5, 6):
        with pytest.raises(ValueError, match=rf"`rank`.*below 5.*\[9, 5\], got {rank}"):
            begin(kasa(rank=rank), next(keys), kernel)


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_stores_the_kept_kernel_and_comes_back(shape, keys):
    kernel = jax.random.normal(next(keys), shape)
    key = next(keys)
    apart, folded = kasa(rank=3), kasa(rank=3, base="folded")
    frozen, trainable = begin(apart, key, kernel)
    trainable = randomise(next(keys), trainable)
    (term,) = folded.folded(frozen)
    kept = kernel + term.a @ term.b
    np.testing.assert_allclose(
        dense(folded, kept, frozen, trainable),
        dense(apart, kernel, frozen, trainable),
        atol=1e-5,
    )
    assert np.max(np.abs(kept - kernel)) > 0.1
    assert apart.folded is None


def test_report_tells_the_drift(keys):
    kernel = jax.random.normal(next(keys), (24, 10))
    adapter = kasa(rank=3)
    report = adapter.report(*begin(adapter, next(keys), kernel))
    s = np.linalg.svd(np.asarray(kernel), compute_uv=False)
    norm = np.linalg.norm(s[-3:])
    expected = {
        "drift": norm / np.linalg.norm(s),
        "dropped": 3,
        "dropped_norm": norm,
        "largest": s[-3],
        "largest/top": s[-3] / s[0],
    }
    assert report.pop("exact_residual") < 1e-5
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(report[name], value, rtol=1e-4, err_msg=name)


def test_report_where_nothing_was_dropped(keys):
    adapter = kasa(rank=2, truncation="official")
    with pytest.warns(UserWarning, match="drops nothing"):
        leaves = begin(adapter, next(keys), jnp.ones((9, 4)))
    assert all(np.all(value == 0) for value in adapter.report(*leaves).values())
    assert kasa(truncation="none").report is None


def test_drift_sizes_of_gaussian_kernels(keys):
    adapter = kasa(rank=8, svd="gram")

    def report(shape):
        kernel = 0.02 * jax.random.normal(next(keys), shape)
        return adapter.report(*begin(adapter, next(keys), kernel))

    np.testing.assert_allclose(report((768, 768))["drift"], 0.001, rtol=0.15)
    tall = report((3072, 768))  # a real perturbation
    np.testing.assert_allclose(tall["drift"], 0.053, rtol=0.1)
    np.testing.assert_allclose(tall["largest/top"], 0.35, rtol=0.1)


# --- initial values


def test_initial_values(keys):
    kernel = jax.random.normal(next(keys), (256, 64))
    frozen, trainable = begin(kasa(rank=32, alpha=16), next(keys), kernel)
    a, b, sigma = (trainable[name] for name in ("a", "b", "sigma"))
    bound = 1 / 16
    assert 0.98 * bound < np.max(np.abs(a)) <= bound
    np.testing.assert_allclose(np.std(a), bound / np.sqrt(3), rtol=0.03)
    assert np.all(b == 0)
    assert np.min(sigma) < 0 < np.max(sigma)
    assert frozen["scale"] == 0.5
    assert {x.dtype for x in jax.tree.leaves((frozen, trainable))} == {
        jnp.dtype("float32")
    }


def test_sigma_is_standard_normal(keys):
    adapter = kasa(rank=400, truncation="none")
    _, trainable = begin(adapter, next(keys), jnp.zeros((401, 401)))
    sigma = np.asarray(trainable["sigma"])
    np.testing.assert_allclose(np.mean(sigma), 0, atol=0.15)
    np.testing.assert_allclose(np.std(sigma), 1, atol=0.1)  # so E[L2] = r


def test_a_full_core_starts_diagonal(keys):
    _, trainable = begin(kasa(rank=3, core="full"), next(keys), jnp.eye(5))
    core = np.asarray(trainable["core"])
    assert sorted(trainable) == ["a", "b", "core"]
    assert np.all(core[~np.eye(3, dtype=bool)] == 0)
    assert np.all(np.diag(core) != 0)


def test_fixed_sigma_is_no_leaf(keys):
    adapter = kasa(rank=3, sigma="ones")
    kernel = jax.random.normal(next(keys), (6, 5))
    frozen, trainable = begin(adapter, next(keys), kernel)
    assert sorted(trainable) == ["a", "b"]
    trainable = randomise(next(keys), trainable)
    plain = {**trainable, "sigma": jnp.ones(3)}
    np.testing.assert_allclose(
        dense(adapter, kernel, frozen, trainable),
        dense(kasa(rank=3), kernel, frozen, plain),
        rtol=1e-6,
    )
    only_l3 = cost(kasa(rank=3, beta=0))(frozen, plain)
    np.testing.assert_allclose(cost(adapter)(frozen, trainable), only_l3, rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "rank", "alpha", "scale"),
    [("alpha/r", 2, 16, 8.0), ("alpha/r", 3, 8, 2.6667), ("alpha/sqrt_r", 4, 8, 4.0)],
)
def test_scale(scaling, rank, alpha, scale, keys):
    adapter = kasa(rank=rank, alpha=alpha, scaling=scaling)
    frozen, _ = begin(adapter, next(keys), jnp.eye(6))
    np.testing.assert_allclose(frozen["scale"], scale, rtol=1e-4)
    assert kasa(rank=5).where.alpha == 5.0


def test_fresh_factors_are_this_far_from_orthonormal(keys):
    adapter = kasa(rank=8, truncation="none", beta=0, gamma=1)
    official = kasa(
        rank=8, truncation="none", beta=0, gamma=1, orthogonality="official"
    )
    leaves = begin(adapter, next(keys), jnp.zeros((768, 768)))
    root_8, root_768 = np.sqrt(8), np.sqrt(768)  # the terms of b = 0
    np.testing.assert_allclose(cost(adapter)(*leaves) - root_8, 1.888, atol=0.04)
    np.testing.assert_allclose(cost(official)(*leaves) - root_768, 27.633, atol=3e-3)


def test_parameters_per_site():
    def trained(**options):
        adapter = kasa(rank=8, **options)
        shapes = jax.eval_shape(
            lambda k, w: adapter.init(k, w, 8, 8.0)[1],
            jax.eval_shape(lambda: jax.random.key(0)),
            jax.ShapeDtypeStruct((768, 3072), jnp.float32),
        )
        return sum(x.size for x in shapes.values())

    factors = 8 * (768 + 3072)
    assert trained() == factors + 8
    assert trained(core="full") == factors + 64
    assert trained(sigma="ones") == factors


# --- the golden site

GOLDEN_W = np.zeros((4, 3), np.float32)
GOLDEN_W[0, 0], GOLDEN_W[1, 1], GOLDEN_W[2, 2] = 3, 2, 1
GOLDEN = {
    "a": np.array([[1, 0], [0, 0.5], [0, 0], [0, 0]], np.float32),
    "b": np.array([[0, 1, 0], [1, 0, 1]], np.float32),
    "sigma": np.array([2, -1], np.float32),
}
GOLDEN_CORE = np.array([[2, 1], [0, -1]], np.float32)


def golden(**options):
    adapter = kasa(rank=2, alpha=4, **options)
    leaves = {name: jnp.asarray(x) for name, x in GOLDEN.items()}
    if options.get("core") == "full":
        del leaves["sigma"]
        leaves["core"] = jnp.asarray(GOLDEN_CORE)
    frozen, _ = begin(adapter, jax.random.key(0), jnp.asarray(GOLDEN_W))
    return adapter, frozen, leaves


@pytest.mark.parametrize(
    ("truncation", "m", "drift", "y"),
    [
        ("min", 2, 2.236068, [2, 4, -1]),
        ("official", 1, 1.0, [2, 6, -1]),
        ("none", 0, 0.0, [2, 6, 0]),
    ],
)
def test_golden_output(truncation, m, drift, y):
    adapter, frozen, leaves = golden(truncation=truncation)
    out = jnp.ones(4) @ dense(adapter, jnp.asarray(GOLDEN_W), frozen, leaves)
    np.testing.assert_allclose(out, y, atol=1e-5)
    if m:
        report = adapter.report(frozen, leaves)
        assert report["dropped"] == m
        np.testing.assert_allclose(report["dropped_norm"], drift, rtol=1e-6)


def test_golden_output_of_a_full_core():
    adapter, frozen, leaves = golden(core="full")
    out = jnp.ones(4) @ dense(adapter, jnp.asarray(GOLDEN_W), frozen, leaves)
    np.testing.assert_allclose(out, [4, 4, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 1, "gamma": 0}, 5),
        ({"beta": 1, "gamma": 0, "core": "full"}, 6),
        ({"beta": 0, "gamma": 1}, 1.75),
        ({"beta": 0, "gamma": 1, "orthogonality": "official"}, 3.0149946),
        ({"beta": 0.1, "gamma": 0.01}, 0.5175),
        ({"beta": 0.1, "gamma": 0.01, "orthogonality": "official"}, 0.5301499),
        ({"beta": 0, "gamma": 0}, 0),
    ],
)
def test_golden_penalty(options, expected):
    adapter, frozen, leaves = golden(**options)
    np.testing.assert_allclose(cost(adapter)(frozen, leaves), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("orthogonality", "of_a", "of_b"),
    [("paper", -1, 2), ("official", -0.4685213, 1.4142136)],
)
def test_golden_gradients(orthogonality, of_a, of_b):
    adapter, frozen, leaves = golden(beta=0, gamma=1, orthogonality=orthogonality)
    gradients = jax.grad(cost(adapter), argnums=1)(frozen, leaves)
    expected_a = np.zeros((4, 2))
    expected_a[1, 1] = of_a
    expected_b = np.array([[0, 0, 0], [of_b, 0, of_b]])
    np.testing.assert_allclose(gradients["a"], expected_a, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradients["b"], expected_b, rtol=1e-6, atol=1e-7)
    assert np.all(gradients["sigma"] == 0)


# --- penalty


@pytest.mark.parametrize("orthogonality", ["paper", "official"])
@pytest.mark.parametrize("core", ["diag", "full"])
def test_penalty_is_the_literal_formula(core, orthogonality, keys):
    beta, gamma, rank = 0.3, 0.7, 3
    with jax.enable_x64(True):
        adapter = kasa(
            rank=rank, beta=beta, gamma=gamma, core=core, orthogonality=orthogonality
        )
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, trainable = begin(adapter, next(keys), kernel)
        trainable = randomise(next(keys), trainable)

        def literal(trainable):
            a, b = trainable["a"], trainable["b"]
            middle = trainable["core" if core == "full" else "sigma"]
            if orthogonality == "paper":
                e_a = jnp.linalg.norm(a.T @ a - jnp.eye(rank))
                e_b = jnp.linalg.norm(b @ b.T - jnp.eye(rank))
            else:
                e_a = jnp.linalg.norm(a @ a.T - jnp.eye(8))
                e_b = jnp.linalg.norm(b.T @ b - jnp.eye(6))
            return beta * jnp.sum(middle**2) + gamma * (e_a + e_b)

        value, gradient = jax.value_and_grad(cost(adapter), 1)(frozen, trainable)
        expected, slopes = jax.value_and_grad(literal)(trainable)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        for name in trainable:
            np.testing.assert_allclose(gradient[name], slopes[name], rtol=1e-9)
        h = 1e-6  # and by finite differences, in one random direction
        step = randomise(next(keys), trainable)
        ends = [
            cost(adapter)(
                frozen, jax.tree.map(lambda x, d, h=h: x + h * d, trainable, step)
            )
            for h in (h, -h)
        ]
        along = sum(jnp.sum(gradient[n] * step[n]) for n in step)
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * h), along, rtol=1e-7)


def test_penalty_of_orthonormal_factors_is_zero_and_differentiable():
    adapter = kasa(rank=2, beta=0, gamma=1)
    leaves = {"a": jnp.eye(5)[:, :2], "b": jnp.eye(4)[:2], "sigma": jnp.ones(2)}
    value, gradients = jax.value_and_grad(cost(adapter), 1)({}, leaves)
    assert value == 0
    assert all(np.all(g == 0) for g in gradients.values())


@pytest.mark.parametrize("orthogonality", ["paper", "official"])
def test_zero_b_is_a_saddle(orthogonality, keys):
    adapter = kasa(rank=3, gamma=1, orthogonality=orthogonality)
    kernel = jax.random.normal(next(keys), (8, 6))
    leaves = begin(adapter, next(keys), kernel)
    gradients = jax.grad(cost(adapter), 1)(*leaves)
    assert np.all(gradients["b"] == 0)
    assert np.any(gradients["a"] != 0)
    assert np.any(gradients["sigma"] != 0)


def test_penalty_ignores_alpha_and_half_precision(keys):
    kernel = jax.random.normal(next(keys), (8, 6))
    key = next(keys)
    values = []
    for alpha in (2, 32):
        adapter = kasa(rank=2, alpha=alpha)
        leaves = begin(adapter, jax.random.clone(key), kernel)
        values.append(cost(adapter)(*leaves))
    assert values[0] == values[1]
    adapter = kasa(rank=2)
    frozen, trainable = begin(adapter, jax.random.clone(key), kernel)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable)
    assert cost(adapter)(frozen, half).dtype == jnp.float32


def test_zero_weights_skip_the_computation(keys):
    leaves = begin(kasa(rank=2), next(keys), jax.random.normal(next(keys), (8, 6)))

    def primitives(**options):
        traced = jax.make_jaxpr(cost(kasa(rank=2, **options)))(*leaves)
        return {str(e.primitive) for e in traced.jaxpr.eqns}

    assert not primitives(beta=0, gamma=0) & {"dot_general", "reduce_sum", "mul"}
    assert "dot_general" in str(jax.make_jaxpr(cost(kasa(rank=2, beta=0)))(*leaves))
    assert "dot_general" not in str(
        jax.make_jaxpr(cost(kasa(rank=2, gamma=0)))(*leaves)
    )


def test_minimising_the_paper_penalty_makes_factors_orthonormal(keys):
    adapter = kasa(rank=3, beta=0, gamma=1)
    kernel = jax.random.normal(next(keys), (12, 9))
    frozen, trainable = begin(adapter, next(keys), kernel)
    trainable = randomise(next(keys), trainable)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 600))

    @jax.jit
    def run(trainable):
        def step(carry, _):
            trainable, state = carry
            gradients = jax.grad(cost(adapter), 1)(frozen, trainable)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(trainable, updates), state), None

        start = (trainable, optimizer.init(trainable))
        return jax.lax.scan(step, start, None, length=600)[0][0]

    end = {name: np.asarray(x) for name, x in run(trainable).items()}
    np.testing.assert_allclose(end["a"].T @ end["a"], np.eye(3), atol=2e-2)
    np.testing.assert_allclose(end["b"] @ end["b"].T, np.eye(3), atol=2e-2)
    # Then, and only then, |sigma| are the singular values of the update.
    values = np.linalg.svd(end["a"] * end["sigma"] @ end["b"], compute_uv=False)[:3]
    start = {name: np.asarray(x) for name, x in trainable.items()}
    before = np.linalg.svd(start["a"] * start["sigma"] @ start["b"], compute_uv=False)
    sorted_sigma = np.sort(np.abs(end["sigma"]))[::-1]
    np.testing.assert_allclose(values, sorted_sigma, rtol=3e-2)
    assert np.max(np.abs(before[:3] / sorted_sigma - 1)) > 0.2


# --- gradients and symmetries of the update


@pytest.mark.parametrize("core", ["diag", "full"])
def test_gradients_are_the_closed_forms(core, keys):
    with jax.enable_x64(True):
        adapter = kasa(rank=3, alpha=7, core=core)
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, trainable = begin(adapter, next(keys), kernel)
        g = jax.random.normal(next(keys), (8, 6), jnp.float64)

        def gradients(trainable):
            def task(t):
                return jnp.sum(g * dense(adapter, kernel, frozen, t))

            return jax.grad(task)(trainable)

        first = gradients(trainable)
        middle = "core" if core == "full" else "sigma"
        assert np.all(first["a"] == 0)
        assert np.all(first[middle] == 0)
        assert np.any(first["b"] != 0)
        t = randomise(next(keys), trainable)
        a, b, s = t["a"], t["b"], 7 / 3
        matrix = t[middle] if core == "full" else jnp.diag(t[middle])
        of_core = s * a.T @ g @ b.T
        later = gradients(t)
        np.testing.assert_allclose(later["a"], s * g @ (matrix @ b).T, rtol=1e-10)
        np.testing.assert_allclose(later["b"], s * (a @ matrix).T @ g, rtol=1e-10)
        np.testing.assert_allclose(
            later[middle],
            of_core if core == "full" else jnp.diag(of_core),
            rtol=1e-10,
        )


def test_symmetries(keys):
    adapter = kasa(rank=4)
    kernel = jax.random.normal(next(keys), (8, 6))
    frozen, trainable = begin(adapter, next(keys), kernel)
    t = randomise(next(keys), trainable)

    def both(t):
        return dense(adapter, kernel, frozen, t), cost(adapter)(frozen, t)

    sign = jnp.array([1.0, -1.0, 1.0, -1.0])
    flipped = {**t, "sigma": t["sigma"] * sign, "b": t["b"] * sign[:, None]}
    order = jnp.array([2, 0, 3, 1])
    permuted = {
        "a": t["a"][:, order],
        "b": t["b"][order],
        "sigma": t["sigma"][order],
    }
    half = {**t, "b": t["b"] * sign[:, None]}  # control: no symmetry
    for other in (flipped, permuted):
        for mine, theirs in zip(both(t), both(other), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-6)
    assert np.max(np.abs(both(t)[0] - both(half)[0])) > 0.1


# --- arguments


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 up, got 0"),
        ({"rank": 4.0}, r"`rank` must be a whole number.*got 4\.0"),
        ({"alpha": -1}, r"`alpha` must be positive, got -1"),
        ({"beta": -0.1}, r"`beta` must be at least 0, got -0\.1.*beta=0"),
        ({"gamma": float("nan")}, r"`gamma` must be at least 0, got nan"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1\.0"),
        ({"truncation": "max"}, r"`truncation` must be one of min, official, none"),
        ({"core": "dense"}, r"`core` must be one of diag, full, got 'dense'"),
        ({"sigma": "zeros"}, r"`sigma` must be one of trained, ones"),
        ({"orthogonality": "hf"}, r"`orthogonality` must be one of paper, official"),
        ({"reduction": "none"}, r"`reduction` must be one of mean, sum"),
        ({"base": "merged"}, r"`base` must be one of separate, folded"),
        ({"scaling": "1"}, r"`scaling` must be one of alpha/r, alpha/sqrt_r"),
        ({"svd": "random"}, r"`svd` must be one of exact, gram, inverse"),
        ({"sigma": "ones", "core": "full"}, r"`sigma='ones'`.*core='diag'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        kasa(**options)
