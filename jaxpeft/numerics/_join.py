"""Sums of thin products as one thin product, exactly or term by term."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

JOINS = (
    *("linear", "cat", "svd", "ties", "dare_linear", "dare_ties"),
    "magnitude_prune",
)
MAJORITIES = ("total", "frequency")

# a [d_in, r], b [r, d_out] and a scale: the product is scale * a @ b.
Product = tuple[Float[Array, "d_in _"], Float[Array, "_ d_out"], Float[Array, ""]]


def cut_product(
    a: Float[Array, "d_in r"], b: Float[Array, "r d_out"], rank: int
) -> tuple[Float[Array, "d_in k"], Float[Array, "k d_out"]]:
    r"""Returns the best approximation of ``a b`` of a given rank, as factors.

    .. math:: a = Q_a R_a, \quad b^T = Q_b R_b, \quad U T V^T = R_a R_b^T, \qquad
              a' = Q_a U_k T_k^{1/2}, \quad b' = T_k^{1/2} V_k^T Q_b^T

    Nothing of the product's own shape is made: the cost is
    :math:`O((d_{in} + d_{out})\, r^2)`.

    Args:
        a: ``[d_in, r]``.
        b: ``[r, d_out]``.
        rank: k, from 1 to the smallest of d_in, r and d_out.

    Returns:
        ``(a' [d_in, k], b' [k, d_out])``, with columns and rows of equal norms.

    Example:
        >>> a, b = cut_product(jnp.eye(3, 2), jnp.array([[4.0, 0.0], [0.0, 1.0]]), 1)
        >>> jnp.abs(a @ b).round(3).tolist()
        [[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.T)
    u, t, vt = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    root = jnp.sqrt(t[:rank])
    left = (q_a @ u[:, :rank]) * root[None, :]
    return left, root[:, None] * (vt[:rank] @ q_b.T)


def keep_largest(tensor: Float[Array, "..."], density: float):
    """Sets all but the largest entries, by magnitude, to zero.

    Args:
        tensor: any shape.
        density: the share to keep; ``floor(density * size)`` entries are.

    Example:
        >>> keep_largest(jnp.array([1.0, -3.0, 2.0, 0.5]), 0.5).tolist()
        [0.0, -3.0, 2.0, 0.0]
    """
    _, where = jax.lax.top_k(jnp.abs(tensor).reshape(-1), int(density * tensor.size))
    mask = jnp.zeros(tensor.size, tensor.dtype).at[where].set(1)
    return tensor * mask.reshape(tensor.shape)


def majority(tensors: Float[Array, "n ..."], method: str) -> Bool[Array, "n ..."]:
    """Says which entries have the sign that their place has elected.

    Args:
        tensors: n of one shape. An entry of 0 agrees with nobody.
        method: ``"total"``: the sign of the sum; ``"frequency"``: the more frequent
            sign. Plus where both are even.

    Example:
        >>> votes = jnp.array([[3.0, -1.0], [-1.0, -1.0], [-1.0, 0.0]])
        >>> majority(votes, "total").tolist()
        [[True, True], [False, True], [False, False]]
        >>> majority(votes, "frequency").tolist()
        [[False, True], [True, True], [True, False]]
    """
    votes = tensors if method == "total" else jnp.sign(tensors)
    elected = jnp.where(jnp.sum(votes, 0) >= 0, 1, -1).astype(tensors.dtype)
    return jnp.sign(tensors) == elected[None]


def join_tensors(
    tensors: Float[Array, "n ..."],
    weights: Float[Array, " n"],
    how: str,
    *,
    density: float | None = None,
    election: str = "total",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "..."]:
    r"""Returns a weighted sum of tensors that may first thin each of them out.

    ===================  ===========================  ==============================
    ``how``              what is kept of each         how the rest is joined
    ===================  ===========================  ==============================
    "linear"             all                          sum of w_i t_i
    "magnitude_prune"    the largest                  the same
    "dare_linear"        at random, over the density  the same
    "ties"               the largest                  mean of the w_i t_i that have
                                                      the elected sign
    "dare_ties"          at random, over the density  the same
    ===================  ===========================  ==============================

    Args:
        tensors: t, n of one shape.
        weights: w, one for each.
        how: see the table.
        density: the share of entries to keep, in (0, 1].
        election: see ``majority``; signs are elected before the weights come in.
        key: a typed key, where entries are kept at random.

    References:
        Ilharco et al., task arithmetic, arXiv 2212.04089. Yadav et al., TIES,
        arXiv 2306.01708. Yu et al., DARE, arXiv 2311.03099. HF PEFT:
        ``peft.utils.merge_utils``.
    """
    if how in ("ties", "magnitude_prune") and density < 1:
        tensors = jax.vmap(lambda t: keep_largest(t, density))(tensors)
    if how in ("dare_linear", "dare_ties"):
        keep = jax.random.bernoulli(key, density, tensors.shape)
        tensors = jnp.where(keep, tensors / density, 0)
    each = tensors * weights.reshape(-1, *(1,) * (tensors.ndim - 1))
    if how not in ("ties", "dare_ties"):
        return jnp.sum(each, 0)
    agree = majority(tensors, election).astype(tensors.dtype)
    return jnp.sum(each * agree, 0) / jnp.maximum(jnp.sum(agree, 0), 1)


def join_products(
    products: Sequence[Product],
    weights: Float[Array, " n"],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    election: str = "total",
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "d_in k"], Float[Array, "k d_out"]]:
    r"""Returns one thin product in place of a weighted sum of several.

    With "cat" it is the sum itself, with "svd" its best approximation of a rank. All
    others join the factors and not the products, each with a root of its weight,

    .. math:: a = \sum_i \mathrm{sign}(w_i s_i) \sqrt{|w_i s_i|}\, a_i, \qquad
              b = \sum_i \sqrt{|w_i s_i|}\, b_i

    for "linear", whose product has cross terms ``a_i b_j`` beside the sum.

    Args:
        products: ``(a [d_in, r_i], b [r_i, d_out], scale)``; of equal ranks but for
            "cat" and "svd".
        weights: one for each.
        how: a name in ``JOINS``.
        rank: k, for "svd".
        density: as in ``join_tensors``.
        election: as in ``join_tensors``.
        key: as in ``join_tensors``.

    Returns:
        ``(a, b)``: the product is ``a @ b``.

    Example:
        >>> one, half = (jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.ones(())), jnp.ones(2)
        >>> a, b = join_products([one, one], half / 2, "cat")
        >>> (a @ b).tolist()  # (1 + 1) / 2
        [[1.0, 1.0], [1.0, 1.0]]
        >>> a, b = join_products([one, one], half / 2, "linear")
        >>> (a @ b).round(3).tolist()  # the cross terms double it
        [[2.0, 2.0], [2.0, 2.0]]
    """
    scales = jnp.stack([scale for *_, scale in products]) * weights
    if how in ("cat", "svd"):
        a = jnp.concatenate([a for a, *_ in products], 1)
        b = [scales[i] * b for i, (_, b, _) in enumerate(products)]
        b = jnp.concatenate(b, 0)
        return (a, b) if how == "cat" else cut_product(a, b, rank)
    root = jnp.sqrt(jnp.abs(scales))
    sign = jnp.where(scales < 0, -1, 1).astype(scales.dtype)
    keys = (None, None) if key is None else jax.random.split(key)
    settings = {"how": how, "density": density, "election": election}
    a, b = (jnp.stack(factors) for factors in list(zip(*products, strict=True))[:2])
    return (
        join_tensors(a, sign * root, key=keys[0], **settings),
        join_tensors(b, root, key=keys[1], **settings),
    )


def joined_rank(ranks: Sequence[int], how: str, rank: int | None = None) -> int:
    """The rank that ``join_products`` returns, for products of these ranks."""
    return {"cat": sum(ranks), "svd": rank}.get(how, ranks[0])
