"""``capture``: what kernels are given, against values got by hand."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import CLOSE, distance, fill, numbers, pair, prepare
from flax import nnx
from jax import lax

import jaxpeft as jp
from benchmarks.hlo import made_of_shape

D, F, L = 12, 20, 3


def mlp(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


@pytest.fixture
def params():
    return {
        "up": {"kernel": numbers(D, F, seed=1, scale=0.3)},
        "down": {"kernel": numbers(F, D, seed=2, scale=0.3)},
    }


@pytest.fixture
def x():
    return numbers(2, 5, D)


def covariance(x):
    return jnp.einsum("...i,...j->ij", x, x)


def test_plain_function(params, x):
    out, seen = jp.capture(mlp, ["up", "down"], covariance)(params, x)
    hidden = jnp.tanh(x @ params["up"]["kernel"])
    assert set(seen) == {"up/kernel", "down/kernel"}
    assert jnp.array_equal(out, mlp(params, x))
    assert distance(seen["up/kernel"], covariance(x)) < CLOSE
    assert distance(seen["down/kernel"], covariance(hidden)) < CLOSE
    assert distance(seen["up/kernel"], covariance(x[:1])) > 1e-2  # control


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(F, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(D, name="down")(nn.gelu(y)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        scan = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=L
        )
        return scan(name="layers")(x, None)[0]


def hidden_by_hand(params, x):
    """The inputs of "up" and "down" in each layer of ``Stack``."""
    ups, downs = [], []
    for i in range(L):
        layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        normed = nn.LayerNorm().apply({"params": layer["norm"]}, x)
        y = nn.gelu(nn.Dense(F).apply({"params": layer["up"]}, normed))
        x = x + nn.Dense(D).apply({"params": layer["down"]}, y)
        ups, downs = [*ups, normed], [*downs, y]
    return jnp.stack(ups), jnp.stack(downs)


def masked_mean(x, mask):
    """``[batch, tokens, d]`` to ``[batch, d]``."""
    return jnp.einsum("btd,bt->bd", x, mask) / jnp.sum(mask, 1)[:, None]


def test_masked_means_of_a_scanned_linen_model(x, keys):
    """Through ``nn.scan`` and ``nn.remat``; plain, adapted, and partly adapted."""
    model = Stack()
    params = fill(jax.eval_shape(model.init, jax.random.key(7), x))
    mask = jnp.asarray([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    @jax.jit
    def pooled(params, x, mask):
        pool = lambda x: masked_mean(x, mask)
        return jp.capture(model.apply, ["up", "down"], pool)(params, x)

    def expected(params):
        ups, downs = hidden_by_hand(params["params"], x)
        mean = jax.vmap(lambda x: masked_mean(x, mask))
        layers = "params/layers"
        return {f"{layers}/down/kernel": mean(downs), f"{layers}/up/kernel": mean(ups)}

    out, seen = pooled(params, x, mask)
    assert distance(out, model.apply(params, x)) < CLOSE
    assert distance(seen, expected(params)) < CLOSE
    assert distance(seen, pooled(params, x, jnp.ones_like(mask))[1]) > 1e-2
    # The tree inside of "params" was adapted: its sites have shorter names.
    roles = {"up": "layer in out", "down": "layer in out"}
    inner = prepare(params["params"], pair(), ["up"], keys, axes=roles)
    merged = jp.merge({"params": inner})
    out, seen = pooled({"params": inner}, x, mask)
    assert distance(out, model.apply(merged, x)) < CLOSE
    assert distance(seen, expected(merged)) < CLOSE
    assert distance(seen, expected(params)) > 1e-2


def test_nnx(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(
                4, D, 28, decode=False, rngs=rngs, dropout_rate=0.0, keep_rngs=False
            )

        def __call__(self, x):
            return self.attention(x, x)

    graph, params = nnx.split(Model(nnx.Rngs(7)))
    fn = lambda params, x: nnx.merge(graph, params)(x)
    _, seen = jp.capture(fn, ["query", "out"], lambda x: x)(params, x)
    assert distance(seen["attention/query/kernel"], x) < CLOSE
    heads = seen["attention/out/kernel"]  # two in axes, as one
    w = params["attention"]["out"]["kernel"][...].reshape(28, D)
    bias = params["attention"]["out"]["bias"][...]
    assert distance(heads @ w + bias.reshape(1, 1, D), fn(params, x)) < CLOSE


def test_what_is_trained_in_full_is_seen_too(params, x, keys):
    adapted = prepare(params, jp.full(), ["down"], keys)
    _, seen = jp.capture(mlp, ["up", "down"], covariance)(adapted, x)
    assert distance(seen["up/kernel"], covariance(x)) < CLOSE
    hidden = jnp.tanh(x @ params["up"]["kernel"])
    assert distance(seen["down/kernel"], covariance(hidden)) < CLOSE


def test_stacks_experts_and_several_uses(keys):
    """A use axis, an expert axis that the input has, and one that it lacks."""
    p = {"w": numbers(D, D, seed=1, scale=0.3), "e": numbers(4, D, F, seed=2)}
    x, xs = numbers(5, D), numbers(4, 5, D)

    def fn(p, x, xs):
        y = jnp.tanh(x @ p["w"]) @ p["w"]
        return y, jax.vmap(jnp.matmul, in_axes=(None, 0))(y, p["e"]), xs

    def dense(p, x, xs):
        return jnp.einsum("etd,edf->etf", xs, p["e"])

    mean = lambda x: jnp.mean(x, 0)
    (y, *_), seen = jp.capture(fn, ["w"], mean)(p, x, xs)
    uses = jnp.stack([mean(x), mean(jnp.tanh(x @ p["w"]))])
    assert distance(seen["w"], uses) < CLOSE
    roles = {"e": "expert in out"}
    _, seen = jp.capture(fn, ["e"], mean, axes=roles)(p, x, xs)
    assert distance(seen["e"], jnp.broadcast_to(mean(y), (4, D))) < CLOSE
    _, seen = jp.capture(dense, ["e"], mean)(p, x, xs)
    assert distance(seen["e"], jnp.mean(xs, 1)) < CLOSE


def test_gradients_and_vmap(params, x):
    """With respect to the parameters below and the input; the fn itself unchanged."""
    top = lambda seen: jnp.sum(jnp.sin(seen["down/kernel"]))
    call = jp.capture(mlp, ["down"], lambda x: jnp.mean(x, -2))
    hidden = lambda p, x: jnp.mean(jnp.tanh(x @ p["up"]["kernel"]), -2)
    got = jax.grad(lambda p, x: top(call(p, x)[1]), (0, 1))(params, x)
    expected = jax.grad(lambda p, x: jnp.sum(jnp.sin(hidden(p, x))), (0, 1))(params, x)
    assert distance(got, expected) < CLOSE
    each = jax.vmap(call, in_axes=(None, 0))(params, x)[1]["down/kernel"]
    assert distance(each, hidden(params, x)) < CLOSE


def test_traces_once(params, x):
    traced = []

    def fn(p, x):
        traced.append(None)
        return mlp(p, x)

    call = jp.capture(fn, ["up"], covariance)
    call(params, x)
    first = len(traced)
    call(jax.tree.map(lambda p: p + 1, params), x)
    assert len(traced) == first


def test_refusals(params, x):
    table = params | {"table": {"embedding": numbers(7, D)}}
    looked_up = lambda p, ids: mlp(p, p["table"]["embedding"][ids])
    ids = jnp.asarray([[1, 2]])
    with pytest.raises(ValueError, match=r"chose \['table/embedding'\].*exclude="):
        jp.capture(looked_up, ["table"], covariance)(table, ids)
    with pytest.raises(ValueError, match=r"'up/kernel'.*`reduce` gave nothing"):
        jp.capture(mlp, ["up"], lambda x: None)(params, x)
    with pytest.raises(ValueError, match="'vp' matched none of the 2 kernels"):
        jp.capture(mlp, ["vp"], covariance)(params, x)
    unused = params | {"other": {"kernel": numbers(3, 2, 4)}}
    with pytest.raises(ValueError, match=r"axes of 'other/kernel'.*cannot be read"):
        jp.capture(mlp, ["other"], covariance)(unused, x)
    unchecked = inspect.unwrap(jp.capture)  # its annotations are checked under test
    with pytest.raises(TypeError, match="`reduce` must be a function, got dict"):
        unchecked(mlp, ["up"], params)

    def loop(p, x):
        step = lambda c: (c[0] + 1, jnp.tanh(mlp(p, c[1])))
        return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]

    with pytest.raises(jp.UnsupportedError, match="while.*capture cannot follow"):
        jp.capture(loop, ["up"], covariance)(params, x)


def test_no_activation_is_kept(x):
    """The program holds every layer's result, and no stack of their inputs."""
    params = {"w": numbers(L, D, D, seed=1, scale=0.2)}
    step = lambda x, w: (jnp.tanh(x @ w), None)
    fn = lambda p, x: lax.scan(step, x, p["w"])[0]
    stack = {tuple(sorted((L, *x.shape)))}

    def stacks(reduce):
        call = jax.jit(jp.capture(fn, ["w"], reduce))
        text = call.lower(params, x).compile().as_text()
        return made_of_shape(text, stack, inside=True)

    assert not stacks(covariance)
    assert stacks(lambda x: x)  # control: the search would find one
