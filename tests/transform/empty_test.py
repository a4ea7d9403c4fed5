"""A batch without rows, rows without tokens: what the plain model gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import numbers, perturb
from jax import lax

import jaxpeft as jp
from jaxpeft.numerics import balance_and_z
from jaxpeft.transform.rules._rows import row_changes

LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolved(stride, padding, groups=1):
    def fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["w"],
            (stride, stride),
            padding,
            dimension_numbers=LAYOUT,
            feature_group_count=groups,
        )

    return fn


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params["w"])[0]


WINDOW = "in in in out"
# A function, its kernel's shape and roles, the shape of the input.
CASES = {
    "matmul": (lambda p, x: x @ p["w"], (4, 6), None, (0, 3, 4)),
    "no tokens": (lambda p, x: x @ p["w"], (4, 6), None, (3, 0, 4)),
    "scan": (scanned, (3, 4, 4), "layer in out", (0, 3, 4)),
    "experts": (
        lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]),
        (3, 4, 4),
        "expert in out",
        (3, 0, 4),
    ),
    "same": (convolved(1, "SAME"), (2, 2, 4, 6), WINDOW, (0, 5, 5, 4)),
    "patches": (convolved(2, "VALID"), (2, 2, 4, 6), WINDOW, (0, 4, 4, 4)),
    "groups": (convolved(1, "SAME", 2), (2, 2, 2, 6), WINDOW, (0, 5, 5, 4)),
    "too small": (convolved(1, "VALID"), (2, 2, 4, 6), WINDOW, (2, 1, 1, 4)),
}
LOOKUPS = {
    "index": lambda p, x: p["w"][jnp.zeros((0, 3), jnp.int32)],
    "transposed": lambda p, x: x @ p["w"].T,
}
METHODS = {
    "plain": jp.lora(rank=2),
    "scaled": jp.bora(rank=2),
    "gated": jp.molora(rank=2, experts=2),
}


def run(fn, adapted, x):
    """Outputs and gradients of the leaves and of the input."""
    trainable, frozen = jp.partition(adapted)

    def loss(trainable, x):
        y, seen = jp.adapt(fn, taps="own")(jp.combine(trainable, frozen), x)
        more = [jnp.sum(sum(balance_and_z(s))) for s in seen.values() if s]
        return jnp.sum(y) + sum(more), y

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, y), gradients = jax.jit(step)(trainable, x)
    return y, gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch(case, method):
    fn, shape, words, of = CASES[case]
    axes = None if words is None else {"w": words}
    params, x = {"w": numbers(*shape)}, jnp.zeros(of)
    adapted = jp.attach(
        params, METHODS[method], ["w"], key=jax.random.key(0), axes=axes
    )
    y, (leaves, to_x) = run(fn, perturb(adapted), x)
    plain = fn(params, x)
    assert y.shape == plain.shape and y.dtype == plain.dtype and y.size == 0
    assert to_x.shape == x.shape
    assert all(np.all(g == 0) for g in jax.tree.leaves(leaves))


@pytest.mark.parametrize("case", LOOKUPS)
def test_an_empty_look_up(case):
    params, x = {"w": numbers(9, 4)}, jnp.zeros((0, 4))
    adapted = jp.attach(params, METHODS["plain"], ["w"], key=jax.random.key(0))
    y, (leaves, _) = run(LOOKUPS[case], perturb(adapted), x)
    assert y.shape == LOOKUPS[case](params, x).shape and y.size == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(leaves))


def test_what_no_token_reaches_is_captured():
    params = {"w": numbers(4, 6)}
    total = jp.capture(lambda p, x: x @ p["w"], ["w"], lambda x: jnp.sum(x, (0, 1)))
    assert total(params, jnp.zeros((3, 0, 4)))[1]["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize("how", ["gather", "ragged"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_rows_that_choose_an_adapter(how, shape):
    rows = jp.tree.Rows(jnp.zeros(shape[0], jnp.int32), jnp.ones(3), how)
    a, b = numbers(3, 4, 2), numbers(3, 2, 5)
    assert row_changes(a, b, rows, jnp.zeros(shape), None).shape == (*shape[:2], 5)
