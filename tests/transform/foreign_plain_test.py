"""Fine-tuning models of several libraries and of none, unchanged."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import CLOSE, distance, everything, fill, numbers, prepare
from flax import nnx
from foreign_toolbox import fine_tunes
from jax import lax

import jaxpeft as jp

D, HEADS, F, LAYERS = 12, 2, 20, 3


def test_a_scan_over_a_stack_of_layers(keys):
    """Plain JAX, one kernel stored [in, out] and one [out, in]."""
    params = {
        "layers": {
            "w1": numbers(LAYERS, D, F, seed=1, scale=0.3),
            "b1": numbers(LAYERS, F, seed=2, scale=0.1),
            "w2": numbers(LAYERS, D, F, seed=3, scale=0.3),
        },
        "readout": (numbers(4, D, seed=4, scale=0.3), numbers(4, seed=5)),
    }

    def body(x, layer):
        h = jax.nn.silu(x @ layer["w1"] + layer["b1"][None])
        return x + jnp.einsum("nf,df->nd", h, layer["w2"]), None

    def fn(params, x):
        x, _ = lax.scan(jax.checkpoint(body), x, params["layers"])
        w, b = params["readout"]
        return x @ w.T + b[None]

    axes = {
        "layers/w1": "layer in out",
        "layers/w2": "layer out in",
        "readout/0": "out in",
    }
    targets = [["w1"], ["w2"], ["readout/0"]]
    fine_tunes(fn, params, numbers(5, D), axes=axes, targets=targets, keys=keys)


class NnxEncoder(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, D, (3, 3), strides=2, feature_group_count=3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, D, decode=False, dropout_rate=0.0, keep_rngs=False, rngs=rngs
        )
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, images):
        x = self.stem(images)
        x = x.reshape(x.shape[0], -1, D)
        x = x + self.attention(self.norm(x))
        return jnp.mean(x + self.down(nnx.gelu(self.up(x))), 1)


def test_nnx(keys):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: NnxEncoder(nnx.Rngs(7))))
    axes = {
        "stem/kernel": "in in in out",
        "attention/query/kernel": "in out out",
        "attention/out/kernel": "in in out",
        "up/kernel": "in out",
        "down/kernel": "in out",
    }
    fine_tunes(
        lambda params, x: nnx.merge(graph, params)(x),
        fill(shapes),
        numbers(2, 7, 5, 3),
        axes=axes,
        targets=[["query", "out"], ["stem", "up"], ["down"]],
        keys=keys,
    )


class EqxEncoder(eqx.Module):
    """One image; stacked blocks, as Equinox's tutorials stack them."""

    stem: eqx.nn.Conv2d
    blocks: eqx.nn.MLP
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(3, D, 4, stride=4, key=keys[0])
        self.blocks = eqx.filter_vmap(
            lambda key: eqx.nn.MLP(D, D, F, depth=1, activation=jax.nn.gelu, key=key)
        )(jax.random.split(keys[1], LAYERS))
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=keys[2])
        self.norm = eqx.nn.LayerNorm(D)

    def __call__(self, image):
        x = self.stem(image).reshape(D, -1).T
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y)
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def step(x, layer):
            return x + jax.vmap(eqx.combine(layer, rest))(x), None

        return jnp.mean(lax.scan(jax.checkpoint(step), x, arrays)[0], 0)


def test_equinox(keys):
    shapes = eqx.filter_eval_shape(EqxEncoder, jax.random.key(7))
    params, static = eqx.partition(fill_arrays(shapes), eqx.is_inexact_array)
    axes = {
        "stem/weight": "out in in in",
        "attention/query_proj/weight": "out in",
        "attention/output_proj/weight": "out in",
        "blocks/layers/0/weight": "layer out in",
        "blocks/layers/1/weight": "layer out in",
    }
    adapted = fine_tunes(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        params,
        numbers(2, 3, 8, 12),
        axes=axes,
        targets=[["query_proj", "layers/0"], ["stem", "layers/1"], ["output_proj"]],
        keys=keys,
    )
    assert isinstance(adapted, EqxEncoder)


def fill_arrays(shapes):
    """``fill`` where a tree also has leaves that are no arrays."""
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    arrays, rest = eqx.partition(shapes, is_shape)
    return eqx.combine(fill(arrays), rest)


