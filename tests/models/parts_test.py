"""What every model is built from, one part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models._parts import ACTIVATIONS

SPAN = np.linspace(-12, 12, 4801, dtype=np.float32)


@pytest.mark.interop
def test_exact_gelu_and_its_gradient_are_those_of_torch():
    import torch

    gelu = ACTIVATIONS["gelu"]
    x = torch.tensor(SPAN, requires_grad=True)
    theirs = torch.nn.functional.gelu(x)
    theirs.sum().backward()
    ours, pull = jax.vjp(gelu, jnp.asarray(SPAN))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)
    slope = pull(jnp.ones_like(ours))[0]
    np.testing.assert_allclose(slope, x.grad.numpy(), atol=1e-6)
    control = ACTIVATIONS["gelu_new"](jnp.asarray(SPAN))  # the tanh form is another
    assert np.max(np.abs(control - theirs.detach().numpy())) > 1e-4


def test_exact_gelu_is_its_own_derivative_to_second_order():
    exact = lambda x: jax.nn.gelu(x, approximate=False)
    x = jnp.asarray(SPAN[::40])
    ours = jax.vmap(jax.grad(jax.grad(ACTIVATIONS["gelu"])))(x)
    np.testing.assert_allclose(ours, jax.vmap(jax.grad(jax.grad(exact)))(x), atol=2e-6)


def test_exact_gelu_keeps_the_dtype_and_does_not_cancel_in_it():
    x = jnp.asarray(SPAN, jnp.bfloat16)
    ours, pull = jax.vjp(ACTIVATIONS["gelu"], x)
    (slope,) = pull(jnp.ones_like(x))
    assert ours.dtype == slope.dtype == jnp.bfloat16
    wide = ACTIVATIONS["gelu"](x.astype(jnp.float32))
    # Half of bfloat16's last place; 1 + erf in bfloat16 itself is off by 6e-3 at -2.5.
    np.testing.assert_allclose(ours.astype(jnp.float32), wide, rtol=2**-8, atol=1e-7)


def test_exact_gelu_asks_for_no_erfc():
    ours = jax.make_jaxpr(jax.grad(lambda x: ACTIVATIONS["gelu"](x).sum()))(SPAN)
    assert "erfc" not in str(ours)
