"""Thin factors of a matrix to start from: its largest part, its smallest, its QR."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpeft.numerics._bottom import bottom_triplets
from jaxpeft.numerics._svd import check_matrix, svd

EXTRA = 10  # vectors beyond `rank` in the random block

Scale = int | float | Float[Array, ""]
Factored = tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]


def _check(matrix: Array, rank: int, scale: Scale) -> None:
    check_matrix(matrix)
    k = min(matrix.shape)
    if not 1 <= rank <= k:
        raise ValueError(
            f"`rank` must be from 1 to {k}, the smaller side of "
            f"{list(matrix.shape)}, got {rank}."
        )
    if not isinstance(scale, jax.core.Tracer) and not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}.")


def _halves(u, s, vt, scale) -> Factored:
    """``(a, b)`` with ``scale * a @ b == (u * s) @ vt``, half of ``s`` on each side."""
    root = jnp.sqrt(s / scale)
    return u * root[None, :], root[:, None] * vt


def top_factors(
    matrix: Float[Array, "d_in d_out"],
    rank: int,
    *,
    scale: Scale = 1.0,
    split: Literal["even", "in"] = "even",
    iterations: int | None = None,
    key: Key[Array, ""] | None = None,
) -> Factored:
    r"""Returns the factors of the best approximation of a given rank.

    With :math:`W = U S V^T`, ``r`` the rank and ``s`` the scale,

    .. math::
        \text{even:}\quad a = U_r \sqrt{S_r / s}, \quad b = \sqrt{S_r / s}\, V_r^T
        \qquad
        \text{in:}\quad a = U_r S_r / s, \quad b = V_r^T

    so that :math:`s\, a b` is the nearest matrix of rank ``r``, in the Frobenius and
    the spectral norm. Singular vectors have free signs: compare ``a @ b``.

    Args:
        matrix: ``[d_in, d_out]``, float32 or float64, finite.
        rank: r, from 1 to ``min(d_in, d_out)``.
        scale: s, positive.
        split: which factor carries the singular values.
        iterations: ``None`` decomposes the whole matrix (see ``svd``); a number, at
            least 0, takes so many power iterations of a random block of ``rank + 10``
            vectors: much faster, nearly the same where singular values fall quickly.
        key: for ``iterations``; the exact way ignores it.

    Returns:
        ``(a [d_in, r], b [r, d_out])`` in the dtype of ``matrix``.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> a, b = top_factors(jnp.diag(jnp.array([3.0, 1.0, 2.0])), 1, scale=2.0)
        >>> round(float((2.0 * a @ b)[0, 0]), 4)
        3.0

    References:
        Eckart and Young, 1936. Halko, Martinsson and Tropp, arXiv 0909.4061,
        algorithms 4.4 and 5.1, for ``iterations``.
    """
    _check(matrix, rank, scale)
    if split not in ("even", "in"):
        raise ValueError(f"`split` must be one of even, in, got {split!r}.")
    if iterations is None:
        found = svd(matrix)
        u, s, vt = found.u[:, :rank], found.s[:rank], found.vt[:rank]
    elif iterations < 0:
        raise ValueError(f"`iterations` must be at least 0, got {iterations}.")
    elif key is None:
        raise ValueError(
            "`key` must be given with `iterations`; write top_factors(matrix, rank, "
            f"iterations={iterations}, key=jax.random.key(0))."
        )
    else:
        u, s, vt = _randomised(matrix, key, rank, iterations)
    if split == "in":
        return u * (s / scale)[None, :], vt
    return _halves(u, s, vt, scale)


@partial(jax.jit, static_argnames=("rank", "iterations"))
def _randomised(matrix, key, rank: int, iterations: int):
    width = min(*matrix.shape, rank + EXTRA)
    with jax.default_matmul_precision("highest"):
        orthonormal = lambda x: jnp.linalg.qr(x)[0]
        start = jax.random.normal(key, (matrix.shape[1], width), matrix.dtype)
        basis = jax.lax.fori_loop(
            0,
            iterations,
            lambda _, q: orthonormal(matrix @ orthonormal(matrix.T @ q)),
            orthonormal(matrix @ start),
        )
        u, s, vt = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
        return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def bottom_factors(
    matrix: Float[Array, "d_in d_out"],
    rank: int,
    *,
    scale: Scale = 1.0,
) -> Factored:
    r"""Returns the factors of a matrix's smallest singular components.

    .. math:: a = U_{-r} \sqrt{S_{-r} / s}, \qquad b = \sqrt{S_{-r} / s}\, V_{-r}^T

    so that :math:`W - s\, a b` has lost ``r`` of its rank, at the least cost.

    Args:
        matrix: ``[d_in, d_out]``, float32 or float64, finite.
        rank: r, from 1 to ``min(d_in, d_out)``.
        scale: s, positive.

    Returns:
        ``(a [d_in, r], b [r, d_out])`` in the dtype of ``matrix``.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> a, b = bottom_factors(jnp.diag(jnp.array([3.0, 1.0, 2.0])), 1)
        >>> round(float((a @ b)[1, 1]), 4)
        1.0
    """
    _check(matrix, rank, scale)
    found = bottom_triplets(matrix, rank)
    return _halves(found.u, found.s, found.vt, scale)


def qr_factors(matrix: Float[Array, "d_in d_out"], rank: int) -> Factored:
    r"""Returns the first columns and rows of a QR decomposition of the transpose.

    .. math:: W^T = Q R, \qquad a = R_{:r}^T, \qquad b = Q_{:, :r}^T

    The rows of ``b`` are orthonormal and span the first ``r`` rows of the matrix;
    ``a`` holds every row's coordinates there. No pivoting.

    Args:
        matrix: ``[d_in, d_out]``, float32 or float64, finite.
        rank: r, from 1 to ``min(d_in, d_out)``.

    Returns:
        ``(a [d_in, r], b [r, d_out])`` in the dtype of ``matrix``.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> a, b = qr_factors(jnp.array([[0.0, 2.0], [1.0, 3.0]]), 1)
        >>> jnp.abs(a @ b)
        Array([[0., 2.],
               [0., 3.]], dtype=float32)
    """
    _check(matrix, rank, 1.0)
    # Column j of Q depends on the first j columns alone, so the rest of them need no
    # decomposition: R's first rows are Q's first columns times all of the matrix.
    with jax.default_matmul_precision("highest"):
        q, _ = jnp.linalg.qr(matrix[:rank].T)
        return matrix @ q, q.T
