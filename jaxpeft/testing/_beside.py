"""The contract suite goes on: beside an adapter of another name on the same kernels.

Changes of one kernel are added up. What cannot be added up (scales of a kernel's inputs
or outputs, a kernel that is trained whole, a change that is folded into it) is refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxpeft import adapters, interop
from jaxpeft.numerics import optional
from jaxpeft.testing._compare import CLOSE, FAR, distance, numbers, perturb
from jaxpeft.testing._net import (
    AXES,
    KERNELS,
    RANK,
    D,
    F,
    accepts,
    at_init,
    make,
    make_params,
    net,
    nodes,
    same_bits,
    value_and_grad,
)
from jaxpeft.transform import adapt
from jaxpeft.tree import (
    attach,
    combine,
    count,
    detach,
    extract,
    flat,
    graft,
    lifted_factors,
    merge,
    mergeable,
    partition,
    penalty,
    with_dropout,
)

with optional("Contract tests"):
    import pytest

NAME = "other"


@pytest.fixture
def x():
    return numbers(8, D, seed=9)


@pytest.fixture
def params():
    return make_params()


def each(params, x, wide):
    """What every kernel and bias makes of one input: there, changes add up."""
    dense, heads = params["dense"], params["heads"]

    def layer(carry, p):
        up = x @ p["up"]["kernel"] + p["up"]["bias"][None]
        return carry, (up, wide @ p["down"]["kernel"] + p["down"]["bias"][None])

    return (
        x @ dense["kernel"] + dense["bias"][None],
        jnp.einsum("tf,fhe->the", wide, heads["kernel"]) + heads["bias"][None],
        lax.scan(layer, None, params["layers"])[1],
    )


def put(adapter, name="default", seed=3):
    put_ = lambda params, key: attach(
        params, adapter, KERNELS, key=key, axes=AXES, name=name
    )
    return lambda params: jax.jit(put_)(params, jax.random.key(seed))


@functools.cache
def beside(name, dropout=0.0):
    """The method under its name beside a LoRA, or ``None`` once it is refused."""
    dropped = {"dropout": dropout} if accepts(name, "dropout") else {}
    first = put(adapters.lora(rank=RANK, dropout=dropout))(make_params())
    add = put(make(name, **dropped), NAME, seed=4)
    taken = {node.site.path for node in nodes(first)}
    alone = [node for node in nodes(at_init(name)) if node.site.path in taken]
    if all(map(only_adds, alone)):
        return add(first)
    with pytest.raises(ValueError, match=f"'{NAME}', '{name}'.*cannot share a kernel"):
        add(first)
    return None


def only_adds(node):
    """Whether all that the method does to a kernel is to add thin products."""
    factors = jax.eval_shape(lambda: lifted_factors(node))
    rest = factors.c, factors.o, factors.kernel, node.adapter.folded
    return node.adapter.where.leaf == "kernel" and all(r is None for r in rest)


def test_beside_another_both_train(name, params, x):
    if (start := beside(name)) is None:
        return
    trainable, frozen = partition(start)
    same_bits(combine(trainable, frozen), start)
    optimizer, values = optax.adam(1e-2), []
    state = optimizer.init(trainable)
    for _ in range(3):
        value, gradient = value_and_grad(trainable, frozen, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        values.append(float(value))
    assert values[-1] < values[0]
    for path, leaf in flat(partition(start)[0]).items():
        assert np.any(np.asarray(flat(trainable)[path] != leaf)), f"{path} stays"
    end = combine(trainable, frozen)
    same_bits(detach(end), params)
    if mergeable(end):
        end = perturb(end, scale=0.1)
        assert distance(adapt(net)(end, x), net(merge(end), x)) < CLOSE
    else:
        with pytest.raises(ValueError, match="depends on the input"):
            merge(end)


def test_beside_another_it_is_saved_and_taken_off(name, params, tmp_path):
    if (start := beside(name)) is None:
        return
    tree = perturb(start, scale=0.1)
    folder = interop.save_adapter(tree, tmp_path / "both")
    same_bits(interop.load_adapter(folder, params), tree)
    first = graft(params, extract(tree, "default"))
    folder = interop.save_adapter(tree, tmp_path / "one", name=NAME)
    same_bits(interop.load_adapter(folder, first), tree)
    # Each comes off as if it sat there alone, and goes back.
    alone = graft(params, extract(tree, NAME))
    assert jax.tree.structure(alone) == jax.tree.structure(at_init(name))
    same_bits(graft(first, extract(tree, NAME), name=NAME), tree)
    assert count(tree)[0] == count(first)[0] + count(alone)[0]
    expected = penalty(first) + penalty(alone)
    np.testing.assert_allclose(penalty(tree), expected, rtol=1e-6)


def test_beside_another_changes_add_up_and_dropout_is_its_own(name, params, x):
    if (start := beside(name, dropout=0.5)) is None:
        return
    tree, wide = perturb(start, scale=0.1), numbers(8, F, seed=10)
    first, alone = (graft(params, extract(tree, n)) for n in ("default", NAME))
    named = graft(params, extract(tree, NAME), name=NAME)
    base, key = each(params, x, wide), jax.random.key(5)

    def change(tree):
        y = adapt(each)(with_dropout(tree, jax.random.clone(key)), x, wide)
        return jax.tree.map(jnp.subtract, y, base)

    total = jax.tree.map(jnp.add, change(first), change(named))
    assert distance(change(tree), total) < CLOSE
    assert distance(change(first), total) > FAR
    assert distance(change(named), total) > FAR
    # Under the name that it has alone, the key would draw what the other one draws.
    apart = distance(change(named), change(alone))
    assert apart > FAR if accepts(name, "dropout") else apart < CLOSE
