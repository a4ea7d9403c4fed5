"""Norms of ``W + a b`` along one axis, without ever forming it.

With Gram matrices the square norms of all out features (or of all in features) cost
two thin matmuls: only ``[r, d_out]`` and ``[d_in, r]`` arrays are made.
"""

from typing import Literal

import jax
import jax.numpy as jnp
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
) -> Float[Array, " m"]:
    r"""Returns the weighted square norms of the features of ``W + a b``.

    .. math:: n_j^2 = \sum_i f_i W_{ij}^2 + 2 (W^T F a\, b)_{jj}
              + (b^T a^T F a\, b)_{jj}, \qquad F = \mathrm{diag}(f)

    for the out features; for the in features the same of the transposes. In float32
    the sum may come out slightly negative where the terms cancel: clamp it before a
    root.

    Args:
        kernel: W, of any floating dtype; constant for differentiation.
        a: the down-projection, with any scale inside ``a`` or ``b``.
        b: the up-projection.
        axis: "out" for one number per out feature, "in" for one per in feature.
        base: ``square_norms(kernel, axis, weight)``.
        weight: f, of the summed axis's length; ``None`` means ones.

    Returns:
        ``[d_out]`` or ``[d_in]``, float32 (float64 over float64).

    Example:
        >>> w, a, b = jnp.eye(2), jnp.ones((2, 1)), jnp.array([[1.0, 0.0]])
        >>> factored_square_norms(w, a, b, "out", square_norms(w, "out"))
        Array([5., 1.], dtype=float32)
    """
    if axis == "in":  # the out features of the transpose
        a, b = b.T, a.T
    left = a if weight is None else a * weight[:, None]
    cross = _thin_product(left, lax.stop_gradient(kernel), 0 if axis == "out" else 1)
    gram = jnp.matmul(left.T, a, precision=_HIGHEST)
    own = jnp.sum(jnp.matmul(gram, b, precision=_HIGHEST) * b, 0)
    return base + 2 * jnp.sum(cross * b, 0) + own


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
    return sum(_contract(part, kernel, axis, x.dtype) for part in (high, low))


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
    eps: float,
) -> Float[Array, " n"]:
    r"""Returns magnitudes over norms, 1 for features that are not alive.

    .. math:: m / \sqrt{\max(n^2, \epsilon^2)}

    Args:
        magnitude: m, any sign.
        squares: square norms ``n^2``; may be slightly negative by cancellation.
        live: booleans; where False the result is 1 and no gradient flows.
        eps: clamp of the norm, > 0; no gradient flows through a clamped norm.

    Returns:
        The factors, finite wherever ``m`` is.

    Example:
        >>> m, live = jnp.array([3.0, 3.0]), jnp.array([True, False])
        >>> magnitude_ratio(m, jnp.array([4.0, 0.0]), live, 1e-8)
        Array([1.5, 1. ], dtype=float32)
    """
    clamped = jnp.maximum(squares, jnp.asarray(eps**2, squares.dtype))
    safe = jnp.where(live, clamped, jnp.ones_like(clamped))
    return jnp.where(live, magnitude / safe_sqrt(safe), jnp.ones_like(magnitude))


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
