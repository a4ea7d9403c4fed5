"""Cross-entropy over a large vocabulary, a part of the tokens at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def token_cross_entropy(
    read_out: Callable[[Array], Array],
    hidden: Float[Array, "*rows tokens d"],
    targets: Int[Array, "..."],
    *,
    chunk: int = 256,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "*rows tokens"], Bool[Array, "*rows tokens"]]:
    r"""Returns minus the log-probability of each target, logits never held whole.

    .. math:: \ell_t = \log \sum_v \exp z_{tv} - z_{t y_t}, \qquad z_t = f(h_t)

    The logits :math:`z` of one chunk are made, used and dropped, and made again in the
    backward pass: one more pass through ``read_out``, for the memory of one chunk in
    place of that of the batch. Every row gives a chunk as many tokens, so rows that
    lie on different devices stay there.

    Args:
        read_out: ``[*rows, some tokens, d] -> logits [*rows, some tokens, v]``, each
            token by itself. It may close over parameters, which then get gradients; to
            have them adapted, call all of this inside a function under ``jp.adapt``.
        hidden: the last hidden states, :math:`h`.
        targets: ``[*rows, tokens]``, the ids to be predicted, :math:`y`; one outside
            of 0 to v - 1 gives NaN.
        chunk: the most tokens read out at a time, over all rows; one of every row is
            the least. The time of small matmuls is lost below some hundreds.
        mesh_axis: inside of a ``shard_map``, the axis of the mesh that cuts the
            vocabulary: ``read_out`` gives logits of this device's part, in the order
            of the axis. A few numbers a token are all that devices exchange.

    Returns:
        ``(values, hits)``: in float32 at least, and whether the target has the
        highest logit (the first of equal ones), which has no gradient.

    Raises:
        ValueError: ``chunk`` is below 1, or the shapes do not go together.

    Example:
        >>> head = jnp.array([[0.0, jnp.log(3.0)]])
        >>> values, hits = token_cross_entropy(
        ...     lambda h: h @ head, jnp.ones((2, 1)), jnp.array([0, 1])
        ... )
        >>> jnp.exp(-values).round(4).tolist(), hits.tolist()
        ([0.25, 0.75], [False, True])
    """
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}")
    if hidden.ndim < 2 or hidden.shape[:-1] != targets.shape or not targets.size:
        raise ValueError(
            f"`hidden` must be [*rows, tokens, d] and `targets` [*rows, tokens], with "
            f"one token at least; got {hidden.shape} and {targets.shape}"
        )
    tokens = targets.shape[-1]
    pieces = min(tokens, -(-targets.size // chunk))
    each = -(-tokens // pieces)  # tokens of a row in a piece
    pieces = -(-tokens // each)
    axis = targets.ndim - 1

    def cut(x: Array) -> Array:
        """``[*rows, tokens, ...]`` as ``[pieces, *rows, each, ...]``."""
        room = [(0, 0)] * x.ndim
        room[axis] = (0, pieces * each - tokens)
        x = jnp.pad(x, room)
        x = x.reshape(*x.shape[:axis], pieces, each, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def piece(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logits = read_out(hidden)
        if logits.dtype.itemsize < 4:
            logits = logits.astype(jnp.float32)
        if mesh_axis is not None:
            return _of_parts(logits, targets, mesh_axis)
        chosen = jnp.take_along_axis(
            logits, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan
        )[..., 0]
        values = jax.nn.logsumexp(logits, axis=-1) - chosen
        return values, jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets

    def body(_: None, part: Any) -> tuple[None, Any]:
        return None, piece(*part)

    _, parts = jax.lax.scan(body, None, (cut(hidden), cut(targets)))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*targets.shape[:-1], -1)[..., :tokens]

    values, hits = jax.tree.map(join, parts)
    return values, hits


def _of_parts(logits: Array, targets: Array, axis: str) -> tuple[Array, Array]:
    """The same of logits whose vocabulary is cut over an axis of the mesh."""
    size = logits.shape[-1]
    count = size * lax.psum(1, axis)
    start = lax.axis_index(axis).astype(targets.dtype) * size
    # As `take_along_axis` has it: a negative target counts from the end.
    place = jnp.where(targets < 0, targets + count, targets) - start
    here = (place >= 0) & (place < size)
    chosen = jnp.take_along_axis(logits, place[..., None], axis=-1, mode="clip")
    chosen = lax.psum(jnp.where(here, chosen[..., 0], 0.0), axis)
    known = (targets >= -count) & (targets < count)
    chosen = jnp.where(known, chosen, jnp.nan)
    own = lax.stop_gradient(jnp.max(logits, axis=-1))
    top = lax.pmax(own, axis)
    # Where the largest is infinite, nothing is taken off, as `logsumexp` has it.
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    total = lax.psum(jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1), axis)
    first = start + jnp.argmax(logits, axis=-1).astype(targets.dtype)
    best = lax.pmin(jnp.where(own == top, first, count), axis)
    return jnp.log(total) + shift - chosen, best == targets
