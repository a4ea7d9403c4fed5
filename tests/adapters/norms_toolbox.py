"""Dense float64 forms of DoRA and BoRA, straight from their equations."""

import jax
import jax.numpy as jnp
import numpy as np
from adapt_toolbox import change

from jaxpeft.tree import Call

# The golden site: W, a, b, scale 2 and an upstream gradient G.
W = np.array([[1.0, 2, 2], [3, 0, 4]])
A, B, SCALE = np.array([[1.0], [-1]]), np.array([[0.5, 0, -0.5]]), 2.0
G = np.array([[1.0, 0, -1], [0, 2, 1]])
M_OUT, M_IN = np.array([3.0, 2, 5]), np.array([3.0, 6])


def made(adapter, w, **trainable):
    """``(frozen, trainable)`` of one kernel, some trained leaves given."""
    w = jnp.asarray(w)
    rank = trainable["a"].shape[1] if "a" in trainable else adapter.where.rank
    frozen, leaves = adapter.init(jax.random.key(3), w, rank, adapter.where.alpha)
    given = {name: jnp.asarray(x, w.dtype) for name, x in trainable.items()}
    assert set(given) <= set(leaves)
    return frozen, leaves | given


def merged(adapter, w, frozen, trainable):
    """``D_c (W + a b) D_o`` from the adapter's factors; dense, for tests alone."""
    f = adapter.factors(jnp.asarray(w), frozen, trainable, Call())
    v = w + change(f)
    if f.c is not None:
        v = f.c[:, None] * v
    return v if f.o is None else v * f.o[None, :]


def dense_dora(w, s, t, held=None):
    """DoRA's kernel; ``held`` holds the norms that are constants."""
    v = w + s * t["a"] @ t["b"]
    n = jnp.sqrt(jnp.sum(v**2, 0)) if held is None else held
    return v * (t["m_out"] / n)[None, :], n


def dense_bora(w, s, t, order, held=None):
    """BoRA's kernel and its two norms, in the order given."""
    v, norms = w + s * t["a"] @ t["b"], []
    for i, axis in enumerate(order):
        n = jnp.sqrt(jnp.sum(v**2, 0 if axis == "out" else 1))
        n = n if held is None else held[i]
        norms.append(n)
        ratio = t[f"m_{axis}"] / n
        v = v * (ratio[None, :] if axis == "out" else ratio[:, None])
    return v, norms
