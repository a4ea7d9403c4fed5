"""What the tests of slots share: a base of all kinds of kernels, and adapters of it."""

import jax
import jax.numpy as jnp
from adapt_toolbox import numbers, perturb

import jaxpeft as jp
from jaxpeft import serving

TARGETS = ["up", "down", "heads", "out"]
AXES = {"up|down": "layer in out", "heads": "in out out"}
LAYERS, D, F = 3, 6, 8


def base():
    return {
        "up": {"kernel": numbers(LAYERS, D, F, seed=1, scale=0.4)},
        "down": {"kernel": numbers(LAYERS, F, D, seed=2, scale=0.4)},
        "heads": {"kernel": numbers(D, 2, 3, seed=3, scale=0.4)},
        "out": {"kernel": numbers(D, 5, seed=4, scale=0.4)},
    }


def net(params, x):
    """A scanned stack under remat, heads that attend, and a linear; rows first."""

    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]["kernel"]) @ w["down"]["kernel"], None

    stack = {name: params[name] for name in ("up", "down")}
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, stack)
    x = x.reshape(x.shape[0], -1, D)  # [rows, D] is one token a row
    q = jnp.einsum("btd,dhk->bthk", x, params["heads"]["kernel"])
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, q))
    y = jnp.einsum("bhts,bshk->bthk", scores, q)
    return y.reshape(x.shape) @ params["out"]["kernel"]


def trained(method, targets=TARGETS, seed=0, **kwargs):
    """An adapter after some steps, on the base."""
    axes = {p: r for p, r in AXES.items() if set(p.split("|")) & set(targets)}
    run = lambda params, key: jp.attach(
        params, method, targets, key=key, axes=axes, **kwargs
    )
    return perturb(jax.jit(run)(base(), jax.random.key(seed)), seed=seed)


def adapters():
    """Ranks, scales, sites, and layers of unequal ranks: all that may differ."""
    return {
        "small": trained(jp.lora(1, alpha=2), ["up", "heads"], seed=1),
        "large": trained(jp.lora(4), seed=2),
        "root": trained(jp.rslora(2, alpha=4), seed=3),
        "layers": trained(
            jp.lora(2), ["up", "down"], 4, rank_pattern={"up": [1, 3, 2]}
        ),
    }


def filled(how=None, capacity=5, rank=4, **trees):
    slots = serving.slots(
        base(), TARGETS, capacity=capacity, rank=rank, axes=AXES, how=how
    )
    for name, tree in (trees or adapters()).items():
        slots = serving.load(slots, name, tree)
    return slots


def chosen(slots, names):
    return serving.with_rows(slots.tree, serving.rows(slots, names))
