"""Taps: a small statistic from each site, through every kind of control flow."""

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import (
    CLOSE,
    distance,
    everything,
    gated,
    numbers,
    pair,
    prepare,
)
from jax import lax

import jaxpeft as jp
from benchmarks.hlo import made_of_shape

D, F, L = 12, 20, 3


def second_moment(x, frozen, trainable):
    """The mean square of each input feature, and the size of one leaf."""
    del frozen
    rows = x.reshape(-1, x.shape[-1])
    return {"moment": jnp.mean(rows**2, 0), "b": jnp.sum(trainable["b"] ** 2)}


@pytest.fixture
def params():
    return {
        "up": {"kernel": numbers(D, F, seed=1, scale=0.3)},
        "down": {"kernel": numbers(F, D, seed=2, scale=0.3)},
    }


@pytest.fixture
def stack():
    return {"w": numbers(L, D, D, seed=1, scale=0.2)}


@pytest.fixture
def x():
    return numbers(5, D)


def mlp(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def moment(x):
    return jnp.mean(x.reshape(-1, x.shape[-1]) ** 2, 0)


STACKED = {"w": "layer in out"}


def test_each_site_reports_under_its_path(params, x, keys):
    adapted = prepare(params, pair(), ["up", "down"], keys)
    out, tapped = jp.adapt(mlp, taps=second_moment)(adapted, x)
    merged = jp.merge(adapted)
    assert distance(out, mlp(merged, x)) < CLOSE
    assert set(tapped) == {"up/kernel", "down/kernel"}
    hidden = jnp.tanh(x @ merged["up"]["kernel"])
    assert distance(tapped["up/kernel"]["moment"], moment(x)) < CLOSE
    assert distance(tapped["down/kernel"]["moment"], moment(hidden)) < CLOSE
    b = adapted["up"]["kernel"].trainable["b"]
    assert distance(tapped["up/kernel"]["b"], jnp.sum(b**2)) < CLOSE


def test_the_leaves_are_the_methods_own(params, x, keys):
    """As given to ``factors``: two-dimensional, one layer, frozen ones too."""
    adapted = prepare(params, everything(), ["up"], keys)

    def tap(x, frozen, trainable):
        assert {n: v.shape for n, v in frozen.items()} == {
            "p": (D, 2), "q": (2, F), "scale": ()
        }  # fmt: skip
        assert {n: v.shape for n, v in trainable.items()} == {
            "a": (D, 3), "b": (3, F), "c": (D,), "o": (F,)
        }  # fmt: skip
        return x.shape[-1] * jnp.ones(()), frozen["scale"]

    _, tapped = jp.adapt(mlp, taps=tap)(adapted, x)
    assert tapped == {"up/kernel": (D, 1.0)}


def test_an_axis_of_heads_is_flattened(keys):
    params = {"w": numbers(3, 4, F, seed=1)}
    adapted = prepare(params, pair(), ["w"], keys, axes={"w": "in in out"})
    x = numbers(5, 3, 4)
    fn = lambda p, x: jnp.einsum("tab,abf->tf", x, p["w"])
    _, tapped = jp.adapt(fn, taps=lambda x, *_: jnp.mean(x**2, 0))(adapted, x)
    assert distance(tapped["w"], moment(x.reshape(5, 12))) < CLOSE


def test_none_emits_nothing(params, x, keys):
    adapted = prepare(params, pair(), ["up", "down"], keys)
    wide_only = lambda x, *_: None if x.shape[-1] == D else jnp.mean(x)
    out, tapped = jp.adapt(mlp, taps=wide_only)(adapted, x)
    assert distance(out, mlp(jp.merge(adapted), x)) < CLOSE
    assert list(jax.tree.leaves(tapped["down/kernel"])) != []
    assert tapped.get("up/kernel") is None


def test_without_an_adapted_kernel_there_is_nothing_to_tap(params, x):
    out, tapped = jp.adapt(mlp, taps=second_moment)(params, x)
    assert tapped == {} and jnp.array_equal(out, mlp(params, x))


def layer(x, w):
    return x + jnp.tanh(x @ w), None


def inputs_of_layers(stack, x):
    seen = []
    for w in stack["w"]:
        seen.append(x)
        x, _ = layer(x, w)
    return jnp.stack([moment(y) for y in seen])


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_stacks_its_layers(remat, stack, x, keys):
    adapted = prepare(stack, pair(), ["w"], keys, axes=STACKED)
    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    fn = lambda p, x: lax.scan(body, x, p["w"])[0]
    expected = inputs_of_layers(jp.merge(adapted), x)
    call = jax.jit(jp.adapt(fn, taps=second_moment))
    out, tapped = call(adapted, x)
    assert distance(out, fn(jp.merge(adapted), x)) < CLOSE
    assert distance(tapped["w"]["moment"], expected) < CLOSE
    b = adapted["w"].trainable["b"]
    assert distance(tapped["w"]["b"], jnp.sum(b**2, (1, 2))) < CLOSE


def test_a_reversed_scan_keeps_the_order_of_the_layers(stack, x, keys):
    adapted = prepare(stack, pair(), ["w"], keys, axes=STACKED)
    fn = lambda p, x: lax.scan(layer, x, p["w"], reverse=True)[0]
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    backwards = {"w": jp.merge(adapted)["w"][::-1]}
    expected = inputs_of_layers(backwards, x)[::-1]
    assert distance(tapped["w"]["moment"], expected) < CLOSE


def test_nested_scans_give_nested_axes(x, keys):
    stack = {"w": numbers(2, L, D, D, seed=1, scale=0.2)}
    axes = {"w": "layer layer in out"}
    adapted = prepare(stack, pair(), ["w"], keys, axes=axes)
    fn = lambda p, x: lax.scan(
        lambda x, ws: (lax.scan(layer, x, ws)[0], None), x, p["w"]
    )[0]
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    assert tapped["w"]["moment"].shape == (2, L, D)
    flat = {"w": jp.merge(adapted)["w"].reshape(2 * L, D, D)}
    expected = inputs_of_layers(flat, x).reshape(2, L, D)
    assert distance(tapped["w"]["moment"], expected) < CLOSE


def test_several_uses_of_one_site_get_an_axis_of_uses(x, keys):
    adapted = prepare({"w": numbers(D, D, seed=1)}, pair(), ["w"], keys)
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    hidden = jnp.tanh(x @ jp.merge(adapted)["w"])
    expected = jnp.stack([moment(x), moment(hidden)])
    assert distance(tapped["w"]["moment"], expected) < CLOSE


def test_a_weight_shared_by_the_steps_of_a_scan(x, keys):
    adapted = prepare({"w": numbers(D, D, seed=1, scale=0.2)}, pair(), ["w"], keys)
    fn = lambda p, x: lax.scan(lambda x, _: layer(x, p["w"]), x, None, L)[0]
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    same = {"w": jnp.broadcast_to(jp.merge(adapted)["w"], (L, D, D))}
    assert distance(tapped["w"]["moment"], inputs_of_layers(same, x)) < CLOSE


def test_jit_and_custom_jvp_inside(params, x, keys):
    adapted = prepare(params, pair(), ["up", "down"], keys)
    fn = lambda p, x: jax.nn.silu(jax.jit(mlp)(p, x))
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    assert distance(tapped["up/kernel"]["moment"], moment(x)) < CLOSE


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_branch_without_the_site_gives_zeros(sign, params, x, keys):
    adapted = prepare(params, pair(), ["up", "down"], keys)
    up = lambda p, x: x @ p["up"]["kernel"]
    other = lambda p, x: jnp.tanh(x) @ (p["down"]["kernel"].T)
    fn = lambda p, x, s: lax.cond(s > 0, up, other, p, x)
    call = jax.jit(jp.adapt(fn, taps=second_moment))
    out, tapped = call(adapted, x, jnp.float32(sign))
    assert distance(out, fn(jp.merge(adapted), x, sign)) < CLOSE
    taken = "up/kernel" if sign > 0 else "down/kernel"
    seen = x if sign > 0 else jnp.tanh(x)
    assert set(tapped) == {"up/kernel", "down/kernel"}
    for site, statistics in tapped.items():
        if site == taken:
            # `down` is used transposed: its input is what the matmul sums over.
            assert distance(statistics["moment"], moment(seen)) < CLOSE
        else:
            assert all(jnp.all(s == 0) for s in jax.tree.leaves(statistics))


def test_a_while_loop_is_refused(x, keys):
    adapted = prepare({"w": numbers(D, D, seed=1)}, pair(), ["w"], keys)

    def fn(p, x):
        step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) * 0.5)
        return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

    with pytest.raises(NotImplementedError, match="'w'.*while"):
        jp.adapt(fn, taps=second_moment)(adapted, x)
    silent = jp.adapt(fn, taps=lambda *_: None)
    assert distance(silent(adapted, x)[0], fn(jp.merge(adapted), x)) < CLOSE


