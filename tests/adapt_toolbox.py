"""What the tests of ``adapt`` share: adapters, one comparison, what it is made of.

The adapters here are not methods of any paper. Each puts a chosen set of terms of
the formula of ``jaxpeft.tree.Factors`` to work, so that a rule of ``adapt`` that
forgets one of them gives wrong numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxpeft as jp
from jaxpeft.testing import CLOSE as CLOSE
from jaxpeft.testing import FAR as FAR
from jaxpeft.testing import cotangent as cotangent
from jaxpeft.testing import distance as distance
from jaxpeft.testing import kernel_shapes as kernel_shapes
from jaxpeft.testing import made_of_shape as made_of_shape
from jaxpeft.testing import numbers as numbers
from jaxpeft.testing import perturb as perturb
from jaxpeft.testing import run_with_gradients as run_with_gradients
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where, method


def fill(shapes, seed=1):
    """Gives every leaf of a tree of shapes its draws, scaled as a kernel's would be."""
    rng = np.random.default_rng(seed)

    def draw(x):
        fan = max(x.shape[-2], 4) if x.ndim >= 2 else 4
        return jnp.asarray(rng.normal(size=x.shape) * fan**-0.5, x.dtype)

    return jax.tree.map(draw, shapes)


def pieces(key, *shapes):
    """Normal draws of several shapes from one call of the generator."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = jax.random.normal(key, (sum(sizes),), jnp.float32)
    ends = np.cumsum(sizes)
    return [
        flat[end - size : end].reshape(shape) / max(shape[0], 4) ** 0.5
        for end, size, shape in zip(ends, sizes, shapes, strict=True)
    ]


@method
def pair(rank: int = 3, alpha: float = 3.0, dropout: float = 0.0) -> Adapter:
    """``a`` and ``b`` alone."""

    def init(key, kernel, rank, alpha):
        (a,) = pieces(key, (kernel.shape[0], rank))
        b = jnp.zeros((rank, kernel.shape[1]))
        return {"scale": jnp.float32(alpha / rank)}, {"a": a, "b": b}

    def factors(kernel, frozen, trainable, call):
        b = frozen["scale"] * trainable["b"]
        return Factors((Term(trainable["a"], b, drop=dropout),))

    return Adapter(init, factors, where=Where(rank=rank, alpha=alpha))


@method
def everything(rank: int = 3, alpha: float = 3.0, dropout: float = 0.0) -> Adapter:
    """``a``, ``b``, ``c``, ``o`` and a fixed pair of another width than the rank."""

    def init(key, kernel, rank, alpha):
        d_in, d_out = kernel.shape
        a, p, q = pieces(key, (d_in, rank), (d_in, 2), (2, d_out))
        frozen = {"scale": jnp.float32(alpha / rank), "p": p, "q": q}
        b, c, o = jnp.zeros((rank, d_out)), jnp.ones(d_in), jnp.ones(d_out)
        trainable = {"a": a, "b": b, "c": c, "o": o}
        return frozen, trainable

    def factors(kernel, frozen, trainable, call):
        b = frozen["scale"] * trainable["b"]
        terms = Term(trainable["a"], b, drop=dropout), Term(frozen["p"], frozen["q"])
        return Factors(terms, c=trainable["c"], o=trainable["o"])

    return Adapter(init, factors, where=Where(rank=rank, alpha=alpha))


@method
def output_scale() -> Adapter:
    """``o`` alone."""
    return Adapter(
        init=lambda key, kernel, rank, alpha: ({}, {"o": jnp.ones(kernel.shape[1])}),
        factors=lambda kernel, frozen, trainable, call: Factors(o=trainable["o"]),
    )


@method
def input_scale() -> Adapter:
    """``c`` alone."""
    return Adapter(
        init=lambda key, kernel, rank, alpha: ({}, {"c": jnp.ones(kernel.shape[0])}),
        factors=lambda kernel, frozen, trainable, call: Factors(c=trainable["c"]),
    )


@method
def gated(rank: int = 3) -> Adapter:
    """A gate that looks at both of its arguments; it has no merged form."""

    def init(key, kernel, rank, alpha):
        d_in, d_out = kernel.shape
        a, b, router = pieces(key, (d_in, rank), (rank, d_out), (d_in, rank))
        trainable = {"a": a, "b": b, "router": router}
        return {}, trainable

    def factors(kernel, frozen, trainable, call):
        between = Gate(trainable["router"], Partial(gate))
        return Factors((Term(trainable["a"], trainable["b"], gate=between),))

    return Adapter(init, factors, where=Where(rank=rank))


def gate(seen, h):
    """What acts in ``gated``: a sigmoid gate on each rank component."""
    assert seen.shape == h.shape
    return h * jax.nn.sigmoid(seen)


def change(f) -> jax.Array:
    """The sum of the terms of one kernel's factors, as a dense matrix."""
    return sum(term.a @ term.b for term in f.terms)


