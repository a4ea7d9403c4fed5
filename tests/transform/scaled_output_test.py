"""The gradient of an output's scale, which is read off the scaled output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.tree import Adapter, Factors, Term, Where, method


@method
def scaled_pair(rank: int = 2) -> Adapter:
    """A pair, and a scale of the output that is trained."""

    def init(key, kernel, rank, alpha):
        a = jax.random.normal(key, (kernel.shape[0], rank))
        o = jnp.arange(-1.0, kernel.shape[1] - 1)  # 0 among them
        return {}, {"a": a, "b": jnp.ones((rank, kernel.shape[1])), "o": o}

    def factors(kernel, frozen, trainable, call):
        return Factors((Term(trainable["a"], trainable["b"]),), o=trainable["o"])

    return Adapter(init, factors, where=Where(rank=rank, alpha=1.0))


@pytest.fixture
def setting():
    w, x = (
        jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32)
        for s in ((6, 4), (5, 6))
    )
    adapted = jp.attach({"w": w}, scaled_pair(), ["w"], key=jax.random.key(0))
    return jp.partition(adapted), x


def of(fn, halves, x):
    loss = lambda t: jnp.sum(jnp.sin(fn(jp.combine(t, halves[1]), x)))
    return loss, halves[0]


def test_a_scale_of_zero_learns(setting):
    """Forward and reverse, against the merged kernel; where it is 0, too."""
    halves, x = setting
    plain = lambda p, x: x @ p["w"]
    loss, trainable = of(jp.adapt(plain), halves, x)
    dense, _ = of(lambda tree, x: plain(jp.merge(tree), x), halves, x)
    got, right = jax.grad(loss)(trainable), jax.grad(dense)(trainable)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=2e-5, atol=2e-5)
    zero = jax.tree.leaves(jax.tree.map(lambda t, g: np.abs(g[t == 0]), trainable, got))
    assert any(np.any(each > 0) for each in zero)  # there is a 0, and it learns
    forward, reverse = (
        jax.jvp(loss, (trainable,), (got,))[1],
        sum(jnp.sum(g * g) for g in jax.tree.leaves(got)),
    )
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


def test_a_scaled_input_lies_as_the_input_on_a_mesh():
    """Cut as its scale, which is cut as the kernel, it would be laid out anew."""
    mesh = jax.make_mesh((1, 2), ("fsdp", "tensor"), devices=jax.devices()[:2])
    mesh = mesh.update(axis_types=(jax.sharding.AxisType.Auto,) * 2)
    site = dict(targets=["w"], key=jax.random.key(0))
    x = jnp.ones((4, 6))

    def text(method, mesh):
        adapted = jp.attach({"w": jnp.ones((6, 6))}, method, **site)

        def use(params, x):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return x @ params["w"]

        return str(jax.make_jaxpr(jp.adapt(use))(adapted, x))

    alone = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=jax.devices()[:1])
    assert "shard_alike" in text(jp.bora(rank=2), mesh)
    assert "shard_alike" not in text(jp.lora(rank=2), mesh)
    assert "shard_alike" not in text(jp.bora(rank=2), alone)
