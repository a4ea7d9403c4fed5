"""The decomposition that checks itself, and the smallest triplets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.numerics import _bottom, _svd, bottom_triplets, svd

SHAPES = [(6, 6), (9, 5), (5, 9), (1, 4), (1, 1)]
WAYS = ["exact", "gram", "inverse"]


pytestmark = pytest.mark.usefixtures("quick_compiles")


def product(t):
    return np.asarray(t.u) * np.asarray(t.s) @ np.asarray(t.vt)


def reference(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)


@pytest.fixture
def broken_device(monkeypatch):
    """Makes the device's SVD wrong; counts how often the host is asked."""
    right, host, calls = jnp.linalg.svd, _svd._on_host, []

    def wrong(matrix, **options):
        u, s, vt = right(matrix, **options)
        return u, s * (1 + 1e-4), vt

    def counted(matrix):
        calls.append(matrix.shape)
        return host(matrix)

    monkeypatch.setattr(jnp.linalg, "svd", wrong)
    monkeypatch.setattr(_svd, "_on_host", counted)
    jax.clear_caches()
    yield calls
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_references(shape, keys):
    matrix = jax.random.normal(next(keys), shape)
    found = svd(matrix)
    np.testing.assert_allclose(found.s, reference(matrix)[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(found), matrix, atol=1e-5)
    assert found.residual <= 1e-5


def test_float64_stays_float64(keys):
    with jax.enable_x64(True):
        matrix = jax.random.normal(next(keys), (9, 5), jnp.float64)
        found = svd(matrix)
        assert {x.dtype for x in found} == {jnp.dtype("float64")}
        np.testing.assert_allclose(product(found), matrix, rtol=0, atol=1e-13)
        assert found.residual < 1e-14


def test_the_host_is_not_asked_when_the_device_is_right(keys, monkeypatch):
    monkeypatch.setattr(_svd, "_on_host", lambda matrix: pytest.fail("host asked"))
    jax.clear_caches()
    jax.block_until_ready(svd(jax.random.normal(next(keys), (6, 4))))
    jax.block_until_ready(jax.vmap(svd)(jax.random.normal(next(keys), (3, 6, 4))))
    jax.clear_caches()


def test_the_host_takes_over_when_the_device_is_wrong(keys, broken_device):
    matrix = jax.random.normal(next(keys), (6, 4))
    found = svd(matrix)
    assert broken_device == [(6, 4)]
    np.testing.assert_allclose(found.s, reference(matrix)[1], rtol=1e-5)
    assert found.residual <= 1e-5


def test_not_a_number_reaches_the_host_and_says_so(keys):
    matrix = jax.random.normal(next(keys), (6, 4)).at[2, 1].set(jnp.nan)
    with pytest.raises(jax.errors.JaxRuntimeError, match="holds NaN or infinity"):
        jax.block_until_ready(svd(matrix))


@pytest.mark.parametrize("way", WAYS)
def test_jit_vmap_and_eval_shape_agree(way, keys):
    stack = jax.random.normal(next(keys), (3, 7, 5))
    split = jax.random.split(next(keys), 3)

    def f(matrix, key):
        t = bottom_triplets(matrix, 2, method=way, key=jax.random.clone(key))
        return (t.u * t.s[None, :]) @ t.vt, t

    loose = [f(stack[i], split[i]) for i in range(3)]
    loose = jax.tree.map(lambda *x: jnp.stack(x), *loose)
    mapped = jax.jit(jax.vmap(f))(stack, split)
    abstract = jax.eval_shape(jax.vmap(f), stack, split)
    np.testing.assert_allclose(loose[0], mapped[0], atol=1e-5)
    np.testing.assert_allclose(loose[1].s, mapped[1].s, rtol=1e-4)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), mapped)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_what_is_removed_is_what_is_stored(way, shape, keys):
    matrix = jax.random.normal(next(keys), shape)
    t = bottom_triplets(matrix, 3, method=way, key=next(keys))
    kept = np.asarray(matrix, np.float64) - product(t)
    lost = np.linalg.svd(np.asarray(matrix, np.float64) - kept, compute_uv=False)
    np.testing.assert_allclose(lost[:3], t.s, rtol=1e-4, atol=1e-5)
    values = np.linalg.svd(kept, compute_uv=False)
    assert np.all(values[-3:] < 1e-5 * values[0])  # the rank went down by 3
    assert values[-4] > 1e-2 * values[0]
    np.testing.assert_allclose(t.u.T @ t.u, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(t.vt @ t.vt.T, np.eye(3), atol=1e-5)
    s = reference(matrix)[1]
    np.testing.assert_allclose(t.s, s[-3:], rtol=1e-3)
    np.testing.assert_allclose(t.top, s[0], rtol=1e-4)
    assert np.all(np.diff(t.s) <= 0)


@pytest.mark.parametrize(
    ("way", "shape", "more"),
    # Measured: gram 1e-7 wide, 7e-6 square at 2048; inverse 1e-7 square, 1.5e-2 wide.
    [
        ("gram", (64, 256), 1e-5),
        ("inverse", (96, 96), 1e-3),
        ("inverse", (64, 256), 0.05),
    ],
)
def test_shortcuts_drop_little_more_than_the_least(way, shape, more, keys):
    matrix = jax.random.normal(next(keys), shape)
    t = bottom_triplets(matrix, 4, method=way, key=next(keys))
    least = np.linalg.norm(reference(matrix)[1][-4:])
    assert least * (1 - 1e-5) <= np.linalg.norm(t.s) <= least * (1 + more)


def test_residual_of_a_shortcut_tells_a_bad_subspace(keys, monkeypatch):
    matrix = jax.random.normal(next(keys), (64, 256))
    good = bottom_triplets(matrix, 4, method="gram").residual
    monkeypatch.setattr(_bottom, "STEPS", 1)
    jax.clear_caches()
    bad = bottom_triplets(matrix, 4, method="inverse", key=next(keys)).residual
    jax.clear_caches()
    assert good < 1e-5 < 1e-2 < bad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(6, 6), (9, 5), (5, 9)])
