"""A hand-written tree with a stack, kernels of heads, unequal ranks and a head."""

import jax
import jax.numpy as jnp
import numpy as np
from families_toolbox import scrambled

import jaxpeft as jp
from jaxpeft.models import ModuleName

L, D, H, F, V = 3, 8, 2, 12, 11
PART = "base_model.model.model.layers"
AXES = {
    "layers/layer/q_proj": "layer in out out",
    "layers/layer/o_proj": "layer in in out",
    "layers/layer/up": "layer in out",
}
KEY = jax.random.key(0)


def rows(i=""):
    """Names of the stack, or with ``{i}`` of the unrolled tree."""
    layer = "layers/layer" + (i and "_{i}")
    return [
        ModuleName("model.embed", "embed", "embedding", tied="head"),
        ModuleName("model.layers.{i}.q_proj", f"{layer}/q_proj", "linear"),
        ModuleName("model.layers.{i}.o_proj", f"{layer}/o_proj", "linear"),
        ModuleName("model.layers.{i}.up", f"{layer}/up", "linear"),
        ModuleName("model.layers.{i}.norm", f"{layer}/norm", "norm"),
        ModuleName("score", "score", "linear"),
    ]


STACKED, UNROLLED = rows(), rows("{i}")


def make_params():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    layer = {
        "q_proj": {"kernel": draw(L, D, H, D // H), "bias": draw(L, H, D // H)},
        "o_proj": {"kernel": draw(L, H, D // H, D)},
        "up": {"kernel": draw(L, D, F)},
        "norm": {"scale": draw(L, D)},
    }
    return {
        "embed": {"embedding": draw(V, D)},
        "layers": {"layer": layer},
        "score": {"kernel": draw(D, 3), "bias": draw(3)},
    }


def flat_layer(i, layer):
    """One layer of the stack as plain matrices."""
    shapes = {"q_proj": (D, D), "o_proj": (D, D), "up": (D, F)}
    made = {n: {"kernel": layer[n]["kernel"][i].reshape(s)} for n, s in shapes.items()}
    made["q_proj"]["bias"] = layer["q_proj"]["bias"][i].reshape(-1)
    return made | {"norm": {"scale": layer["norm"]["scale"][i]}}


def unrolled(params):
    layer = params["layers"]["layer"]
    layers = {f"layer_{i}": flat_layer(i, layer) for i in range(L)}
    return params | {"layers": layers}


def make_adapted(params):
    """N-D, stacked, layers of unequal rank, a head in full."""
    tree = jp.attach(
        params,
        jp.lora(2, 5),
        ["q_proj", "o_proj", "up"],
        key=KEY,
        axes=AXES,
        rank_pattern={"up": [1, 3, 2], "o_proj": [2, 2, 3]},
        alpha_pattern={"up": [5, 2.5, 5]},
    )
    return jp.attach(tree, jp.full(), ["score"], key=KEY)


def moved(adapted):
    """Leaves away from their start, padding of unequal ranks still zero."""
    tree = scrambled(adapted)
    for name in ("up", "o_proj"):
        node = tree["layers"]["layer"][name]["kernel"]
        ranks, leaves = node.site.ranks, dict(node.trainable)
        keep = np.arange(3)[None] < np.array(ranks)[:, None]
        keep = jnp.asarray(keep, jnp.float32)
        a, b = leaves["a"], leaves["b"]
        leaves["a"] = a * keep.reshape(L, *(1,) * (a.ndim - 2), 3)
        leaves["b"] = b * keep.reshape(L, 3, *(1,) * (b.ndim - 2))
        tree["layers"]["layer"][name]["kernel"] = node.replace(trainable=leaves)
    return tree
