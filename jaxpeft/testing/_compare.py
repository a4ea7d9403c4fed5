"""How the contract suite compares: draws, distances, gradients, shapes of kernels."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxpeft.tree import AdaptedKernel, combine, partition


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Returns normal draws in float32, from NumPy: no generator is compiled for them.

    Args:
        *shape: sizes of the axes.
        seed: of the draws; two arrays of one seed are not independent.
        scale: their standard deviation.

    Returns:
        ``[*shape]``.

    Example:
        >>> numbers(2, 3, seed=1).shape
        (2, 3)
    """
    return jnp.asarray(
        scale * np.random.default_rng(seed).normal(size=shape), jnp.float32
    )


def perturb(adapted: PyTree, seed: int = 2, scale: float = 0.3) -> PyTree:
    """Moves every trainable leaf at random: at init b = 0 hides half of the rules.

    Args:
        adapted: an adapted tree.
        seed: of the draws.
        scale: their standard deviation.

    Returns:
        The tree; its base and its frozen leaves are the same arrays.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((6, 4))}}, jax.random.key(0)
        >>> adapted = perturb(jp.attach(params, jp.lora(2), ["query"], key=key))
        >>> bool(jnp.any(jp.merge(adapted)["query"]["kernel"] != 1))
        True
    """
    rng = np.random.default_rng(seed)
    trainable, frozen = partition(adapted)
    move = lambda x: jnp.asarray(x + scale * rng.normal(size=x.shape), x.dtype)
    return combine(jax.tree.map(move, trainable), frozen)


# Float32 through at most three layers of width < 50: the largest distance seen over
# the whole suite is 2e-6. Forgetting any term of the formula moves results by > 1e-2.
CLOSE = 2e-5
FAR = 1e-2


def distance(x: PyTree, y: PyTree) -> float:
    """Returns the largest difference of two trees over the second's largest entry.

    Args:
        x: a tree of arrays.
        y: one of the same structure, shapes and dtypes.

    Returns:
        0 where they are equal. NaN where a leaf has a NaN: that is neither below
        ``CLOSE`` nor above ``FAR``.

    Raises:
        AssertionError: structures, shapes or dtypes differ.

    Example:
        >>> distance({"a": jnp.ones(3)}, {"a": jnp.full(3, 2.0)})
        0.5
    """
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


def cotangent(x: Array) -> Array:
    """Returns what is pulled back: fixed values without structure, so nothing cancels.

    Args:
        x: an array, of which the shape and the dtype count.

    Returns:
        An array like it, with entries from -1 to 1.

    Example:
        >>> cotangent(jnp.zeros(2))
        Array([ 1.        , -0.12884454], dtype=float32)
    """
    return (
        jnp.cos(1.7 * jnp.arange(x.size, dtype=jnp.float32))
        .reshape(x.shape)
        .astype(x.dtype)
    )


def run_with_gradients(call: Callable, adapted, inputs: Sequence):
    """Returns a result and gradients, of the trainable leaves and floating inputs.

    Args:
        call: ``call(adapted, *inputs)``.
        adapted: an adapted tree.
        inputs: arrays.

    Returns:
        ``(result, (gradient of trainable, gradients of the floating inputs), text)``;
        the text is the optimised HLO of all that.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((6, 4))}}, jax.random.key(0)
        >>> adapted = jp.attach(params, jp.lora(2), ["query"], key=key)
        >>> call = jp.adapt(lambda params, x: x @ params["query"]["kernel"])
        >>> x = jnp.ones((3, 6))
        >>> y, (leaves, inputs), text = run_with_gradients(call, adapted, [x])
        >>> y.shape, inputs[0].shape, jp.tree.flat(leaves)["query/kernel/b"].shape
        ((3, 4), (3, 6), (2, 4))
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
    """Returns each form a kernel could take as a temporary: whole, a layer, flattened.

    Axes of length one are left out and the rest are sorted, so that a transpose or
    an added axis does not hide it.

    Args:
        adapted: an adapted tree.
        halves: number of devices that one axis may be divided over.

    Returns:
        Sorted shapes; a kernel of one row or column has none, as its factors are
        as large.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((6, 4))}}, jax.random.key(0)
        >>> kernel_shapes(jp.attach(params, jp.lora(2), ["query"], key=key))
        {(4, 6)}
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