def prepare(params, adapter, targets, keys, axes=None, **kwargs):
    """Attaches, in one compiled call (faster than op by op), and perturbs."""
    run = lambda params, key: jp.attach(
        params, adapter, targets, key=key, axes=axes, **kwargs
    )
    return perturb(jax.jit(run)(params, next(keys)))


def check(
    fn: Callable,
    params,
    *inputs,
    sites,
    keys,
    adapter=None,
    inferred=None,
    close=CLOSE,
    far=FAR,
    allow=(),
    halves=1,
    **kwargs,
):
    """``adapt(fn)`` on an adapted tree equals ``fn`` on the merged one.

    Values, gradients of the trainable leaves (through ``merge`` on the other side)
    and gradients of the floating inputs. No array of a kernel's shape is computed on
    the way, forward or backward. As controls: the result differs from the base
    model's, every trainable leaf gets a gradient, and the search for arrays of a
    kernel's shape finds some where the tree is merged.

    Args:
        fn: ``fn(params, *inputs)``, no adapter in mind.
        params: its parameters.
        *inputs: arrays.
        sites: ``{path of a kernel: roles of its axes}``; all of them are adapted.
        keys: source of keys.
        adapter: the adapter; ``everything()`` by default.
        inferred: what ``infer_axes`` must find; ``sites`` by default.
        close: tolerance for what must agree.
        far: least distance of what must differ.
        allow: opcodes that the model itself uses on its kernel (``w * 2.0``). Axis
            products of kernels must not equal those of activations.
        halves: number of devices that an axis of a kernel may be divided over.
        **kwargs: for ``adapt``.

    Returns:
        The adapted tree, for more tests on it.
    """
    found = jp.infer_axes(fn, params, *inputs)
    assert {path: found.get(path) for path in sites} == (inferred or sites), found
    adapter = adapter or everything()
    adapted = prepare(params, adapter, list(sites), keys, axes=sites)
    got, got_grads, text = run_with_gradients(jp.adapt(fn, **kwargs), adapted, inputs)
    merged = lambda tree, *inputs: fn(jp.merge(tree), *inputs)
    expected, expected_grads, merged_text = run_with_gradients(merged, adapted, inputs)
    assert distance(got, expected) < close
    assert distance(got_grads, expected_grads) < close
    assert distance(fn(params, *inputs), expected) > far, "the adapter did nothing"
    for path, gradient in jax.tree_util.tree_leaves_with_path(got_grads[0]):
        assert np.any(np.asarray(gradient) != 0), f"{path} never learns"
    shapes = kernel_shapes(adapted, halves)
    formed = [x for x in made_of_shape(text, shapes) if x.split("[")[0] not in allow]
    assert not formed, f"arrays of a kernel's shape {shapes}: {formed}"
    found = made_of_shape(merged_text, shapes, inside=True)
    assert found or not shapes, "the search would not find a kernel"
    return adapted
