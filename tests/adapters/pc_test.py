"""Principal components: the start, to the bit, and what is left of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import change
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp
from jaxpeft.adapters import pc
from jaxpeft.tree._lift import lifted_factors


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def params(dtype=jnp.float32):
    up, down = jax.random.split(jax.random.key(1))
    return {
        "up": {"kernel": jax.random.normal(up, (6, 9)).astype(dtype)},
        "down": {"kernel": jax.random.normal(down, (9, 7)).astype(dtype)},
    }


def attach(tree, adapter):
    return jp.attach(tree, adapter, ["up", "down"], key=jax.random.key(7))


def moved(adapted, leaves=("a", "b"), std=0.1):
    trainable, frozen = jp.partition(adapted)
    rng = np.random.default_rng(0)

    def move(path, x):
        if str(path[-1]) not in [f"['{name}']" for name in leaves]:
            return x
        return x + std * jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jp.combine(jax.tree_util.tree_map_with_path(move, trainable), frozen)


def test_components_are_those_of_the_decomposition():
    kernel = params()["up"]["kernel"]
    frozen, trainable = pc().init(jax.random.key(0), kernel, 3, None)
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    a, b = (np.asarray(trainable[n], np.float64) for n in "ab")
    np.testing.assert_allclose(a @ b, u[:, :3] * s[:3] @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), s[:3], rtol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    assert all(np.array_equal(frozen[f"{n}0"], trainable[n]) for n in "ab")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_it_starts_as_the_base_to_the_bit(dtype):
    tree, x = params(dtype), jax.random.normal(jax.random.key(2), (5, 6)).astype(dtype)
    adapted, run = attach(tree, pc(rank=3)), jax.jit(jp.adapt(apply))
    np.testing.assert_array_equal(run(adapted, x), jax.jit(apply)(tree, x))
    after = run(moved(adapted), x)
    assert np.max(np.abs(np.asarray(after - apply(tree, x), np.float32))) > 0.1
    for a, b in zip(
        jax.tree.leaves(jp.detach(moved(adapted))), jax.tree.leaves(tree), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_folded_is_the_same_function():
    tree, x = params(), jax.random.normal(jax.random.key(2), (5, 6))
    make = lambda residual: attach(tree, pc(rank=3, residual=residual))
    folded, separate = make("folded"), make("separate")
    base = tree["up"]["kernel"]
    node = folded["up"]["kernel"]
    whole = node.base + node.frozen["a0"] @ node.frozen["b0"]
    np.testing.assert_allclose(whole, base, atol=1e-6)
    run = jax.jit(jp.adapt(apply))
    np.testing.assert_allclose(run(folded, x), apply(tree, x), atol=2e-5)
    y = run(moved(folded), x)
    np.testing.assert_allclose(run(moved(separate), x), y, atol=2e-5)
    np.testing.assert_allclose(apply(jp.merge(moved(folded)), x), y, atol=2e-5)
    np.testing.assert_allclose(jp.detach(folded)["up"]["kernel"], base, atol=1e-6)


def test_the_change_is_that_of_the_paper_and_so_are_its_gradients():
    """``a b - a0 b0`` in float64, though nothing of it is computed so."""
    adapted = moved(attach(params(), pc(rank=3)))
    node = adapted["up"]["kernel"]
    a, b, a0, b0 = (
        np.asarray((node.trainable | node.frozen)[n], np.float64)
        for n in ("a", "b", "a0", "b0")
    )
    f = lifted_factors(node)
    np.testing.assert_allclose(change(f), a @ b - a0 @ b0, atol=1e-5)
    seen = jax.random.normal(jax.random.key(3), (6, 9))

    def loss(trainable):
        f = lifted_factors(node.replace(trainable=trainable))
        return jnp.sum(seen * (change(f)))

    gradient = jax.grad(loss)(node.trainable)
    np.testing.assert_allclose(gradient["a"], seen @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["b"], a.T @ seen, rtol=1e-4, atol=1e-5)


def test_one_moved_component_is_a_change_of_rank_two():
    adapted = attach(params(), pc(rank=3))
    node = adapted["up"]["kernel"]
    leaves = {
        "a": node.trainable["a"].at[:, 1].add(0.3),
        "b": node.trainable["b"].at[1].add(-0.2),
    }
    f = lifted_factors(node.replace(trainable=leaves))
    singular = np.linalg.svd(np.asarray(change(f), np.float64), compute_uv=False)
    assert singular[1] > 0.1 and np.all(singular[2:] < 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be a whole number"),
        ({"residual": "stored"}, "`residual` must be one of separate, folded"),
        ({"iterations": -1}, r"`iterations` .* Write pc\(iterations=16\)"),
    ],
)
def test_options_that_cannot_be(options, message, as_a_user):
    with pytest.raises(ValueError, match=message):
        pc(**options)


def test_a_kernel_has_only_so_many():
    with pytest.raises(ValueError, match="site 'up/kernel'.*at most 6"):
        attach(params(), pc(rank=7))
