"""Full training: a float32 copy of any leaf, the leaf itself untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp


@pytest.fixture
def params(keys):
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    half = jnp.bfloat16
    return {
        "encoder": {"kernel": draw(6, 5), "bias": draw(5)},
        "head": {"kernel": draw(5, 3).astype(half), "bias": draw(3).astype(half)},
    }


def apply(params, x):
    x = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"][None])
    head = jax.tree.map(lambda w: w.astype(x.dtype), params["head"])
    return x @ head["kernel"] + head["bias"][None]


def test_every_leaf_of_a_module_is_trained_as_plain_training_does(params, keys):
    x = jax.random.normal(next(keys), (4, 6))
    adapted = jp.attach(params, jp.full(), ["head"], key=next(keys))
    trainable, frozen = jp.partition(adapted)
    assert {n: v.shape for n, v in jp.tree.flat(trainable).items()} == {
        "head/kernel/value": (5, 3),
        "head/bias/value": (3,),
    }
    assert {v.dtype for v in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    forward = jp.adapt(apply)
    np.testing.assert_allclose(forward(adapted, x), apply(params, x), atol=1e-6)

    def loss(trainable):
        return jnp.sum(forward(jp.combine(trainable, frozen), x) ** 2)

    mine = jax.grad(loss)(trainable)["head"]
    plain = jax.grad(lambda h: jnp.sum(apply({**params, "head": h}, x) ** 2))(
        params["head"]
    )
    for name in plain:
        np.testing.assert_allclose(
            mine[name].trainable["value"], plain[name].astype(jnp.float32), rtol=1e-2
        )


def test_steps_below_the_leafs_own_precision_count(params, keys):
    adapted = jp.attach(params, jp.full(), ["head"], key=next(keys))
    trainable, frozen = jp.partition(adapted)
    for _ in range(300):  # each 1e-5 of the value; bfloat16 resolves 4e-3
        trainable = jax.tree.map(lambda w: w * (1 + 1e-4), trainable)
    merged = jp.merge(jp.combine(trainable, frozen))["head"]["kernel"]
    before = params["head"]["kernel"]
    assert merged.dtype == before.dtype
    np.testing.assert_allclose(
        merged.astype(jnp.float32), 1.03 * before.astype(jnp.float32), rtol=1e-2
    )
    stuck = before
    for _ in range(300):
        stuck = (stuck * jnp.asarray(1 + 1e-4, stuck.dtype)).astype(stuck.dtype)
    assert np.array_equal(stuck, before)  # control: without the wide copy
    detached = jp.detach(jp.combine(trainable, frozen))
    for old, new in zip(
        jax.tree.leaves(params), jax.tree.leaves(detached), strict=True
    ):
        assert np.array_equal(old, new)


def test_full_and_lora_train_together(params, keys):
    adapted = jp.attach(params, jp.lora(2), ["encoder"], key=next(keys))
    adapted = jp.attach(adapted, jp.full(), ["head", "encoder/bias"], key=next(keys))
    assert jp.count(adapted)[0] == 2 * (6 + 5) + 5 + 15 + 3
    with pytest.raises(ValueError, match="'head/kernel' already carries 'full'"):
        jp.attach(adapted, jp.lora(2), ["head"], key=next(keys))