def test_gradients_flow_through_taps(stack, x, keys):
    """A loss on the statistics alone moves the layers below them."""
    adapted = prepare(stack, pair(), ["w"], keys, axes=STACKED)
    trainable, frozen = jp.partition(adapted)
    fn = lambda p, x: lax.scan(jax.checkpoint(layer), x, p["w"])[0]

    def loss(t, f):
        tapped = jp.adapt(fn, taps=second_moment)(jp.combine(t, f), x)[1]
        return jnp.sum(jnp.sin(tapped["w"]["moment"]))

    def reference(t, f):
        return jnp.sum(jnp.sin(inputs_of_layers(jp.merge(jp.combine(t, f)), x)))

    got = jax.jit(jax.grad(loss))(trainable, frozen)
    expected = jax.jit(jax.grad(reference))(trainable, frozen)
    assert distance(got, expected) < CLOSE
    b = got["w"].trainable["b"]
    assert jnp.any(b[0] != 0) and jnp.all(b[-1] == 0)  # nothing is above the last


def test_the_gate_of_a_method(params, x, keys):
    adapted = prepare(params, gated(), ["up"], keys)
    use = lambda x, frozen, trainable: jnp.mean(
        jax.nn.sigmoid(x @ trainable["router"]), 0
    )
    _, tapped = jp.adapt(mlp, taps=use)(adapted, x)
    router = adapted["up"]["kernel"].trainable["router"]
    expected = jnp.mean(jax.nn.sigmoid(x @ router), 0)
    assert distance(tapped["up/kernel"], expected) < CLOSE


def test_experts_report_one_by_one(keys):
    w, x = numbers(4, D, F, seed=1), numbers(4, 5, D)
    adapted = prepare({"w": w}, pair(), ["w"], keys, axes={"w": "expert in out"})
    fn = lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"])
    _, tapped = jp.adapt(fn, taps=second_moment)(adapted, x)
    assert distance(tapped["w"]["moment"], jnp.mean(x**2, 1)) < CLOSE


def test_taps_form_no_kernel(params, x, keys):
    adapted = prepare(params, pair(), ["up", "down"], keys)
    call = jax.jit(jp.adapt(mlp, taps=second_moment))
    text = call.lower(adapted, x).compile().as_text()
    assert not made_of_shape(text, {(D, F)})


def test_taps_under_jit_grad_and_vmap(params, x, keys):
    adapted = prepare(params, pair(), ["up"], keys)
    call = jp.adapt(mlp, taps=second_moment)
    many = jnp.stack([x, 2 * x])
    _, tapped = jax.jit(jax.vmap(call, in_axes=(None, 0)))(adapted, many)
    expected = jnp.stack([moment(x), moment(2 * x)])
    assert distance(tapped["up/kernel"]["moment"], expected) < CLOSE
