"""Methods that start as a part of the kernel: what is taken, and what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp
from jaxpeft import interop
from jaxpeft.adapters import lora, milora, olora, pissa
from jaxpeft.tree import Call

METHODS = [pissa, milora, olora]
SHAPES = [(8, 12), (9, 9), (12, 6)]
CASES = list(zip(SHAPES, (1, 3, 4), (1.0, 7.0, 0.5), strict=True))
names = lambda x: getattr(x, "__name__", None)
every_method = pytest.mark.parametrize("method", METHODS, ids=names)


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


@pytest.fixture
def params(keys):
    return {
        "up": {"kernel": jax.random.normal(next(keys), (6, 9))},
        "down": {"kernel": jax.random.normal(next(keys), (9, 7))},
    }


def attach(params, adapter, **options):
    return jp.attach(params, adapter, ["up", "down"], key=jax.random.key(7), **options)


def moved(adapted, keys, std=0.1):
    trainable, frozen = jp.partition(adapted)
    noise = lambda x: x + std * jax.random.normal(next(keys), x.shape, x.dtype)
    return jp.combine(jax.tree.map(noise, trainable), frozen)


def far(one, other):
    return np.max(np.abs(np.asarray(one) - np.asarray(other))) > 1e-2


def part(adapter, kernel, rank, alpha):
    """``s a0 b0`` of one kernel, in float64."""
    frozen, trainable = adapter.init(jax.random.key(0), kernel, rank, alpha)
    assert np.array_equal(trainable["a"], frozen["a0"])
    assert np.array_equal(trainable["b"], frozen["b0"])
    s, a0, b0 = (np.asarray(frozen[n], np.float64) for n in ("scale", "a0", "b0"))
    return s * a0 @ b0


# --- the start


@pytest.mark.parametrize(("shape", "rank", "alpha"), CASES)
def test_pissa_takes_the_best_approximation(shape, rank, alpha, keys):
    kernel = jax.random.normal(next(keys), shape)
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ vt[:rank]
    np.testing.assert_allclose(part(pissa(), kernel, rank, alpha), best, atol=1e-5)


@pytest.mark.parametrize(("shape", "rank", "alpha"), CASES)
def test_milora_takes_the_smallest_components(shape, rank, alpha, keys):
    kernel = jax.random.normal(next(keys), shape)
    s = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    taken = part(milora(), kernel, rank, alpha)
    left = np.linalg.svd(kernel - taken, compute_uv=False)
    np.testing.assert_allclose(left[-rank:], 0, atol=1e-5)  # of rank k - r
    np.testing.assert_allclose(left[:-rank], s[:-rank], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(taken), np.linalg.norm(s[-rank:]), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_takes_a_qr_of_the_transpose(shape, keys):
    kernel = jax.random.normal(next(keys), shape)
    q, r = np.linalg.qr(np.asarray(kernel, np.float64).T)
    for alpha in (3.0, 7.0):  # the factors do not see the scale, their part does
        taken = part(olora(), kernel, 3, alpha)
        expected = alpha / 3 * (q[:, :3] @ r[:3]).T
        np.testing.assert_allclose(taken, expected, atol=1e-5)
    frozen, _ = olora().init(jax.random.key(0), kernel, 3, 3.0)
    np.testing.assert_allclose(frozen["b0"] @ frozen["b0"].T, np.eye(3), atol=1e-6)


def test_the_two_halves_of_a_kernel_make_it_whole(keys):
    kernel = jax.random.normal(next(keys), (8, 12))
    largest, smallest = part(pissa(), kernel, 4, 5.0), part(milora(), kernel, 4, 3.0)
    np.testing.assert_allclose(largest + smallest, kernel, atol=1e-5)
    np.testing.assert_allclose(
        (kernel - largest) + (kernel - smallest), kernel, atol=1e-5
    )
    assert far(largest, smallest)


def test_power_iterations_find_nearly_the_same(keys):
    kernel = jax.random.normal(next(keys), (40, 30))
    exact = part(pissa(), kernel, 4, 4.0)
    near, rough = (part(pissa(iterations=n), kernel, 4, 4.0) for n in (16, 0))
    np.testing.assert_allclose(near, exact, atol=1e-3)
    assert far(rough, exact)


@every_method
@pytest.mark.parametrize(
    ("residual", "scaling"), [("separate", "alpha/sqrt_r"), ("folded", "alpha/r")]
)
def test_it_starts_as_the_base_and_gives_it_back(
    residual, scaling, method, params, keys
):
    adapter = method(rank=3, alpha=7, residual=residual, scaling=scaling)
    adapted = attach(params, adapter)
    x = jax.random.normal(next(keys), (5, 6))
    np.testing.assert_allclose(jp.adapt(apply)(adapted, x), apply(params, x), atol=1e-5)
    scale = adapted["up"]["kernel"].frozen["scale"]
    np.testing.assert_allclose(scale, 7 / (3 if scaling == "alpha/r" else 3**0.5), 1e-6)
    back = jp.detach(moved(adapted, keys))
    for name in params:
        stored, kernel = adapted[name]["kernel"].base, params[name]["kernel"]
        if residual == "separate":
            assert np.array_equal(stored, kernel)
            assert np.array_equal(back[name]["kernel"], kernel)
        else:
            assert far(stored, kernel)
            np.testing.assert_allclose(back[name]["kernel"], kernel, atol=2e-6)


@every_method
def test_separate_and_folded_are_one_function(method, params, keys):
    separate = moved(attach(params, method(rank=3, alpha=7)), keys)
    folded = attach(params, method(rank=3, alpha=7, residual="folded"))
    folded = jax.tree.map(
        lambda one, other: one.replace(trainable=other.trainable),
        folded,
        separate,
        is_leaf=lambda x: isinstance(x, jp.tree.AdaptedKernel),
    )
    x = jax.random.normal(next(keys), (5, 6))
    y = jp.adapt(apply)(separate, x)
    np.testing.assert_allclose(jp.adapt(apply)(folded, x), y, atol=2e-5)
    np.testing.assert_allclose(apply(jp.merge(folded), x), y, atol=2e-5)
    assert far(apply(params, x), y)


@every_method
def test_folding_into_half_precision_says_what_is_lost(method, params):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    with pytest.warns(UserWarning, match=r"'up/kernel'.*rounding error is 0\.\d+"):
        jp.attach(low, method(rank=3, residual="folded"), ["up"], key=jax.random.key(0))
    none = jax.tree.map(jnp.zeros_like, low)  # loses nothing, and nothing is said
    jp.attach(none, method(rank=3, residual="folded"), ["up"], key=jax.random.key(0))


# --- in use


@every_method
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt_r"])
def test_plain_lora_of_twice_the_rank_is_the_same(scaling, method, params, keys):
    """``[a, a0] [b; -b0]`` on the untouched base, at ranks and alphas of their own."""
    patterns = {"rank_pattern": {"down": 2}, "alpha_pattern": {"down": 5}}
    adapter = method(rank=3, alpha=7, scaling=scaling)
    adapted = moved(attach(params, adapter, **patterns), keys)
    x = jax.random.normal(next(keys), (5, 6))
    plain = {}
    for name, (rank, alpha) in {"up": (3, 7), "down": (2, 5)}.items():
        f, t = adapted[name]["kernel"].frozen, adapted[name]["kernel"].trainable
        more = 2 if scaling == "alpha/r" else 2**0.5
        wide = lora(2 * rank, more * alpha, scaling=scaling)
        tree = jp.attach({name: params[name]}, wide, [name], key=jax.random.key(0))
        leaves = {
            "a": jnp.concatenate([t["a"], f["a0"]], 1),
            "b": jnp.concatenate([t["b"], -f["b0"]], 0),
        }
        plain[name] = {"kernel": tree[name]["kernel"].replace(trainable=leaves)}
    y = jp.adapt(apply)(adapted, x)
    np.testing.assert_allclose(jp.adapt(apply)(plain, x), y, atol=2e-5)
    assert far(apply(params, x), y)


@every_method
def test_gradients_are_the_closed_forms_from_the_first_step(method, keys):
    with jax.enable_x64(True):
        adapter = method(rank=3, alpha=7)
        kernel = jax.random.normal(next(keys), (8, 6), jnp.float64)
        frozen, t = adapter.init(next(keys), kernel, 3, 7.0)
        g = jax.random.normal(next(keys), (8, 6), jnp.float64)

        def task(t):
            f = adapter.factors(kernel, frozen, t, Call())
            return jnp.sum(g * (kernel + change(f)))

        got = jax.grad(task)(t)
        np.testing.assert_allclose(got["a"], 7 / 3 * g @ t["b"].T, rtol=1e-10)
        np.testing.assert_allclose(got["b"], 7 / 3 * t["a"].T @ g, rtol=1e-10)
        assert np.any(got["a"] != 0) and np.any(got["b"] != 0)


@every_method
def test_dropout_never_touches_the_initial_factors(method, keys):
    """With the trained pair at zero, the rest is the same under any mask."""
    kernel = {"up": {"kernel": jax.random.normal(next(keys), (6, 9))}}
    adapted = jp.attach(kernel, method(rank=3, dropout=0.5), ["up"], key=next(keys))
    trainable, frozen = jp.partition(adapted)
    still = jp.combine(jax.tree.map(jnp.zeros_like, trainable), frozen)
    f = lambda p, x: x @ p["up"]["kernel"]
    x = jax.random.normal(next(keys), (5, 6))
    key = next(keys)
    off = jp.adapt(f)(still, x)
    on = jp.adapt(f)(jp.with_dropout(still, jax.random.clone(key)), x)
    np.testing.assert_allclose(on, off, atol=1e-5)
    assert far(off, f(kernel, x))
    assert far(jp.adapt(f)(jp.with_dropout(adapted, key), x), f(kernel, x))


def test_loading_never_decomposes_again(params, keys, tmp_path, monkeypatch):
    adapted = moved(attach(params, pissa(rank=3, alpha=7)), keys)
    interop.save_adapter(adapted, tmp_path / "adapter")

    def refuse(*args, **options):
        raise AssertionError("decomposed")

    monkeypatch.setattr(jnp.linalg, "svd", refuse)
    monkeypatch.setattr("jaxpeft.adapters._pissa.top_factors", refuse)
    again = interop.load_adapter(tmp_path / "adapter", params)
    x = jax.random.normal(next(keys), (5, 6))
    assert np.array_equal(jp.adapt(apply)(again, x), jp.adapt(apply)(adapted, x))
    with pytest.raises(AssertionError, match="decomposed"):  # control
        attach(params, pissa(rank=3, alpha=7))


def test_half_precision_rounds_once(keys):
    """The thin terms nearly cancel: they and their sum stay in float32.

    Measured: 1.65e-3 through ``adapt``, as much as rounding the true result costs;
    3.6e-3 with everything in bfloat16.
    """
    low = jnp.bfloat16
    kernel = (jax.random.normal(next(keys), (256, 256)) / 16).astype(low)
    params = {"up": {"kernel": kernel}}
    x = jax.random.normal(next(keys), (64, 256)).astype(low)
    adapted = jp.attach(params, pissa(rank=16), ["up"], key=next(keys))
    node = moved(adapted, keys, std=2e-3)["up"]["kernel"]
    wide = lambda t: np.asarray(t, np.float64)
    f, t = node.frozen, node.trainable
    delta = wide(t["a"]) @ wide(t["b"]) - wide(f["a0"]) @ wide(f["b0"])
    assert 3e-3 < np.linalg.norm(delta) / np.linalg.norm(wide(kernel)) < 3e-2
    truth = wide(x) @ (wide(kernel) + delta)
    error = lambda y: np.linalg.norm(wide(y) - truth) / np.linalg.norm(truth)
    y = jp.adapt(lambda p, x: x @ p["up"]["kernel"])({"up": {"kernel": node}}, x)
    assert y.dtype == low
    a, b, a0, b0 = (z.astype(low) for z in (t["a"], t["b"], f["a0"], f["b0"]))
    naive = x @ kernel - (x @ a0) @ b0 + (x @ a) @ b
    assert error(y) < 2e-3 < 3e-3 < error(naive)


# --- counts and arguments


@every_method
def test_a_small_layer_counts(method, keys):
    layer = {"kernel": jnp.eye(8, 12) + 1, "bias": jnp.ones(12)}
    adapted = jp.attach({"up": layer}, method(rank=2), ["up"], key=next(keys))
    assert jp.count(adapted) == (40, 8 * 12 + 12 + 40)


@every_method
def test_ranks_up_to_the_smaller_side(method, keys):
    kernel = jax.random.normal(next(keys), (9, 5))
    _, trainable = method().init(next(keys), kernel, 5, 5.0)
    assert trainable["a"].shape == (9, 5)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"at most 5.*\[9, 5\], got {rank}"):
            method().init(next(keys), kernel, rank, 5.0)


@pytest.mark.usefixtures("as_a_user")
@every_method
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 up, got 0; write NAME\("),
        ({"rank": True}, r"`rank` must be a whole number from 1 up, got True"),
        ({"alpha": -1}, r"`alpha` must be positive, got -1; write NAME\(alpha=16\)"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1\.0; write NAME\("),
        ({"residual": "kept"}, "`residual` must be one of separate, folded"),
        ({"scaling": "1"}, "`scaling` must be one of alpha/r, alpha/sqrt_r, got '1'"),
    ],
)
def test_bad_arguments(options, message, method):
    with pytest.raises(ValueError, match=message.replace("NAME", method.__name__)):
        method(**options)


@pytest.mark.usefixtures("as_a_user")
def test_bad_iterations():
    with pytest.raises(ValueError, match=r"`iterations` must be .* got -1.*pissa\("):
        pissa(iterations=-1)
