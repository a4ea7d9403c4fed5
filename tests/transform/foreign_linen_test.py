"""Fine-tuning Linen models written as Flax's own examples are, unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import fill, numbers
from foreign_toolbox import fine_tunes

D, HEADS, F, VOCABULARY = 12, 2, 20, 17
LAYERS = 2


class DecoderBlock(nn.Module):
    """A pre-norm block whose attention has kernels of three axes."""

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(
            y, y, mask=mask
        )
        x = x + y
        y = nn.Dense(F, name="wi")(nn.LayerNorm()(x))
        y = nn.Dense(D, name="wo")(nn.relu(y))
        return x + y, None


class LanguageModel(nn.Module):
    """Causal, learned positions, logits from the embedding."""

    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, D, name="embed")
        positions = self.param("positions", nn.initializers.normal(1.0), (8, D))
        x = embed(tokens) + positions[None, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        if self.scan:
            block = nn.remat(DecoderBlock, prevent_cse=False)
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )(name="layers")(x, mask)
        else:
            for i in range(LAYERS):
                x, _ = DecoderBlock(name=f"layer_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="final")(x))


class PatchEncoder(nn.Module):
    """A vision transformer: a convolution for patches, a class token, a head."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (4, 4), strides=(4, 4), padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, D)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadAttention(num_heads=HEADS, name="attention")(y)
        y = nn.Dense(F, name="up")(nn.LayerNorm()(x))
        x = x + nn.Dense(D, name="down")(nn.gelu(y))
        return nn.Dense(5, name="head")(x[:, 0])


def functional(model, x):
    params = fill(jax.eval_shape(model.init, jax.random.key(7), x))["params"]
    return (lambda params, x: model.apply({"params": params}, x)), params


def attention(prefix, layer=""):
    kernels = {f"{prefix}/{n}/kernel": f"{layer}in out out" for n in ("query", "value")}
    return kernels | {f"{prefix}/out/kernel": f"{layer}in in out"}


def mlp(prefix, names, layer=""):
    return {f"{prefix}{name}/kernel": f"{layer}in out" for name in names}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan and remat"])
def test_language_model(scan, keys):
    fn, params = functional(LanguageModel(scan), jnp.zeros((1, 8), jnp.int32))
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    axes = {"embed/embedding": "in out"}
    names = ["layers"] if scan else [f"layer_{i}" for i in range(LAYERS)]
    for name in names:
        layer = "layer " * scan
        axes |= attention(f"{name}/attention", layer)
        axes |= mlp(f"{name}/", ("wi", "wo"), layer)
    targets = [["query", "value", "embed"], ["out", "wi"], r".*/wo"]
    fine_tunes(fn, params, tokens, axes=axes, targets=targets, keys=keys)


@pytest.mark.parametrize("turn", [0, 1])
def test_vision_transformer(turn, keys):
    """Each method on the convolution and on the kernels behind it, or not."""
    images = numbers(3, 8, 12, 3)
    fn, params = functional(PatchEncoder(), images)
    axes = {"patches/kernel": "in in in out"} | attention("attention")
    axes |= mlp("", ("up", "down", "head"))
    targets = [["query", "value", "head"], ["patches", "up"], ["out", "down"]]
    targets = targets[turn:] + targets[:turn]
    fine_tunes(fn, params, images, axes=axes, targets=targets, keys=keys)
