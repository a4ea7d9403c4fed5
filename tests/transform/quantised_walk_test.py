"""What models do with quantised kernels that have no adapter: as with their floats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft.numerics import codes_of, dense, is_quantised
from jaxpeft.testing._compare import distance

CLOSE = 2e-6


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def plain(tree):
    return jax.tree.map(dense, tree, is_leaf=is_quantised)


def rows(x):
    return jnp.abs(x[:, 0] * 7).astype(jnp.int32) % 16


def looked_up(p, x):
    y = jnp.take(p["w"], rows(x), axis=0, mode="fill") @ p["v"]
    return y * jnp.sum(x) + jnp.repeat(p["w"][rows(x)][:, :1], 24, 1)


def tied(p, x):
    return (p["w"][rows(x)] + x @ jnp.ones((16, 24))) @ p["w"].T


def reshaped(p, x):
    w = p["w"].reshape(4, 4, 6, 4).transpose(2, 3, 0, 1).reshape(24, 16)
    return jnp.einsum("ti,oi->to", x, w)[:, :16] @ p["w"].reshape(16, 2, 12)[:, 1]


def scaled(p, x):
    w = 2 * p["w"] * jnp.arange(24.0)[None] / jnp.arange(1.0, 17.0)[:, None]
    return x @ -w + x @ jnp.concatenate([p["w"][:, :6], p["w"][:, 6:]], 1)


def sliced(p, x):
    parts = jnp.split(p["w"], 2, axis=1)
    y = x[:, 2:12] @ p["w"][2:12]
    return y[:, :12] @ parts[0].T @ jnp.flip(p["w"], 0)


def converted(p, x):
    w = lax.stop_gradient(p["w"]).astype(jnp.bfloat16)
    return (x.astype(jnp.bfloat16) @ w).astype(jnp.float32)


def scanned(p, x):
    one = lambda y, w: (jnp.tanh(y @ w["up"]) @ w["down"], None)
    y = lax.scan(jax.checkpoint(one), x, p["stack"])[0]
    each = jax.vmap(lambda w: x @ w)(p["stack"]["up"])
    picked = lax.fori_loop(0, 2, lambda i, y: y @ p["w"] @ p["v"][:, :16], y)
    return y + picked + (each[1] @ p["stack"]["down"][1])


def mapped(p, x):
    y = jax.vmap(lambda x: x @ p["w"])(x)
    return jax.vmap(jax.grad(lambda y: jnp.sum(jnp.tanh(y @ p["v"]))))(y)


def experts(p, x):
    sizes = jnp.array([3, 0, 2], jnp.int32)
    return lax.ragged_dot(x, p["experts"], sizes)


def convolved(p, x):
    image = jnp.broadcast_to(x.reshape(1, 5, 16, 1), (1, 5, 16, 8))
    how = dict(window_strides=(1, 2), padding="SAME")
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, p["conv"], dimension_numbers=numbers, **how)


@functools.cache
def params(kind):
    group = 8

    def coded(x, axes, roles):
        return codes_of(x / x.shape[axes[-1]] ** 0.5, kind, axes, group, roles)

    return {
        "w": coded(normal(16, 24, seed=1), (0,), ("in", "out")),
        "v": coded(normal(24, 24, seed=2), (0,), ("in", "out")),
        "stack": {
            name: coded(normal(2, *shape, seed=3), (1,), ("batch", "in", "out"))
            for name, shape in {"up": (16, 24), "down": (24, 16)}.items()
        },
        "experts": coded(normal(3, 16, 8, seed=4), (1,), ("batch", "in", "out")),
        "conv": coded(normal(3, 3, 8, 4, seed=5), (0, 1, 2), ("in", "in", "in", "out")),
    }


USES = [looked_up, tied, reshaped, scaled, sliced, scanned, mapped, experts, convolved]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("fn", USES, ids=lambda fn: fn.__name__)
def test_a_use_is_that_of_the_floats(fn, kind):
    def both(p, x):
        slope = lambda f, p: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(p, x))))(x)
        return slope(jp.adapt(fn), p), slope(fn, plain(p))

    got, expected = jax.jit(both)(params(kind), normal(5, 16, seed=9))
    assert distance(got, expected) < CLOSE
    assert np.all(np.isfinite(got[0])) and np.any(np.asarray(expected[1]))


def test_a_cast_says_only_of_what_dtype_the_product_is():
    p, x = params("int8"), normal(5, 16, seed=9)
    got = jp.adapt(converted)(p, x)
    exact = x @ p["w"].dequantise()
    assert distance(got, exact) < 2**-7
    assert distance(got, converted(plain(p), x)) < 2**-6


def test_forward_mode_goes_through():
    p, x = params("nf4"), normal(5, 16, seed=9)
    fn = lambda x: jp.adapt(mapped)(p, x)
    got = jax.jvp(fn, (x,), (jnp.ones_like(x),))
    expected = jax.jvp(lambda x: mapped(plain(p), x), (x,), (jnp.ones_like(x),))
    assert distance(got, expected) < CLOSE


def test_codes_are_multiplied_and_scaled_afterwards():
    """No stack of floats is kept for the backward pass; int8 is looked up nowhere."""

    def fn(p, x):  # without rematerialisation of the model's own
        one = lambda y, w: (jnp.tanh(y @ w["up"]) @ w["down"], None)
        return lax.scan(one, x, p["stack"])[0]

    def program(kind):
        p, x = params(kind), normal(5, 16, seed=9)
        loss = lambda x: jnp.sum(jp.adapt(fn)(p, x) ** 2)
        return jax.make_jaxpr(jax.grad(loss))(x)

    for kind in ("int8", "nf4"):
        # Of a scan's results none is a stack of floats: they are what it keeps.
        kept = [
            v.aval
            for eqn in _equations(program(kind).jaxpr)
            if eqn.primitive.name == "scan"
            for v in eqn.outvars
        ]
        stacks = [a for a in kept if a.shape in [(2, 16, 24), (2, 24, 16)]]
        assert not [a for a in stacks if jnp.issubdtype(a.dtype, jnp.floating)], kind
    text = str(program("int8"))
    assert "convert_element_type[new_dtype=float32" in text and "select_n" not in text
    assert "select_n" in str(program("nf4"))


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_axes_and_inputs_are_read_off_as_of_floats():
    p, x = params("nf4"), normal(5, 16, seed=9)
    used = {name: p[name] for name in ("w", "v", "stack")}
    assert jp.infer_axes(scanned, used, x) == jp.infer_axes(scanned, plain(used), x)
    mean = lambda x: jnp.mean(x, axis=0)
    _, seen = jp.capture(scanned, ["up"], mean)(used, x)
    _, expected = jp.capture(scanned, ["up"], mean)(plain(used), x)
    assert distance(seen, expected) < CLOSE


def test_what_has_no_rule_is_named():
    fn = lambda p, x: x @ jnp.sin(p["w"])
    with pytest.raises(
        jp.UnsupportedError,
        match="'0/0/w' reaches `sin`.*`targets` of jaxpeft.quantise",
    ):
        jp.adapt(fn)(params("nf4"), normal(5, 16))
    with pytest.warns(UserWarning, match="reaches `sin`"):
        got = jp.adapt(fn, unsupported="materialise")(params("nf4"), normal(5, 16))
    assert distance(got, fn(plain(params("nf4")), normal(5, 16))) < CLOSE
    with pytest.raises(TypeError, match="jaxpeft.adapt"):
        mapped(params("nf4"), normal(5, 16))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_codes_and_scales_lie_on_the_mesh_of_their_kernel(kind):
    """Four devices cut an in axis of two groups: of it the scales stay whole."""
    from jaxpeft.training import make_mesh, param_specs, place

    mesh = make_mesh(fsdp=4, tensor=2)
    p = {"query": {"kernel": params(kind)["w"]}, "up": params(kind)["v"]}
    adapted = jp.attach(p, jp.lora(2), ["query"], key=jax.random.key(0))
    specs = param_specs(p, mesh, tensor_rules=[("query", "out")])
    placed = place(adapted, mesh, specs)
    base = placed["query"]["kernel"].base
    assert base.codes.sharding.spec == P("fsdp", "tensor")
    assert base.scale.sharding.spec == P(None, "tensor")
    fn = lambda p, x: x @ p["query"]["kernel"] @ p["up"]
    x = normal(8, 16, seed=9)
    grads = jax.jit(jax.grad(lambda x, p: jnp.sum(jp.adapt(fn)(p, x) ** 2)))
    assert distance(grads(x, placed), grads(x, adapted)) < CLOSE

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=({"w": P("fsdp")}, P(None, "fsdp")),
        out_specs=P(),
    )
    def cut(p, x):
        return lax.psum(x @ p["w"], "fsdp")

    got = jp.adapt(cut)({"w": params(kind)["w"]}, x)
    assert distance(got, x @ plain(params(kind)["w"])) < CLOSE
