"""Every method beside quantised kernels, against the same on dequantised floats.

Plain, with heads and in a scanned, rematerialised stack; of the kernels one has no
adapter. Knows no method's name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_toolbox import METHODS, make

import jaxpeft as jp
from jaxpeft.numerics import dense, is_quantised
from jaxpeft.testing._compare import CLOSE, distance, numbers, perturb
from jaxpeft.testing._net import AXES, D, make_params, net

KINDS = {"dense": "nf4", "heads": "int8", "up": "int4", "down": "nf4"}


@pytest.fixture(scope="module")
def base():
    tree = make_params()
    for name, kind in KINDS.items():
        axes = {k: w for k, w in AXES.items() if k.endswith(name)}
        tree = jp.quantise(tree, kind, [name], group=8, axes=axes)
    return tree


def dequantised(tree):
    return jax.tree.map(dense, tree, is_leaf=is_quantised)


def slopes(adapted, x):
    """The loss, and its gradients to the trained leaves and to the input."""
    trainable, frozen = jp.partition(adapted)
    forward = jp.adapt(lambda params, x: net(params, x, remat=True))

    def loss(trainable, x):
        adapted = jp.combine(trainable, frozen)
        return jnp.sum(forward(adapted, x) ** 2) + jp.penalty(adapted)

    return jax.value_and_grad(loss, (0, 1))(trainable, x)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sees_a_quantised_kernel_as_its_floats(name, base):
    def both(params, key, x):
        adapter = make(name)
        adapted = jp.attach(params, adapter, ["dense", "heads", "up"], key=key)
        adapted = perturb(adapted, scale=0.1)
        return adapted, slopes(adapted, x), slopes(dequantised(adapted), x)

    x = numbers(5, D, seed=9)
    adapted, got, expected = jax.jit(both)(base, jax.random.key(11), x)
    assert distance(got, expected) < CLOSE
    assert np.any(got[1][1] != 0)
    assert jp.count(adapted) == jp.count(dequantised(adapted))  # logical numbers
    plain = jp.detach(adapted)
    for path in KINDS if make(name).folded is None else ("down",):
        stack = plain["layers"] if path in plain["layers"] else plain
        own = base["layers"] if path in base["layers"] else base
        one, other = stack[path]["kernel"], own[path]["kernel"]
        assert one.kind == other.kind
        assert np.array_equal(one.codes, other.codes), path
        assert np.array_equal(one.scale, other.scale), path
