"""What the tests of ``adapt`` share: adapters, one comparison, a search in the HLO.

The adapters here are not methods of any paper. Each puts a chosen set of terms of
the formula of ``jaxpeft.tree.Factors`` to work, so that a rule of ``adapt`` that
forgets one of them gives wrong numbers.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxpeft as jp
from benchmarks.hlo import made_of_shape
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where, method


def numbers(*shape, seed=0, scale=1.0):
    """Normal draws from NumPy: data without compiling a generator for each shape."""
    return jnp.asarray(
        scale * np.random.default_rng(seed).normal(size=shape), jnp.float32
    )


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


def perturb(adapted, seed=2, scale=0.3):
    """Moves every trainable leaf at random: at init b = 0 hides half of the rules."""
    rng = np.random.default_rng(seed)
    trainable, frozen = jp.partition(adapted)
    move = lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype)
    return jp.combine(jax.tree.map(move, trainable), frozen)


def prepare(params, adapter, targets, keys, axes=None, **kwargs):
    """Attaches, in one compiled call (faster than op by op), and perturbs."""
    run = lambda params, key: jp.attach(
        params, adapter, targets, key=key, axes=axes, **kwargs
    )
    return perturb(jax.jit(run)(params, next(keys)))


def distance(x, y) -> float:
    """The largest difference of two trees, over the largest entry of the second."""
    xs, ys = jax.tree.leaves(x), jax.tree.leaves(y)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(xs, ys, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.aval, b.aval)
    xs, ys = ([np.asarray(a, np.float64) for a in t] for t in (xs, ys))
    top = max((np.abs(b).max() for b in ys if b.size), default=0.0)
    # NumPy's, so that a NaN in any leaf is a NaN here, which is neither near nor far.
    gap = np.max(
        [np.abs(a - b).max() for a, b in zip(xs, ys, strict=True) if a.size] + [0]
    )
    return float(gap / max(top, 1e-30))


# Float32 through at most three layers of width < 50: the largest distance seen over
# the whole suite is 2e-6. Forgetting any term of the formula moves results by > 1e-2.
CLOSE = 2e-5
FAR = 1e-2


def cotangent(x):
    """Fixed values without structure, so that nothing cancels."""
    return (
        jnp.cos(1.7 * jnp.arange(x.size, dtype=jnp.float32))
        .reshape(x.shape)
        .astype(x.dtype)
    )


def run_with_gradients(call: Callable, adapted, inputs: Sequence):
    """Result and gradients, for the trainable leaves and the floating inputs.

    Args:
        call: ``call(adapted, *inputs)``.
        adapted: an adapted tree.
        inputs: arrays.

    Returns:
        ``(result, (gradient of trainable, gradients of the floating inputs), text)``;
        the text is the optimised HLO of all that.
    """
    trainable, frozen = jp.partition(adapted)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in inputs]

    @jax.jit
    def run(trainable, frozen, inputs):
        def of(trainable, moving):
            moving = iter(moving)
            full = [
                next(moving) if f else x for x, f in zip(inputs, floating, strict=True)
            ]
            return call(jp.combine(trainable, frozen), *full)

        moving = [x for x, f in zip(inputs, floating, strict=True) if f]
        result, pull = jax.vjp(of, trainable, moving)
        return result, pull(jax.tree.map(cotangent, result))

    arguments = trainable, frozen, list(inputs)
    compiled = run.lower(*arguments).compile()
    return *compiled(*arguments), compiled.as_text()


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


# One instruction of an HLO text: "%name = f32[2,3]{1,0} opcode(operands...".
def kernel_shapes(adapted, halves: int = 1) -> set[tuple[int, ...]]:
    """Every form a kernel could take as a temporary: whole, one layer, flattened.

    Axes of length one are left out and the rest are sorted, so that a transpose or
    an added axis does not hide it.

    Args:
        adapted: an adapted tree.
        halves: number of devices that one axis may be divided over.

    Returns:
        Sorted shapes; a kernel of one row or column has none, as its factors are
        as large.
    """
    shapes = set()
    nodes = jax.tree.leaves(
        adapted, is_leaf=lambda x: isinstance(x, jp.tree.AdaptedKernel)
    )
    for node in nodes:
        if not isinstance(node, jp.tree.AdaptedKernel):
            continue
        sizes = list(zip(node.site.roles, node.base.shape, strict=True))
        batch = [n for role, n in sizes if role == "batch"]
        matrix = [n for role, n in sizes if role != "batch"]
        flat = [
            int(np.prod([n for role, n in sizes if role == kind]))
            for kind in ("in", "out")
        ]
        for core in (matrix, flat):
            for i, stack in itertools.product(range(len(core)), (batch, [])):
                cut = [*core[:i], core[i] // halves, *core[i + 1 :]]
                for whole in (core, cut):
                    shapes.add(tuple(sorted(n for n in (*stack, *whole) if n > 1)))
    return {shape for shape in shapes if len(shape) > 1}
