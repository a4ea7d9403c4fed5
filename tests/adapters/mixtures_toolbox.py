"""A mixture written out token by token and expert by expert, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from adapt_toolbox import numbers, perturb

import jaxpeft as jp

TWO = ("law", "code")


def softmax(l):
    e = np.exp(l - l.max())
    return e / e.sum()


def gates_of(logits, top_k=None):
    """Softmax, the largest kept (the first of equal ones), divided by their sum."""
    g = softmax(logits)
    if top_k is not None:
        keep = sorted(range(len(g)), key=lambda k: (-g[k], k))[:top_k]
        g = np.array([v if k in keep else 0.0 for k, v in enumerate(g)])
    return g / g.sum()


def alike(x, kernel, leaves, top_k=None):
    """Experts of one site that are alike: ``x [T, d_in]`` to ``[T, d_out]``."""
    a, b, router = (np.asarray(leaves[n], np.float64) for n in ("a", "b", "router"))
    scale, rows = float(leaves["scale"]), []
    for token in np.asarray(x, np.float64):
        y = token @ np.asarray(kernel, np.float64)
        for k, g in enumerate(gates_of(token @ router, top_k)):
            down = a if a.ndim == 2 else a[k]
            y = y + g * scale * (token @ down) @ b[k]
        rows.append(y)
    return np.stack(rows)


def domains(x, kernel, leaves, names, residual, gates=None, slope=0.01):
    """MoDULA at one site; ``gates`` fixed, or those of the router."""
    leaves = {n: np.asarray(v, np.float64) for n, v in leaves.items()}
    scale = leaves.get("scale", 1.0)
    leaky = lambda v: np.where(v >= 0, v, slope * v)
    routed = names if residual else ("universal", *names)
    rows = []
    for token in np.asarray(x, np.float64):
        h = leaves.get("scale_universal", 1.0) * (
            token @ leaves["a.universal"] @ leaves["b.universal"]
        )
        router = np.concatenate([leaves[f"router.{n}"] for n in routed], 1)
        g = gates_of(token @ router) if gates is None else np.asarray(gates)
        y = token @ np.asarray(kernel, np.float64)
        y = y + h if residual else y
        for name, weight in zip(routed, g, strict=True):
            if name == "universal":
                y = y + weight * h
                continue
            a, b = leaves[f"a.{name}"], leaves[f"b.{name}"]
            inner = leaky(h @ a) if residual else token @ a
            y = y + weight * scale * inner @ b
        rows.append(y)
    return np.stack(rows)


def leaves_of(node):
    return {**node.frozen, **node.trainable}


def one(adapter, kernel, key=0, **leaves):
    """One adapted kernel, ``w``; leaves given replace those that were drawn."""
    with jax.disable_jit():
        adapted = jp.attach({"w": kernel}, adapter, ["w"], key=jax.random.key(key))
    node = adapted["w"]
    part = lambda own: {
        n: jnp.asarray(leaves.get(n, x), x.dtype) for n, x in own.items()
    }
    return {"w": node.replace(frozen=part(node.frozen), trainable=part(node.trainable))}


def use(p, x):
    return x @ p["w"]


adapted_use = jp.adapt(use)


def stirred(adapter, d_in=5, d_out=7, dtype=jnp.float32):
    """A site of numbers whose experts and router have left where they start."""
    kernel = numbers(d_in, d_out, seed=3).astype(dtype)
    return perturb(one(adapter, kernel), scale=0.7)
