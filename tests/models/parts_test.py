"""What every model is built from, one part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import models, training
from jaxpeft.models._on_mesh import look_up
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


# Both cut; the vocabulary alone, and tokens that nothing divides; the width alone.
@pytest.mark.parametrize(
    ("shape", "tokens"), [((12, 8), 4), ((12, 5), 3), ((7, 8), 4)], ids=str
)
def test_a_table_on_a_mesh_is_never_whole(shape, tokens):
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=shape), jnp.float32)
    ids = random.integers(0, shape[0], (8, tokens), np.int32)
    ids[1, 1], ids[2, 0], ids[5, 2] = shape[0], -1, -shape[0] - 1
    mesh = training.make_mesh(2, 2, 2)
    weights = jnp.asarray(random.normal(size=(8, tokens, shape[1])), jnp.float32)

    def loss(table, ids):
        rows = look_up(table, ids)
        return jnp.nansum(rows * weights), rows

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    wanted = step(table, ids)
    spec = training.leaf_spec("embed_tokens/embedding", shape, mesh)
    where = jax.sharding.NamedSharding(mesh, spec)
    placed = jax.device_put(table, where), training.put_batch({"x": ids}, mesh)["x"]
    with jax.set_mesh(mesh):
        found = step(*placed)
        program = jax.jit(look_up).lower(*placed).compile().as_text()
    np.testing.assert_array_equal(found[0][1], wanted[0][1])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6, atol=1e-6)
    assert np.argwhere(np.isnan(found[0][1]).all(-1)).tolist() == [[1, 1], [5, 2]]
    gathered = [x for x in program.splitlines() if " all-gather(" in x]
    assert not any("= f32" in x for x in gathered), "at most ids"


def test_the_loss_of_a_head_that_is_not_there():
    model = models.from_config({"model_type": "llama"}, head="classification")
    with pytest.raises(ValueError, match="only head='causal_lm' gives logits"):
        hidden, targets = jnp.zeros((1, 1, 4096)), jnp.zeros((1, 1), jnp.int32)
        model.apply({}, hidden, targets, method="token_losses")
