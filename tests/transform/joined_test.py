"""Kernels side by side, and kernels times an array, before their product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import (
    CLOSE,
    check,
    distance,
    everything,
    fill,
    gate,
    gated,
    input_scale,
    numbers,
    output_scale,
    pair,
    prepare,
)
from jax import lax

import jaxpeft as jp

D, F, G, E = 12, 20, 7, 3


@pytest.fixture
def x():
    return numbers(5, D)


@pytest.fixture
def params():
    return {
        "w": numbers(D, F, seed=1, scale=0.3),
        "u": numbers(D, G, seed=2, scale=0.3),
        "in": numbers(4, F, seed=3, scale=0.3),
        "heads": numbers(D, 3, G, seed=4, scale=0.3),
        "more": numbers(D, 2, G, seed=5, scale=0.3),
    }


def side(p, *names, axis=1):
    return jnp.concatenate([p[name] for name in names], axis)


# name: (fn(params, x), sites)
JOINED = {
    "two": (lambda p, x: x @ side(p, "w", "u"), "w u"),
    "three, one of them plain": (lambda p, x: x @ side(p, "w", "in_", "u"), "w u"),
    "plain first": (lambda p, x: x @ side(p, "in_", "w"), "w"),
    "split again": (
        lambda p, x: jnp.tanh(jnp.split(x @ side(p, "w", "u"), [F], 1)[0]),
        "w",
    ),
    "transposed": (lambda p, x: x @ side(p, "w", "u").T.T, "w u"),
    "on the left": (lambda p, x: side(p, "w", "u").T @ x.T, "w u"),
    "sliced": (lambda p, x: x @ side(p, "w", "u")[:, 3 : F + 2], "w u"),
    "along in": (
        lambda p, x: jnp.concatenate([x, x[:, :4]], 1) @ side(p, "w", "in", axis=0),
        "w in",
    ),
    "used apart, too": (
        lambda p, x: (x @ side(p, "w", "u"), jnp.sin(x @ p["w"])),
        "w u",
    ),
    "heads": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, side(p, "heads", "more")),
        "heads more",
    ),
    "in a loop": (
        lambda p, x: lax.scan(
            lambda h, _: (jnp.tanh(h @ side(p, "w", "u")[:, 15:]), None), x, None, 2
        )[0],
        "w u",
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_kernels_side_by_side(name, params, x, keys):
    fn, sites = JOINED[name]
    params = params | {"in_": numbers(D, 4, seed=6)}
    roles = {
        n: "in out out" if n in ("heads", "more") else "in out" for n in sites.split()
    }
    # Joining kernels is what the model itself does.
    allow = "concatenate", "pad", "slice"
    check(fn, params, x, sites=roles, keys=keys, adapter=pair(), allow=allow)


def test_one_pair_of_thin_products_for_all_parts(params, x, keys):
    adapted = prepare(params, pair(rank=2), ["w", "u"], keys)
    text = str(jax.make_jaxpr(jp.adapt(JOINED["two"][0]))(adapted, x))
    assert text.count("dot_general") == 3 and "f32[5,4]" in text


def test_dropout_is_that_of_each_part(params, x, keys):
    """Parts with other rates, and without, stay apart; a mean over masks is merged."""
    adapted = prepare(params, pair(dropout=0.5), ["w"], keys)
    adapted = jp.attach(adapted, pair(), ["u"], key=next(keys))
    fn = jp.adapt(JOINED["two"][0])
    draw = lambda key: fn(jp.with_dropout(adapted, key), x)
    mean = jnp.mean(jax.vmap(draw)(jax.random.split(next(keys), 4000)), 0)
    still = fn(adapted, x)
    # 4,000 draws: a standard error of 0.01 to 0.02 at entries of about 1.
    assert distance(mean, still) < 0.03
    assert distance(draw(next(keys))[:, :F], still[:, :F]) > 0.1
    assert distance(draw(next(keys))[:, F:], still[:, F:]) < CLOSE


def test_taps_of_one_part(params, x, keys):
    fn = lambda p, x: x @ side(p, "w", "u")
    one = prepare(params, pair(), ["w"], keys)
    tap = lambda x, frozen, trainable: jnp.sum(x)
    _, seen = jp.adapt(fn, taps=tap)(one, x)
    assert distance(seen, {"w": jnp.sum(x)}) < CLOSE
    both = prepare(params, pair(), ["w", "u"], keys)
    with pytest.raises(jp.UnsupportedError, match="tapped kernels are concatenated"):
        jp.adapt(fn, taps=tap)(both, x)


@pytest.mark.parametrize("method", [input_scale(), output_scale(), gated()], ids=str)
def test_what_scales_or_reads_is_refused_by_name(method, params, x, keys):
    adapted = prepare(prepare(params, method, ["w"], keys), pair(), ["u"], keys)
    message = r"`concatenate` at .*joined_test\.py.* method of site 'w'"
    with pytest.raises(jp.UnsupportedError, match=message):
        jp.adapt(lambda p, x: x @ side(p, "u", "w"))(adapted, x)


@pytest.mark.parametrize(
    "names, axis, roles",
    [
        (("w", "square"), 1, {"square": "out in"}),
        (("heads", "heads"), 0, {"heads": "layer in out"}),
    ],
    ids=["other roles", "a batch axis"],
)
def test_parts_have_the_same_roles(names, axis, roles, params, x, keys):
    params = params | {"square": numbers(D, D)}
    adapted = prepare(params, pair(), list(set(names)), keys, axes=roles)
    with pytest.raises(jp.UnsupportedError, match="concatenated along axis"):
        jp.adapt(lambda p, x: jnp.sum(side(p, *names, axis=axis)))(adapted, x)


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(8))(x)


@pytest.mark.parametrize("method", [jp.lora(rank=2), jp.kasa(rank=2)])
def test_an_lstm_that_joins_its_gates(method, keys):
    x = numbers(2, 4, 6)
    model = Lstm()
    params = fill(jax.eval_shape(model.init, jax.random.key(0), x))
    gates = [f"h{g}" for g in "fgio"] + [f"i{g}" for g in "fgio"]
    found = jp.infer_axes(model.apply, params, x)
    assert sorted(found.values()) == ["in out"] * 8
    adapted = prepare(params, method, gates, keys)
    got = jp.adapt(model.apply)(adapted, x)
    assert distance(got, model.apply(jp.merge(adapted), x)) < CLOSE
    assert distance(got, model.apply(params, x)) > 1e-2


# name: (fn(params, x), shape, roles, whether gates are refused)
SCALED = {
    "out": (lambda p, x: x @ (p["w"] * p["s_f"]), (D, F), "in out"),
    "out, from the left": (lambda p, x: x @ (p["s_f"] * p["w"]), (D, F), "in out"),
    "over": (lambda p, x: x @ (p["w"] / (1.5 + p["s_f"] ** 2)), (D, F), "in out"),
    "[out, in]": (lambda p, x: x @ (p["w"] * p["s_f"].T).T, (F, D), "out in"),
    "in": (lambda p, x: x @ (p["w"] * p["s_d"].T), (D, F), "in out"),
    "two out axes": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"] * p["s_h"][None]),
        (D, 3, G),
        "in out out",
    ),
    "one of two": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"] * p["s_h"][None, :, :1]),
        (D, 3, G),
        "in out out",
    ),
    "a stack": (
        lambda p, x: lax.scan(
            lambda x, w: (x @ w, None), x, p["w"] * jnp.arange(1.0, 4)[:, None, None]
        )[0],
        (E, D, D),
        "layer in out",
    ),
    "each layer's out": (
        lambda p, x: lax.scan(
            lambda x, ws: (x @ (ws[0] * ws[1][None]), None),
            x,
            (p["w"], jnp.stack([p["s_d"][0]] * E)),
        )[0],
        (E, D, D),
        "layer in out",
    ),
    "a convolution's channels": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(1, 5, 3, 4), p["w"] * p["s_h"][0], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        (3, 2, 4, G),
        "in in in out",
    ),
}  # fmt: skip


PAPERS = [(n, m) for n in ("out", "in") for m in (jp.dora(rank=2), jp.kasa(rank=2))]


@pytest.mark.parametrize("name, adapter", [(n, everything()) for n in SCALED] + PAPERS)
def test_a_kernel_times_an_array(name, adapter, x, keys):
    fn, shape, roles = SCALED[name]
    params = {
        "w": numbers(*shape, seed=1, scale=0.3),
        "s_f": numbers(1, F, seed=7),
        "s_d": numbers(1, D, seed=8),
        "s_h": numbers(3, G, seed=9),
    }
    if name == "a convolution's channels":
        params["s_h"] = params["s_h"][:, None, None, None]
        adapter = pair()
    # The model's own product, what a loop keeps of it for the way back, and what a
    # convolution does for its gradient.
    own = "multiply divide reverse broadcast dynamic-update-slice"
    allow = own.split()
    check(fn, params, x, sites={"w": roles}, keys=keys, adapter=adapter, allow=allow)


def test_a_gate_and_an_array(x, keys):
    """Along out it scales what the gate let through; along in it is refused."""
    w, s = numbers(D, F, seed=1), numbers(1, F, seed=7)
    adapted = prepare({"w": w}, gated(), ["w"], keys)
    leaf = adapted["w"].trainable
    expected = (x @ w + gate(x @ leaf["router"], x @ leaf["a"]) @ leaf["b"]) * s
    got = jp.adapt(lambda p, x: x @ (p["w"] * s))(adapted, x)
    assert distance(got, expected) < CLOSE
    with pytest.raises(jp.UnsupportedError, match="in axes are scaled.*depends on"):
        jp.adapt(lambda p, x: x @ (p["w"] * x[0][:, None]))(adapted, x)


@pytest.mark.parametrize(
    "scale, reason",
    [((D, F), "in and out axes at once"), ((2, D, F), "more entries")],
    ids=["a mask", "a wider array"],
)
def test_arrays_without_a_rule(scale, reason, x, keys):
    adapted = prepare({"w": numbers(D, F)}, pair(), ["w"], keys)
    s = numbers(*scale)
    fn = lambda p, x: x @ (p["w"][(None,) * (s.ndim - 2)] * s)
    with pytest.raises(jp.UnsupportedError, match=f"`mul`.*{reason}"):
        jp.adapt(fn)(adapted, x)


def test_nothing_is_divided_by_a_kernel(x, keys):
    adapted = prepare({"w": numbers(D, F)}, pair(), ["w"], keys)
    with pytest.raises(jp.UnsupportedError, match="`div`.*divided by it"):
        jp.adapt(lambda p, x: x @ (1.0 / p["w"]))(adapted, x)
