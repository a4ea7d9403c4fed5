"""How the contract suite compares: draws, distances, gradients, shapes of kernels."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree import AdaptedKernel, combine, partition


def numbers(*shape, seed=0, scale=1.0):
    """Normal draws from NumPy: data without compiling a generator for each shape."""
    return jnp.asarray(
        scale * np.random.default_rng(seed).normal(size=shape), jnp.float32
    )


def perturb(adapted, seed=2, scale=0.3):
    """Moves every trainable leaf at random: at init b = 0 hides half of the rules."""
    rng = np.random.default_rng(seed)
    trainable, frozen = partition(adapted)
    move = lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype)
    return combine(jax.tree.map(move, trainable), frozen)


# Float32 through at most three layers of width < 50: the largest distance seen over
# the whole suite is 2e-6. Forgetting any term of the formula moves results by > 1e-2.
CLOSE = 2e-5
FAR = 1e-2


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
    trainable, frozen = partition(adapted)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in inputs]

    @jax.jit
    def run(trainable, frozen, inputs):
        def of(trainable, moving):
            moving = iter(moving)
            full = [
                next(moving) if f else x for x, f in zip(inputs, floating, strict=True)
            ]
            return call(combine(trainable, frozen), *full)

        moving = [x for x, f in zip(inputs, floating, strict=True) if f]
        result, pull = jax.vjp(of, trainable, moving)
        return result, pull(jax.tree.map(cotangent, result))

    arguments = trainable, frozen, list(inputs)
    compiled = run.lower(*arguments).compile()
    return *compiled(*arguments), compiled.as_text()


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
    nodes = jax.tree.leaves(adapted, is_leaf=lambda x: isinstance(x, AdaptedKernel))
    for node in nodes:
        if not isinstance(node, AdaptedKernel):
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