def haiku_transformer(tokens):
    """A decoder; its layers are stacked by Haiku, and rematerialised."""
    x = hk.Embed(17, D, name="embed")(tokens)
    mask = jnp.tril(jnp.ones((1, 1, *tokens.shape[1:] * 2)))
    init = hk.initializers.VarianceScaling(1.0)

    def block(x):
        y = hk.LayerNorm(-1, True, True)(x)
        x = x + hk.MultiHeadAttention(HEADS, D // HEADS, w_init=init)(y, y, y, mask)
        y = hk.Linear(F, name="up")(hk.LayerNorm(-1, True, True)(x))
        return x + hk.Linear(D, name="down")(jax.nn.gelu(y))

    x = hk.experimental.layer_stack(LAYERS, name="stack")(hk.remat(block))(x)
    return hk.Linear(17, name="head")(x)


def test_haikus_names():
    """ "b" beside "w" is a bias, also where a stack gives it two axes."""
    params = {
        "stack/up": {"w": numbers(LAYERS, D, F), "b": numbers(LAYERS, F)},
        "stack/layer_norm": {"scale": numbers(LAYERS, D), "offset": numbers(LAYERS, D)},
        "embed": {"embeddings": numbers(17, D)},
        "own": {"a": numbers(D, D), "b": numbers(D, D)},
    }

    def sites(targets, params=params, stacked="up"):
        adapted = jax.eval_shape(
            lambda key: jp.attach(
                params, jp.lora(), targets, key=key, axes={stacked: "layer in out"}
            ),
            jax.random.key(0),
        )
        return [site for site in jp.tree.flat(adapted) if site.endswith("base")]

    assert sites("all-linear") == ["own/a/base", "stack/up/w/base"]
    assert sites(["up", "embed"]) == ["embed/embeddings/base", "stack/up/w/base"]
    assert sites(["own/b", "up"]) == ["own/b/base", "stack/up/w/base"]
    assert sites(".*", params["stack/up"], "w") == ["w/base"]


def test_haiku(keys):
    model = hk.without_apply_rng(hk.transform(haiku_transformer))
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    params = fill(jax.eval_shape(model.init, jax.random.key(7), tokens))
    axes = {
        "embed/embeddings": "in out",
        "head/w": "in out",
        "stack/multi_head_attention/query/w": "layer in out",
        "stack/up/w": "layer in out",
        "stack/down/w": "layer in out",
    }
    targets = [["embed", "query"], ["up", "head"], ["down"]]
    fine_tunes(model.apply, params, tokens, axes=axes, targets=targets, keys=keys)


def init_and_apply(layer, x):
    params = fill(jax.eval_shape(layer.init, jax.random.key(7), x))
    return layer.apply, params


def equinox_layer(layer, x):
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    return (lambda params, x: jax.vmap(eqx.combine(params, static))(x)), params


def haiku_layer(layer, x):
    model = hk.without_apply_rng(hk.transform(lambda x: layer()(x)))
    return init_and_apply(model, x)


SEQUENCE, IMAGE, CHANNELS_FIRST = (2, 5, 4), (2, 7, 5, 4), (2, 4, 7, 5)
# Layers that use their kernels in an odd way: flipped, shared over positions or not,
# in a recurrence.
LAYER_KINDS = {
    "Linen, transposed": (
        lambda x: init_and_apply(
            nn.ConvTranspose(4, (3, 2), strides=(2, 2), transpose_kernel=True), x
        ),
        IMAGE,
        {"params/kernel": "in in out in"},
    ),
    "Linen, circular": (
        lambda x: init_and_apply(nn.Conv(6, (3, 2), padding="CIRCULAR"), x),
        IMAGE,
        {"params/kernel": "in in in out"},
    ),
    "Linen, local": (
        lambda x: init_and_apply(nn.ConvLocal(6, (3,), padding="VALID"), x),
        SEQUENCE,
        {"params/kernel": "batch in out"},
    ),
    "Linen, recurrent": (
        lambda x: init_and_apply(nn.RNN(nn.SimpleCell(6)), x),
        SEQUENCE,
        {"params/cell/i/kernel": "in out", "params/cell/h/kernel": "in out"},
    ),
    "Equinox, transposed": (
        lambda x: equinox_layer(
            eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, key=jax.random.key(7)), x
        ),
        CHANNELS_FIRST,
        {"weight": "out in in in"},
    ),
    "Haiku, transposed": (
        lambda x: haiku_layer(lambda: hk.Conv2DTranspose(6, 3, 2), x),
        IMAGE,
        {"conv2_d_transpose/w": "in in out in"},
    ),
}


@pytest.mark.parametrize("name", LAYER_KINDS)
def test_layers(name, keys):
    make, shape, sites = LAYER_KINDS[name]
    x = numbers(*shape)
    fn, params = make(x)
    adapted = prepare(params, everything(), list(sites), keys, axes=sites)
    assert jp.infer_axes(fn, params, x) == sites
    got = jax.jit(jp.adapt(fn))(adapted, x)
    expected = jax.jit(fn)(jp.merge(adapted), x)
    assert distance(got, expected) < CLOSE
    assert distance(jax.jit(fn)(params, x), expected) > 1e-2