def test_singular_matrices_stay_finite(way, shape, keys):
    rank_one = jnp.outer(jnp.arange(1.0, shape[0] + 1), jnp.ones(shape[1]))
    for matrix in (jnp.zeros(shape), rank_one):
        t = bottom_triplets(matrix, 2, method=way, key=next(keys))
        assert all(np.all(np.isfinite(x)) for x in t)
        np.testing.assert_allclose(t.s, 0, atol=2e-5)
        np.testing.assert_allclose(t.top, np.linalg.norm(matrix), rtol=1e-5)


def test_ill_conditioned_matrices_leave_cholesky_for_qr(keys):
    u = jnp.linalg.qr(jax.random.normal(next(keys), (12, 8)))[0]
    v = jnp.linalg.qr(jax.random.normal(next(keys), (8, 8)))[0]
    matrix = (u * jnp.logspace(0, -6, 8)[None, :]) @ v.T
    t = bottom_triplets(matrix, 2, method="inverse", key=next(keys))
    assert np.all(t.s < 1e-4)  # 1.4e-5 and 1e-6 at best; Gram's floor is 3e-4
    np.testing.assert_allclose(t.top, 1, rtol=1e-5)


def test_a_sharded_matrix_needs_no_gathering_by_hand(keys):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    matrix = jax.random.normal(next(keys), (16, 8))
    spread = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec("x", "y")))
    for way in ("exact", "gram"):
        one, many = (
            bottom_triplets(matrix, 3, method=way),
            bottom_triplets(spread, 3, method=way),
        )
        np.testing.assert_allclose(one.s, many.s, rtol=1e-4)
        np.testing.assert_allclose(product(one), product(many), atol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (jnp.zeros((2, 3, 4)), r"shape \[2, 3, 4\].*jax\.vmap"),
        (jnp.zeros((0, 3)), r"non-empty matrix, got shape \[0, 3\]"),
        (jnp.zeros((2, 3), jnp.bfloat16), r"bfloat16.*astype\(jnp\.float32\)"),
        (jnp.zeros((2, 3), jnp.int32), "must be float32 or float64, got int32"),
    ],
)
def test_bad_matrices_are_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        _svd.check_matrix(matrix)  # `svd` is shape-checked by jaxtyping under test


def test_bad_arguments_are_refused():
    matrix = jnp.ones((4, 3))
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"`count` must be from 1 to 3.*{count}"):
            bottom_triplets(matrix, count)
    with pytest.raises(ValueError, match="`key` must be given for method='inverse'"):
        bottom_triplets(matrix, 1, method="inverse")
