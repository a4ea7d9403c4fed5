"""A singular value decomposition that is checked before it is believed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.numerics._norm import frobenius_norm

# ||u s vt - w|| / ||w|| above this, and the host decomposes again.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


class SVD(NamedTuple):
    """A thin singular value decomposition, ``k = min(d_in, d_out)``.

    Attributes:
        u: ``[d_in, k]``, orthonormal columns.
        s: ``[k]``, singular values, descending.
        vt: ``[k, d_out]``, orthonormal rows.
        residual: scalar, ``||u diag(s) vt - w||_F / ||w||_F`` (0 for ``w = 0``).
    """

    u: Float[Array, "d_in k"]
    s: Float[Array, " k"]
    vt: Float[Array, "k d_out"]
    residual: Float[Array, ""]


def relative(part: Float[Array, ""], whole: Float[Array, ""]) -> Float[Array, ""]:
    """``part / whole``, and ``part`` for a zero whole."""
    return part / jnp.where(whole == 0, 1.0, whole)


def check_matrix(matrix: Array) -> None:
    """Raises unless ``matrix`` is a non-empty float32 or float64 matrix."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"`matrix` must be a non-empty matrix, got shape {list(matrix.shape)}; "
            "reshape it to [d_in, d_out], and use jax.vmap for a stack."
        )
    if matrix.dtype.name not in TOLERANCE:
        raise ValueError(
            f"`matrix` must be float32 or float64, got {matrix.dtype}; "
            "write matrix.astype(jnp.float32)."
        )


def _on_host(matrix) -> tuple[np.ndarray, ...]:
    matrix = np.asarray(matrix)
    if not np.all(np.isfinite(matrix)):
        raise ValueError(
            f"`matrix` of shape {list(matrix.shape)} holds NaN or infinity and has no "
            "singular value decomposition; check the checkpoint it was read from."
        )
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return tuple(x.astype(matrix.dtype) for x in (u, s, vt))


def _residual(matrix, u, s, vt) -> Array:
    again = jnp.matmul(u * s[None, :], vt, precision="highest")
    return relative(frobenius_norm(again - matrix), frobenius_norm(matrix))


# A stack is decomposed one matrix at a time. That bounds the memory, and it keeps the
# `cond` below a branch: under a plain vmap both of its sides would run.
@jax.jit
@jax.custom_batching.sequential_vmap
def _svd(matrix):
    with jax.default_matmul_precision("highest"):
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    first = SVD(u, s, vt, _residual(matrix, u, s, vt))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (u, s, vt)]

    def again(_):
        u, s, vt = jax.pure_callback(
            _on_host, tuple(shapes), matrix, vmap_method="sequential"
        )
        return SVD(u, s, vt, _residual(matrix, u, s, vt))

    good = first.residual <= TOLERANCE[matrix.dtype.name]  # NaN is not
    return jax.lax.cond(good, lambda first: first, again, first)


def svd(matrix: Float[Array, "d_in d_out"]) -> SVD:
    """Returns the thin singular value decomposition of a matrix, and its residual.

    Works under ``jit``, ``vmap`` (one matrix after the other) and ``eval_shape``,
    with full-precision matmuls, on the device where the matrix lives. Where the
    device's result does not multiply back to the matrix (relative error above 1e-5
    in float32, 1e-12 in float64), the host decomposes it again with 64-bit LAPACK.

    Args:
        matrix: ``[d_in, d_out]``, float32 or float64, finite.

    Returns:
        ``SVD(u [d_in, k], s [k], vt [k, d_out], residual [])``.

    Raises:
        ValueError: not a matrix, empty, or of another dtype; or (from the host, when
            run) it holds NaN or infinity.

    Example:
        >>> svd(jnp.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])).s
        Array([2., 1.], dtype=float32)
    """
    check_matrix(matrix)
    return _svd(matrix)
