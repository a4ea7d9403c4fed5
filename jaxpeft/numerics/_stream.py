"""Principal components of a stream: an incremental SVD that keeps the leading ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxpeft.numerics._shown import where_shown

CHUNK = 256  # vectors at a time; the workspace is a Gram matrix of about this width
_EXACT = jax.lax.Precision.HIGHEST


class Leading(NamedTuple):
    """Vectors seen so far, by their leading principal components; of a stack, stacked.

    Attributes:
        count: of vectors, ``[...]``.
        mean: ``[..., d]``.
        spread: the sum of ``|x - mean|^2``, of all directions, ``[...]``.
        rows: orthogonal rows, longest first, ``[..., k, d]``: a right singular vector
            of the centred vectors times its singular value.
    """

    count: Any
    mean: Any
    spread: Any
    rows: Any


def leading_rows(
    x: Float[Array, "n d"], weight: Shaped[Array, " n"], keep: int
) -> Leading:
    r"""Returns the leading principal components of vectors.

    Chunk by chunk, with singular values ``s`` and right singular vectors ``V`` of
    those seen so far, the leading ones of

    .. math:: \big[\, s V ;\; x - \bar x ;\;
        \sqrt{n m / (n + m)}\, (\bar x_{seen} - \bar x) \,\big]

    for ``n`` vectors seen and ``m`` new ones. What is cut off is lost, so that the
    result is exact where ``keep`` directions hold all there is, and close where the
    spectrum decays. No matrix ``[d, d]`` is formed.

    Args:
        x: vectors.
        weight: 1 at those that count, else 0.
        keep: k, how many directions to keep; at most d.

    Returns:
        ``Leading``, in float32.

    Raises:
        ValueError: ``keep`` is below 1 or above d.

    Example:
        >>> x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> found = leading_rows(x, jnp.asarray([1, 1, 0]), 1)
        >>> float(found.spread), round(float(jnp.abs(found.rows[0, 0])), 4)
        (2.0, 1.4142)

    References:
        Ross, Lim, Lin and Yang, Incremental learning for robust visual tracking, 2008,
        section 3.1; it is scikit-learn's ``IncrementalPCA``, and HF PEFT's.
    """
    n, d = x.shape
    if not 1 <= keep <= d:
        raise ValueError(f"`keep` must be from 1 to {d}, the width, got {keep}")
    chunks = -(-n // CHUNK)
    size = -(-n // chunks)
    short = chunks * size - n
    x = jnp.pad(x.astype(jnp.float32), ((0, short), (0, 0))).reshape(chunks, size, d)
    w = jnp.pad(weight.astype(jnp.float32), (0, short)).reshape(chunks, size)

    def step(seen, chunk):
        x, w = chunk
        count, mean, rows = centre(x, w)
        return _joined(seen, Leading(count, mean, jnp.sum(rows * rows), rows)), None

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    empty = Leading(zeros(), zeros(d), zeros(), zeros(keep, d))
    return jax.lax.scan(step, empty, (x, w))[0]


def centre(
    x: Float[Array, "n d"], weight: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, " d"], Float[Array, "n d"]]:
    """Returns the count of vectors, their mean, and what is left without it.

    Args:
        x: vectors.
        weight: 1 at those that count, else 0: of those nothing is left, whatever they
            hold.

    Returns:
        ``(count, mean, centred)``.
    """
    count, x = jnp.sum(weight), where_shown(weight, x)
    mean = jnp.matmul(weight, x, precision=_EXACT) / jnp.maximum(count, 1)
    centred = (x - mean[None]) * weight[:, None]
    # A long float32 sum is off by some 1e-5; what it left behind is small, and exact.
    rest = jnp.sum(centred, 0) / jnp.maximum(count, 1)
    return count, mean + rest, centred - rest[None] * weight[:, None]


@jax.jit
def join_leading(a: Leading, b: Leading) -> Leading:
    """Returns two samples' leading directions as those of one.

    Args:
        a: of one sample, or of a stack of samples.
        b: of another, with as many leading axes.

    Returns:
        Those of both together, as many as ``a`` has.
    """
    join = _joined
    for _ in range(a.count.ndim):
        join = jax.vmap(join)
    return join(a, b)


@jax.jit
def row_cosines(a: Leading, b: Leading) -> Float[Array, "*stack k"]:
    """Returns how far each direction has turned: the size of the cosine of the angle.

    Args:
        a: before.
        b: after, of the same shape.

    Returns:
        From 0 to 1; 0 for a direction that is not there.
    """
    dots = jnp.abs(jnp.sum(a.rows * b.rows, -1))
    norms = jnp.sum(a.rows**2, -1) * jnp.sum(b.rows**2, -1)
    return dots / jnp.sqrt(jnp.where(norms > 0, norms, 1))


def _joined(a: Leading, b: Leading) -> Leading:
    """``b.rows`` may be any whose Gram matrix is the scatter of ``b``."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    apart = b.mean - a.mean
    between = jnp.sqrt(a.count * share) * apart
    stack = jnp.concatenate([a.rows, b.rows, between[None]])
    # The Gram matrix of few long rows: its eigenvectors turn them into orthogonal ones.
    gram = jnp.matmul(stack, stack.T, precision=_EXACT)
    turn = jnp.linalg.eigh(gram)[1][:, ::-1][:, : len(a.rows)]
    return Leading(
        count,
        a.mean + share * apart,
        a.spread + b.spread + jnp.sum(between**2),
        jnp.matmul(turn.T, stack, precision=_EXACT),
    )
