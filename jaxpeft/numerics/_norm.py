"""Frobenius norms and distances to orthonormality, differentiable everywhere."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def safe_sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the square root of ``x >= 0``, with derivative 0 where ``x`` is 0.

    Both branches are guarded: with one ``where`` alone the derivative at 0 is
    ``0 * inf``. Nothing is added inside the root, so the values are the root's own.

    Args:
        x: non-negative numbers of any shape.

    Returns:
        The roots, in the shape and dtype of ``x``.

    Example:
        >>> import jax
        >>> float(jax.grad(safe_sqrt)(0.0))
        0.0
    """
    zero = x == 0  # not `x > 0`, which would turn NaN into 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def frobenius_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the root of the sum of squares; its gradient at 0 is 0.

    Args:
        x: numbers of any shape, an empty array included.

    Returns:
        A scalar of the dtype of ``x``.

    Example:
        >>> float(frobenius_norm(jnp.array([[3.0, 4.0]])))
        5.0
    """
    return safe_sqrt(jnp.sum(x * x))


def _gram_residue(a: Float[Array, "n r"]) -> Float[Array, ""]:
    """``||a^T a - I_r||_F^2``, from an ``[r, r]`` matrix."""
    gram = jnp.matmul(a.T, a, precision="highest")
    residue = gram - jnp.eye(a.shape[1], dtype=a.dtype)
    return jnp.sum(residue * residue)


def gram_distance(a: Float[Array, "n r"]) -> Float[Array, ""]:
    r"""Returns how far the columns of ``a`` are from orthonormal.

    .. math:: \lVert a^T a - I_r \rVert_F

    Args:
        a: ``[n, r]``, any real numbers; differentiable also where the columns are
            exactly orthonormal (value 0, gradient 0).

    Returns:
        A scalar of the dtype of ``a``.

    Example:
        >>> float(gram_distance(jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.5]])))
        0.75
    """
    return safe_sqrt(_gram_residue(a))


def outer_gram_distance(a: Float[Array, "n r"]) -> Float[Array, ""]:
    r"""Returns the same distance taken on the other, larger Gram matrix.

    .. math:: \lVert a a^T - I_n \rVert_F
              = \sqrt{\lVert a^T a - I_r \rVert_F^2 + n - r}

    The identity is exact (both Grams have the same non-zero eigenvalues; the larger
    has ``n - r`` more zeros), so the ``[n, n]`` matrix is never formed.

    Args:
        a: ``[n, r]`` with ``r <= n``.

    Returns:
        A scalar of the dtype of ``a``, never below ``sqrt(n - r)``.

    Raises:
        ValueError: ``r > n``.

    Example:
        >>> round(float(outer_gram_distance(jnp.eye(6)[:, :2])), 6)
        2.0
    """
    n, r = a.shape
    if r > n:
        raise ValueError(
            f"`a` must have at least as many rows as columns, got {[n, r]}; "
            "for a matrix with orthonormal rows write outer_gram_distance(a.T)."
        )
    return safe_sqrt(_gram_residue(a) + (n - r))
