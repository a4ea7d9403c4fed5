"""``adapt`` through NNX models, split and merged as in any functional NNX code."""

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import CLOSE, check, distance, fill, numbers, pair, prepare
from flax import nnx

import jaxpeft as jp

D = 12


def split(make):
    """The graph and the parameters of the model that ``make(rngs)`` makes."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(7))))
    return graph, fill(shapes)


def functional(make):
    """A function of a model's parameters, and the parameters."""
    graph, params = split(make)
    return (lambda params, x: nnx.merge(graph, params)(x)), params


@pytest.fixture
def x():
    return numbers(3, 5, D)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, 20, rngs=rngs)
        self.down = nnx.Linear(20, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def up_down(prefix="", roles="in out"):
    return {f"{prefix}up/kernel": roles, f"{prefix}down/kernel": roles}


def test_linear(x, keys):
    fn, params = functional(Block)
    adapted = check(fn, params, x, sites=up_down(), keys=keys)
    assert isinstance(adapted, nnx.State)


def test_linear_as_a_pure_dict(x, keys):
    graph, state = split(Block)

    def fn(params, x):
        new = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new)(x)

    check(fn, nnx.to_pure_dict(state), x, sites=up_down(), keys=keys)


def test_attention_with_linear_general_kernels(x, keys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(
                4, D, 28, decode=False, rngs=rngs, dropout_rate=0.0, keep_rngs=False
            )

        def __call__(self, x):
            return self.attention(x, x)

    fn, params = functional(Model)
    sites = {f"attention/{n}/kernel": "in out out" for n in ("query", "key", "value")}
    sites["attention/out/kernel"] = "in in out"
    check(fn, params, x, sites=sites, keys=keys)


def test_tied_embedding(keys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(23, D, rngs=rngs)

        def __call__(self, ids):
            return self.table.attend(jnp.tanh(self.table(ids)))

    fn, params = functional(Model)
    ids = jnp.asarray([[1, 7, 22], [0, 7, 3]])
    check(fn, params, ids, sites={"table/embedding": "in out"}, keys=keys)


def test_scan_over_layers(x, keys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: Block(rngs), in_axes=0, out_axes=0)
            self.layers = make(rngs.split(3))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return layer(x)

            return run(self.layers, x)

    fn, params = functional(Model)
    check(fn, params, x, sites=up_down("layers/", "layer in out"), keys=keys)


def test_remat_and_jit(x, keys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = Block(rngs)
            self.second = Block(rngs)

        def __call__(self, x):
            x = nnx.jit(nnx.remat(lambda block, x: block(x)))(self.first, x)
            return nnx.remat(nnx.jit(lambda block, x: block(x)))(self.second, x)

    fn, params = functional(Model)
    check(fn, params, x, sites=up_down("first/") | up_down("second/"), keys=keys)


def test_einsum(x, keys):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Einsum("btd,dhe->bthe", (D, 4, 7), (4, 7), rngs=rngs)
            self.o = nnx.Einsum("bthe,hed->btd", (4, 7, D), None, rngs=rngs)

        def __call__(self, x):
            return self.o(jnp.tanh(self.q(x)))

    fn, params = functional(Model)
    sites = {"q/kernel": "in out out", "o/kernel": "in in out"}
    check(fn, params, x, sites=sites, keys=keys)


def test_a_model_object_is_rebuilt_around_merged_parameters(x, keys):
    graph, params = split(Block)
    model = nnx.merge(graph, params)
    adapted = prepare(params, pair(), ["up", "down"], keys)
    merged = nnx.merge(graph, jp.merge(adapted))
    original = nnx.merge(graph, jp.detach(adapted))
    fn = jp.adapt(lambda params, x: nnx.merge(graph, params)(x))
    assert distance(fn(adapted, x), merged(x)) < CLOSE
    assert jnp.array_equal(original(x), model(x))
    assert not jnp.array_equal(merged(x), model(x))
