"""What a mask leaves: chosen, not multiplied, so that 0 times NaN does not arise."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


def where_shown(
    mask: Shaped[Array | np.ndarray, "..."], x: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
    """Returns ``x`` where the mask is not 0, and 0 elsewhere, whatever ``x`` holds.

    Padding may hold anything, also NaN, and a product with 0 would keep that. Apply it
    **before** what follows is computed: the gradient of a product with what is masked
    is 0 then, and not 0 times NaN.

    Args:
        mask: 0, or False, where ``x`` is left out; any number where it stays as it is.
            Its axes are the first of ``x``, or as many, each of its length or 1.
        x: any numbers.

    Returns:
        An array like ``x``.

    Example:
        >>> where_shown(jnp.array([1, 0]), jnp.array([[2.0], [jnp.nan]])).tolist()
        [[2.0], [0.0]]
    """
    shape = mask.shape + (1,) * (x.ndim - mask.ndim)
    kept = jnp.broadcast_to(mask.astype(bool).reshape(shape), x.shape)
    return jnp.where(kept, x, jnp.zeros((), x.dtype))
