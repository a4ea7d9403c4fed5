"""The smallest singular triplets of a matrix: exactly, or by a shortcut that says so.

Whichever way is taken, removing the triplets is exact: the result is the projection
of the matrix on ``count`` orthonormal directions, so ``||w - kept||_F^2 = sum(s^2)``
and ``kept`` has lost ``count`` of its rank. A shortcut only chooses slightly other
directions than the best.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Key

from jaxpeft.numerics._norm import frobenius_norm
from jaxpeft.numerics._svd import check_matrix, relative, svd

STEPS = 8  # of inverse iteration, and of the power iteration for the largest value
TOP_WIDTH = 8  # vectors in that power iteration


class Triplets(NamedTuple):
    """Some singular triplets of a matrix ``w``.

    Attributes:
        u: ``[d_in, m]``, orthonormal columns.
        s: ``[m]``, descending.
        vt: ``[m, d_out]``, orthonormal rows.
        top: scalar, the largest singular value of ``w``; an estimate from below for
            the method ``"inverse"`` (some 1 % on noise, exact where it stands out).
        residual: scalar. For ``"exact"`` the relative error of the whole
            decomposition; for the shortcuts ``||w^T u - v s||_F / ||w||_F`` (on the
            thin side), which is 0 for true singular vectors.
    """

    u: Float[Array, "d_in m"]
    s: Float[Array, " m"]
    vt: Float[Array, "m d_out"]
    top: Float[Array, ""]
    residual: Float[Array, ""]


def _mm(x, y):
    return jnp.matmul(x, y, precision="highest")


def _orthonormal(x):
    return jnp.linalg.qr(x)[0]


def _ritz(tall, basis, count, top):
    """Rayleigh-Ritz: the ``count`` smallest triplets of ``tall`` on a subspace."""
    q, r = jnp.linalg.qr(_mm(tall, basis))
    p, s, tt = jnp.linalg.svd(r, full_matrices=False)
    u, v = _mm(q, p[:, -count:]), _mm(basis, tt[-count:].T)
    s = s[-count:]
    off = frobenius_norm(_mm(tall.T, u) - v * s[None, :])
    return Triplets(u, s, v.T, top, relative(off, frobenius_norm(tall)))


def _exact(tall, count, key):
    del key
    u, s, vt, residual = svd(tall)
    return Triplets(u[:, -count:], s[-count:], vt[-count:], s[0], residual)


def _by_gram(tall, count, key):
    del key
    values, vectors = jnp.linalg.eigh(_mm(tall.T, tall))  # ascending
    top = jnp.sqrt(jnp.maximum(values[-1], 0.0))
    return _ritz(tall, vectors[:, :count], count, top)


def _triangle(tall):
    """``r`` with ``r^T r = tall^T tall`` and no zero on its diagonal."""
    lower = jnp.linalg.cholesky(_mm(tall.T, tall))
    # The Gram squares the condition number; where it is no longer positive definite
    # in this dtype, the slower QR, which does not square it, takes over.
    good = jnp.all(jnp.isfinite(lower))
    r = jax.lax.cond(good, lambda: lower.T, lambda: jnp.linalg.qr(tall)[1])
    diagonal = jnp.diagonal(r)
    largest = jnp.max(jnp.abs(r))
    tiny = jnp.where(largest > 0, jnp.finfo(r.dtype).eps * largest, 1.0)
    lifted = jnp.where(jnp.abs(diagonal) < tiny, tiny, diagonal)
    return r + jnp.diag(lifted - diagonal)


def _by_inverse(tall, count, key):
    k = tall.shape[1]
    key_bottom, key_top = jax.random.split(key)
    r = _triangle(tall)

    def inverse_step(v, _):  # v <- (tall^T tall)^-1 v
        v = _orthonormal(solve_triangular(r, v, trans="T"))
        return _orthonormal(solve_triangular(r, v)), None

    def power_step(v, _):
        v = _orthonormal(_mm(tall.T, _mm(tall, v)))
        return v, v

    def repeat(step, key, width):
        start = jax.random.normal(key, (k, min(k, width)), tall.dtype)
        return jax.lax.scan(step, _orthonormal(start), None, length=STEPS)

    basis, _ = repeat(inverse_step, key_bottom, 2 * count)
    _, powers = repeat(power_step, key_top, TOP_WIDTH)
    krylov = _orthonormal(jnp.moveaxis(powers, 0, 1).reshape(k, -1))
    top = jnp.linalg.svd(_mm(tall, krylov), compute_uv=False)[0]
    return _ritz(tall, basis, count, top)


WAYS = {"exact": _exact, "gram": _by_gram, "inverse": _by_inverse}


@partial(jax.jit, static_argnames=("count", "method"))
def _bottom(matrix, key, count, method):
    @jax.custom_batching.sequential_vmap  # one matrix of a stack at a time
    def run(matrix, key):
        d_in, d_out = matrix.shape
        with jax.default_matmul_precision("highest"):
            if d_in >= d_out:
                return WAYS[method](matrix, count, key)
            u, s, vt, top, residual = WAYS[method](matrix.T, count, key)
            return Triplets(vt.T, s, u.T, top, residual)

    return run(matrix, key)


def bottom_triplets(
    matrix: Float[Array, "d_in d_out"],
    count: int,
    *,
    method: Literal["exact", "gram", "inverse"] = "exact",
    key: Key[Array, ""] | None = None,
) -> Triplets:
    r"""Returns the ``count`` smallest singular triplets of a matrix.

    Works under ``jit``, ``vmap`` (one matrix after the other) and ``eval_shape``.

    - ``"exact"``: the whole singular value decomposition, see ``svd``.
    - ``"gram"``: the eigenvectors of the Gram matrix of the thinner side, then
      Rayleigh-Ritz (a QR and a small SVD). For wide matrices: as good as exact there,
      several times faster, and one matmul on a sharded one. Squares the condition
      number, so that near-square matrices lose accuracy.
    - ``"inverse"``: 8 steps of inverse iteration with a block of ``2 * count`` random
      vectors, on the Cholesky factor of that Gram matrix (the R of a QR where
      Cholesky breaks down), then Rayleigh-Ritz. For near-square matrices.

    Args:
        matrix: ``[d_in, d_out]``, float32 or float64, finite.
        count: m, from 1 to ``min(d_in, d_out)``.
        method: see above.
        key: for ``"inverse"``, whose start is random; the others ignore it.

    Returns:
        ``Triplets``; removing ``(u * s) @ vt`` is exact for every method.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> found = bottom_triplets(jnp.diag(jnp.array([3.0, 1.0, 2.0])), 2)
        >>> found.s
        Array([2., 1.], dtype=float32)

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, sections 8.2.2 (inverse
        iteration) and 8.1.4 (Rayleigh-Ritz).
    """
    check_matrix(matrix)
    if method not in WAYS:
        raise ValueError(f"`method` must be one of {', '.join(WAYS)}, got {method!r}.")
    k = min(matrix.shape)
    if not 1 <= count <= k:
        raise ValueError(
            f"`count` must be from 1 to {k}, the smaller side of "
            f"{list(matrix.shape)}, got {count}."
        )
    if key is None:
        if method == "inverse":
            raise ValueError(
                "`key` must be given for method='inverse'; write "
                "bottom_triplets(matrix, count, method='inverse', "
                "key=jax.random.key(0))."
            )
        key = jax.random.key(0)  # unused
    return _bottom(matrix, key, count, method)
