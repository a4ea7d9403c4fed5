"""The network of the conftest in JAX, and PEFT's weights in our layout."""

import jax
import jax.numpy as jnp

LAYERS = {"up": (12, 20), "mid": (20, 20), "down": (20, 8)}
VOCABULARY = 11


def to_jax(tensor):
    return jnp.asarray(tensor.detach().numpy().copy())


def parameters(net):
    """The network's parameters as a JAX tree, kernels ``[d_in, d_out]``."""
    params = {
        name: {
            "kernel": to_jax(getattr(net, name).weight).T,
            "bias": to_jax(getattr(net, name).bias),
        }
        for name in LAYERS
    }
    params["tokens"] = {"embedding": to_jax(net.tokens.weight)}
    return params


def apply(params, ids):
    x = params["tokens"]["embedding"][ids]
    for name in LAYERS:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None, None])
    return x


def with_leaves(adapted, leaves):
    """Replaces trained leaves by PEFT's: ``{module: {leaf: array}}``."""
    adapted = jax.tree.map(lambda x: x, adapted)  # containers of our own
    for module, values in leaves.items():
        (name,) = (n for n in adapted[module] if n in ("kernel", "embedding"))
        node = adapted[module][name]
        assert node.trainable.keys() == values.keys()
        for leaf, value in values.items():
            assert node.trainable[leaf].shape == value.shape
        adapted[module][name] = node.replace(trainable=values)
    return adapted


def lora_leaves(layer):
    """PEFT's factors of one linear layer, in our names and layout."""
    leaves = {
        "a": to_jax(layer.lora_A["default"].weight).T,
        "b": to_jax(layer.lora_B["default"].weight).T,
    }
    if getattr(layer, "lora_diag", None) is not None and "default" in layer.lora_diag:
        leaves["sigma"] = to_jax(layer.lora_diag["default"])
    return leaves
