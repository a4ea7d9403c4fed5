"""Gates and their losses: published and worked-out values, padding, ties."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import numerics

ln = lambda *v: jnp.log(jnp.array(v))


@partial(jax.jit, static_argnames=("k", "renormalise"))
def route(logits, k, active=None, **kwargs):
    """Gates of given logits."""
    l = numerics.router_logits(logits, active)
    kept = numerics.kept_experts(l, k)
    return l, kept, numerics.softmax_gates(l, kept, **kwargs)


def test_gates_of_two_kept_experts():
    l, kept, g = route(ln(4, 3, 1)[None], 2)
    np.testing.assert_allclose(g[0], [4 / 7, 3 / 7, 0], rtol=1e-6)
    assert g[0, 2] == 0
    wide = jnp.concatenate([l, jnp.full((1, 2), 9.0)], 1)
    active = jnp.array([True, True, True, False, False])
    _, _, padded = route(wide, 2, active)
    np.testing.assert_allclose(padded[0], [4 / 7, 3 / 7, 0, 0, 0], rtol=1e-6)
    assert np.all(padded[0, 3:] == 0)
    _, _, cut = route(ln(4, 3, 1)[None], 2, renormalise=False)
    np.testing.assert_allclose(cut[0], [4 / 8, 3 / 8, 0], rtol=1e-6)


def test_a_lone_expert_in_a_wider_stack_has_finite_gradients():
    active = jnp.array([True, False, False])

    def f(l):
        _, _, g = route(l, 2, active)
        return jnp.sum(g * jnp.arange(1.0, 4.0)[None]), g

    (_, g), slope = jax.value_and_grad(f, has_aux=True)(jnp.ones((1, 3)))
    assert np.array_equal(g[0], [1, 0, 0]) and np.all(np.isfinite(slope))


def test_ties_keep_the_first_and_experts_not_kept_get_no_gradient():
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0], [5.0, 1.0, 4.0, 4.0]])
    _, kept, g = route(logits, 2)
    assert kept.tolist() == [[False, True, True, False], [True, False, True, False]]
    assert np.all(np.sum(g > 0, -1) == 2)
    weigh = jnp.arange(4.0)[None]
    slope = jax.grad(lambda l: jnp.sum(route(l, 2)[2] * weigh))(logits)
    assert np.all(slope[~kept] == 0) and np.all(slope[kept] != 0)
    # One kept expert under renormalisation: its gate is 1, whatever the router says.
    assert np.all(jax.grad(lambda l: jnp.sum(route(l, 1)[2] * weigh))(logits) == 0)


@partial(jax.jit, static_argnames="k")
def losses(logits, mask=None, k=2):
    l, kept, g = route(logits, k)
    sums = numerics.routing_sums(l, kept, g, mask, k)
    return numerics.balance_and_z(sums), sums


TOKENS = jnp.stack([ln(4, 3, 1), ln(1, 5, 2), jnp.array([7.0, -3.0, 50.0])])[None]
MASK = jnp.array([[1, 1, 0]])


def test_balance_and_z_of_three_experts():
    (balance, z), sums = losses(TOKENS, MASK)
    np.testing.assert_allclose(balance, 1.125, rtol=1e-6)
    np.testing.assert_allclose(z, np.log(8) ** 2, rtol=1e-6)
    np.testing.assert_allclose(sums["load"][0] / 2, [0.25, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(
        sums["probabilities"][0] / 2, [5 / 16, 8 / 16, 3 / 16], rtol=1e-6
    )
    slopes = jax.jit(jax.grad(lambda l: losses(l, MASK)[0][0]))
    slope = slopes(TOKENS)
    expected = [-0.0703125, 0.0878906, -0.0175781]
    np.testing.assert_allclose(slope[0, 0], expected, atol=1e-6)
    assert np.all(slope[0, 2] == 0)
    other = TOKENS.at[0, 2].set(jnp.array([jnp.nan, jnp.inf, 0.0]))
    (again, _), _ = losses(other, MASK)
    assert again == balance
    assert not np.isnan(slopes(other)).any()


def test_balance_at_its_ends():
    even = jnp.stack([jnp.roll(jnp.array([50.0, 0.0, 0.0]), i) for i in range(3)])[None]
    one = jnp.broadcast_to(jnp.array([50.0, 0.0, 0.0]), (1, 3, 3))
    np.testing.assert_allclose(losses(even, k=1)[0][0], 1, rtol=1e-5)
    np.testing.assert_allclose(losses(one, k=1)[0][0], 3, rtol=1e-5)
    np.testing.assert_allclose(losses(one, k=None)[0][0], 3, rtol=1e-5)
    sums = losses(TOKENS, MASK)[1]
    added = numerics.balance_and_z(jax.tree.map(jnp.add, sums, sums))
    np.testing.assert_allclose(added[0], 1.125, rtol=1e-6)
    twice = jnp.concatenate([TOKENS, TOKENS])
    masks = jnp.concatenate([MASK, MASK])
    np.testing.assert_allclose(losses(twice, masks)[0][0], 1.125, rtol=1e-6)
    none = losses(TOKENS, jnp.zeros_like(MASK))[0]
    assert none == (0, 0)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`mask` has shape \(3,\).*\(1, 3\)"):
        losses(TOKENS, MASK[0])
