"""A small net and what the contract suite does with it for each method."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.testing._compare import numbers, perturb
from jaxpeft.transform import adapt
from jaxpeft.tree import (
    AdaptedKernel,
    attach,
    combine,
    find_method,
    lifted_factors,
    penalty,
)

D, F, L = 16, 24, 2
KERNELS = ["dense", "heads", "up", "down"]
AXES = {
    "heads": "in out out",
    "layers/up": "layer in out",
    "layers/down": "layer in out",
}
RANK = 3  # a method's default may not fit kernels this small
# Options that must fit the net, and keep mixtures small: it has no numbered layers.
SMALL = {"rank": RANK, "experts": 3, "domains": ("one", "two"), "rank_universal": 4}
GIVEN: dict[str, Any] = {}  # options that the command was given, see `_plugin`


def layer(x, p):
    y = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None])
    return x + y @ p["down"]["kernel"] + p["down"]["bias"][None], None


def net(params, x, *, remat=False):
    """A plain kernel, one with heads, and a scanned stack with biases beside it."""
    y = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    y = jnp.einsum("td,dhe->the", jnp.tanh(y), params["heads"]["kernel"])
    y = y + params["heads"]["bias"][None]
    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    return lax.scan(body, y.reshape(x.shape[0], D), params["layers"])[0]


def unrolled(params, x):
    stack = params["layers"]
    layers = [stack[f"layer_{i}"] for i in range(L)]
    flat = {n: v for n, v in params.items() if n != "layers"}
    y = net(flat | {"layers": jax.tree.map(lambda w: w[None], layers[0])}, x)
    for p in layers[1:]:
        y, _ = layer(y, p)
    return y


def make_params(dtype=jnp.float32):
    weight = lambda seed, *s: {"kernel": numbers(*s, seed=seed, scale=s[-2] ** -0.5)}
    bias = lambda seed, *s: {"bias": numbers(*s, seed=seed)}
    tree = {
        "dense": weight(1, D, F) | bias(2, F),
        "heads": weight(3, F, 4, D // 4) | bias(6, 4, D // 4),
        "layers": {
            "up": weight(4, L, D, F) | bias(7, L, F),
            "down": weight(5, L, F, D) | bias(8, L, D),
        },
    }
    return jax.tree.map(lambda w: w.astype(dtype), tree)


def constructor(name):
    return find_method(name)


def options_of(name):
    return tuple(inspect.signature(constructor(name)).parameters)


def accepts(name, *options):
    return set(options) <= set(options_of(name))


def make(name, **options):
    """The method at its defaults, but for sizes that fit these small kernels."""
    small = {option: value for option, value in SMALL.items() if accepts(name, option)}
    return constructor(name)(**(small | GIVEN | options))


def starter(adapter, **kwargs):
    return jax.jit(lambda p, k: attach(p, adapter, KERNELS, key=k, axes=AXES, **kwargs))


_starter = functools.cache(starter)  # compiled once for all keys


def attached(params, name, key, adapter=None, **kwargs):
    once = starter if kwargs else _starter
    return once(adapter or make(name), **kwargs)(params, key)


@functools.cache
def at_init(name):
    return attached(make_params(), name, jax.random.key(11))


@functools.cache
def moved(name):
    return perturb(at_init(name), scale=0.1)


def in_float64(adapted, x):
    """The net on a tree that has no merged kernel to compare with, in float64.

    Such a method depends on the input: its own tests compare it with a loop over
    tokens and experts.
    """
    with jax.enable_x64(True):
        floating = lambda v: jnp.issubdtype(v.dtype, jnp.floating)
        wide = lambda v: v.astype("float64") if floating(v) else v
        tree, x = jax.tree.map(wide, (adapted, x))
        return adapt(net)(tree, x)


def loss(trainable, frozen, x, fn=net):
    adapted = combine(trainable, frozen)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = adapt(fn)(adapted, x).astype(wide)
    return jnp.mean(y**2) + penalty(adapted).astype(wide)


value_and_grad = jax.jit(jax.value_and_grad(loss))


def nodes(tree):
    is_node = lambda n: isinstance(n, AdaptedKernel)
    return [n for n in jax.tree.leaves(tree, is_leaf=is_node) if is_node(n)]


def node_in(tree, *modules):
    """The adapted leaf of a module: its kernel, for some methods its bias."""
    for module in modules:
        tree = tree[module]
    return max(nodes(tree), key=lambda node: len(node.site.roles))


def replaces_kernel(node):
    """Whether the method trains the kernel itself: then arrays of its shape exist."""
    return jax.eval_shape(lambda: lifted_factors(node)).kernel is not None


def same_bits(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
