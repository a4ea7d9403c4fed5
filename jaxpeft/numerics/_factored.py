"""Norms of ``W + a b`` along one axis, without ever forming it.

With Gram matrices the square norms of all out features (or of all in features) cost
two thin matmuls: only ``[r, d_out]`` and ``[d_in, r]`` arrays are made. Where ``a b``
takes away most of a feature of ``W``, what is left drowns in the rounding of what
cancelled: such features, if there are any, are formed, one at a time.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxpeft.numerics._norm import safe_sqrt

_HIGHEST = "highest"


def square_norms(
    kernel: Float[Array, "d_in d_out"],
    axis: Literal["out", "in"],
    weight: Float[Array, " n"] | None = None,
) -> Float[Array, " m"]:
    r"""Returns the weighted square norms of a kernel's features.

    .. math:: n_j^2 = \sum_i f_i W_{ij}^2 \ \text{(out)}, \qquad
              n_i^2 = \sum_j f_j W_{ij}^2 \ \text{(in)}

    A reduction: ``W^2`` is made neither here nor in the backward pass, which squares
    again instead of keeping the squares.

    Args:
        kernel: W, of any floating dtype; constant for differentiation.
        axis: "out" for one number per out feature (a sum over the in axis), "in" for
            one per in feature.
        weight: f, of the summed axis's length; ``None`` means ones.

    Returns:
        ``[d_out]`` or ``[d_in]``, float32 (float64 over float64).

    Example:
        >>> square_norms(jnp.array([[1.0, 2.0], [3.0, 0.0]]), "out")
        Array([10.,  4.], dtype=float32)
    """
    summed = {"out": 0, "in": 1}[axis]
    wide = kernel.dtype if kernel.dtype.itemsize > 4 else jnp.float32
    kernel = lax.stop_gradient(kernel)
    if weight is None:
        return jnp.sum(jnp.square(kernel.astype(wide)), summed)

    # Under `checkpoint` the squares are made again for the backward pass; kept, they
    # would be one more array of the kernel's size.
    @jax.checkpoint
    def reduce(weight):
        spread = jnp.expand_dims(weight.astype(wide), 1 - summed)
        return jnp.sum(jnp.square(kernel.astype(wide)) * spread, summed)

    return reduce(weight)


def factored_square_norms(
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in r"],
    b: Float[Array, "r d_out"],
    axis: Literal["out", "in"],
    base: Float[Array, " m"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 0.0,
) -> Float[Array, " m"]:
    r"""Returns the weighted square norms of the features of ``W + a b``.

    .. math:: n_j^2 = \sum_i f_i W_{ij}^2 + 2 (W^T F a\, b)_{jj}
              + (b^T a^T F a\, b)_{jj}, \qquad F = \mathrm{diag}(f)

    for the out features; for the in features the same of the transposes. How well this
    is known depends on how much cancels. With what is added up,

    .. math:: M_j = \sum_i f_i W_{ij}^2 + \sum_k (a^T F a)_{kk} b_{kj}^2

    and p the precision of its products (5e-7 over float32, 2e-4 over bfloat16, 1e-15
    over float64), the error of the sum is below :math:`p M_j`. Features with
    :math:`n_j^2 < \sqrt p\, M_j` are therefore formed, one after another, and their
    squares added up; in a step without any this costs a comparison. So the relative
    error of a norm :math:`n_j` is at most the larger of :math:`\sqrt p / 2` (4e-4 over
    float32) and :math:`2 u \sqrt{M_j} / n_j`, u = 1.2e-7 being float32's step. Norms
    are clamped at :math:`\max(\epsilon, 8 u) \sqrt{M_j}`, where rounding would be a
    quarter of them; no gradient flows through a clamped one. The result is 0 where W
    and a b both are, and only there.

    Args:
        kernel: W, of any floating dtype; constant for differentiation.
        a: the down-projection, with any scale inside ``a`` or ``b``.
        b: the up-projection.
        axis: "out" for one number per out feature, "in" for one per in feature.
        base: ``square_norms(kernel, axis, weight)``.
        weight: f, of the summed axis's length; ``None`` means ones.
        eps: least norm over :math:`\sqrt{M_j}`, at least 0.

    Returns:
        ``[d_out]`` or ``[d_in]``, float32 (float64 over float64). Differentiable in
        reverse mode, and in forward mode over that.

    Example:
        >>> w, a, b = jnp.eye(2), jnp.ones((2, 1)), jnp.array([[1.0, 0.0]])
        >>> factored_square_norms(w, a, b, "out", square_norms(w, "out"))
        Array([5., 1.], dtype=float32)
    """
    kernel = lax.stop_gradient(kernel)
    if axis == "in":  # the out features of the transpose
        a, b = b.T, a.T

    left = a if weight is None else a * weight[:, None]
    cross = _thin_product(left, kernel, 0 if axis == "out" else 1)
    gram = jnp.matmul(left.T, a, precision=_HIGHEST)
    own = jnp.sum(jnp.matmul(gram, b, precision=_HIGHEST) * b, 0)
    squares = base + 2 * jnp.sum(cross * b, 0) + own

    size = lax.stop_gradient(base + jnp.sum(jnp.diagonal(gram)[:, None] * b**2, 0))
    precise, step = _precision(kernel.dtype, squares.dtype)
    cancelled = lax.stop_gradient(squares) < precise**0.5 * size
    formed = _formed_square_norms(axis, kernel, a, b, weight, cancelled)
    squares = jnp.where(cancelled, formed, squares)
    least = max(eps, 8 * step) ** 2 * size
    return jnp.where(squares < least, least, squares)  # NaN stays NaN


def _precision(kernel: jnp.dtype, dtype: jnp.dtype) -> tuple[float, float]:
    """How well Gram matrices give square norms, and the step of their dtype."""
    step = float(jnp.finfo(dtype).eps)
    narrow = float(jnp.finfo(kernel).eps) ** 2  # two parts of `_narrow_product`
    return 4 * max(step, narrow if kernel.itemsize < dtype.itemsize else 0), step


def _each_feature(chosen, start, add):
    """``add(carry, its place)`` for each of the chosen features, one after another.

    As many steps as features are chosen, none without; also under `vmap`, where a
    `cond` would compute both branches.
    """
    places = jnp.arange(len(chosen), dtype=jnp.int32)

    def after(place):
        more = chosen & (places > place)
        return jnp.min(jnp.where(more, places, len(chosen)))

    body = lambda state: (after(state[0]), add(state[1], places == state[0]))
    return lax.while_loop(
        lambda state: state[0] < len(chosen), body, (after(-1), start)
    )[1]


def _one(x, here, axis: int):
    """``x`` at the one place of an axis where ``here`` is true.

    A sum of one number and zeros, exact in any dtype. A slice or a gather would have
    compilers lay the whole kernel out anew, and gather it where it is sharded; a
    selection in place of the product would have the CPU's write it out.
    """
    there = jnp.expand_dims(here, tuple(i for i in range(x.ndim) if i != axis))
    x = x * there.astype(x.dtype)
    return lax.reduce(x, np.zeros((), x.dtype), lax.add, (axis,))


def _feature(axis, kernel, a, b, here):
    """A feature of W + a b, ``[n]``, and its column of b.

    Pair by pair is added to W's: what takes W away does so first, on every device,
    and nothing of W's size is rounded afterwards.
    """
    up = _one(b, here, 1)
    base = _one(kernel, here, 1 if axis == "out" else 0).astype(a.dtype)
    add = lambda v, pair: (v + pair[0] * pair[1], None)
    return lax.scan(add, base, (a.T, up))[0], up


def _weighted(x, weight):
    return x if weight is None else x * weight


def _formed(axis, kernel, a, b, weight, chosen):
    def add(found, here):
        v, _ = _feature(axis, kernel, a, b, here)
        return jnp.where(here, jnp.sum(_weighted(v * v, weight)), found)

    return _each_feature(chosen, jnp.zeros(chosen.shape, a.dtype), add)


def _formed_forward(axis, kernel, a, b, weight, chosen):
    inputs = kernel, a, b, weight, chosen
    return _formed(axis, *inputs), inputs


def _formed_backward(axis, inputs, g):
    kernel, a, b, weight, chosen = inputs

    def add(carry, here):
        to_a, to_b, to_weight = carry
        v, up = _feature(axis, kernel, a, b, here)
        own = _one(g, here, 0)
        to_v = 2 * _weighted(v, weight) * own
        to_up = jnp.sum(a * to_v[:, None], 0)[:, None]
        if weight is not None:
            to_weight = to_weight + v * v * own
        return to_a + to_v[:, None] * up[None], jnp.where(here, to_up, to_b), to_weight

    start = jax.tree.map(jnp.zeros_like, (a, b, weight))
    return None, *_each_feature(chosen, start, add), None


# Square norms of the chosen features, 0 for the others. A loop of unknown length has no
# derivative of its own.
_formed_square_norms = jax.custom_vjp(_formed, nondiff_argnums=(0,))
_formed_square_norms.defvjp(_formed_forward, _formed_backward)


def _thin_product(x, kernel, axis: int):
    """``x [n, r]`` summed with one axis of a kernel: ``[r, the other axis]``.

    A kernel of a narrow dtype stays as it is; ``x`` is cut into two parts of that
    dtype instead, whose products add up in float32 to some 16 bits.
    """
    if kernel.dtype.itemsize >= x.dtype.itemsize:
        return _contract(x, kernel, axis, x.dtype)
    return _narrow_product(axis, x, kernel)


def _contract(x, kernel, axis, dtype):
    return lax.dot_general(
        x.astype(kernel.dtype),
        kernel,
        (((0,), (axis,)), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=dtype,
    )


def _in_two(x, kernel, axis):
    high = x.astype(kernel.dtype)
    low = (x - high.astype(x.dtype)).astype(kernel.dtype)
    parts = _contract(jnp.concatenate([high, low], 1), kernel, axis, x.dtype)
    # The kernel is read once; what is kept is the sum, and not both of its parts.
    return lax.optimization_barrier(parts[: x.shape[1]] + parts[x.shape[1] :])


def _narrow_forward(axis, x, kernel):
    return _in_two(x, kernel, axis), kernel


def _narrow_backward(axis, kernel, g):
    return _in_two(g.T, kernel, 1 - axis).T, None


# Its own gradient: that of the cuts would round the cotangent, or widen the kernel.
_narrow_product = jax.custom_vjp(
    lambda axis, x, kernel: _in_two(x, kernel, axis), nondiff_argnums=(0,)
)
_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def magnitude_ratio(
    magnitude: Float[Array, " n"],
    squares: Float[Array, " n"],
    live: Array,
) -> Float[Array, " n"]:
    r"""Returns magnitudes over norms, 1 for features that are not alive.

    .. math:: m / \sqrt{n^2}

    Args:
        magnitude: m, any sign.
        squares: square norms ``n^2``, at least 0.
        live: booleans; where False, or where the norm is 0, the result is 1 and no
            gradient flows.

    Returns:
        The factors, finite wherever ``m`` is.

    Example:
        >>> m, live = jnp.array([3.0, 3.0]), jnp.array([True, False])
        >>> magnitude_ratio(m, jnp.array([4.0, 0.0]), live)
        Array([1.5, 1. ], dtype=float32)
    """
    live = live & (squares != 0)
    norms = jnp.sqrt(jnp.where(live, squares, jnp.ones_like(squares)))
    return jnp.where(live, magnitude / norms, jnp.ones_like(magnitude))


def live_features(norms: Float[Array, " n"]) -> Array:
    """Returns which features have a norm to speak of.

    Args:
        norms: one norm per feature of an axis.

    Returns:
        Booleans: False where the norm is at most 1e-6 of the root mean square of all
        of them, such as pruned or padded features.

    Example:
        >>> live_features(jnp.array([1.0, 0.0, 2.0]))
        Array([ True, False,  True], dtype=bool)
    """
    typical = safe_sqrt(jnp.mean(norms * norms))
    return norms > 1e-6 * typical
