"""Principal components of kernels, each of which may be trained (arXiv 2412.08592)."""

from typing import Literal

import jax.numpy as jnp

from jaxpeft.numerics import top_factors
from jaxpeft.parts import check_options, check_site_rank
from jaxpeft.tree import Adapter, Factors, Term, Where, method

RESIDUALS = ("separate", "folded")


@method
def pc(
    rank: int = 10,
    iterations: int | None = None,
    residual: Literal["separate", "folded"] = "separate",
) -> Adapter:
    r"""Returns the method of principal components: the kernel's own, trained.

    Once, at ``attach``, with :math:`W = P S Q^T` (descending),

    .. math:: a_0 = P_{:r} S_{:r}, \qquad b_0 = Q_{:, :r}^T, \qquad a = a_0, \quad
              b = b_0

    then

    .. math:: y = x W + (x a)\, b - (x a_0)\, b_0
                = x W + \big(x (a - a_0)\big)\, b + (x a_0)\, (b - b_0)

    The second form is the one computed: at the start it is the base to the bit, and
    later nothing large cancels. Column ``i`` of ``a`` and row ``i`` of ``b`` are one
    component, a node of ``jaxpeft.allocate.ggm``, which chooses those that go on
    training; the scale is 1.

    Notation:
        paper's code                       here
        weight [out, in] = U S V^T         kernel [d_in, d_out] = weight.T
        lorrasa_A_i = U[:, i] [out]        b[i] [d_out]
        lorrasa_B_i = S_i V[:, i] [in]     a[:, i] [d_in]
        resW                               kernel - a0 @ b0

    Args:
        rank: r, components of each kernel, from 1 to min(d_in, d_out) of every site.
        iterations: ``None``: the exact decomposition. A number: so many power
            iterations of a random block, see ``pissa``.
        residual: "separate" leaves W alone, so that ``detach`` is exact to the bit;
            "folded" stores ``W - a0 b0`` in its place (the paper), which saves two
            thin matmuls but rounds, so fold float32 kernels only.

    Returns:
        An ``Adapter`` with trainable ``a`` and ``b``, and frozen ``a0`` and ``b0``;
        loading a saved one never decomposes again. In HF PEFT's files it is plain
        LoRA of rank 2 r.

    Raises:
        ValueError: a value outside of what is allowed; at ``attach``, a rank above
            min(d_in, d_out) of a site.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.eye(6)[:, :4]}}
        >>> adapted = jp.attach(params, pc(rank=2), ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)[0] == 2 * (6 + 4)
        True

    References:
        Zheng and Cao, Adaptive principal components allocation with the
        l2,g-regularized Gaussian graphical model, arXiv 2412.08592.

    Note:
        The paper folds, and does not store what it subtracted; here "separate" is the
        default, as for every method that starts as a part of the kernel. PiSSA is the
        same but for the singular values, which it splits between the factors.
    """
    check_options("pc", rank=rank, choices={"residual": (residual, RESIDUALS)})
    if iterations is not None and iterations < 0:
        raise ValueError(
            f"`iterations` must be at least 0, or None for an exact decomposition; "
            f"got {iterations}. Write pc(iterations=16)."
        )

    def init(key, kernel, rank, alpha):
        del alpha  # the scale is 1
        check_site_rank(rank, kernel.shape)
        a0, b0 = top_factors(kernel, rank, split="in", iterations=iterations, key=key)
        return {"a0": a0, "b0": b0}, {"a": a0, "b": b0}

    def change(frozen, trainable):
        """``a b - a0 b0`` as one pair; exactly 0 where nothing has moved."""
        a, b, a0, b0 = trainable["a"], trainable["b"], frozen["a0"], frozen["b0"]
        return (
            jnp.concatenate([a - a0.astype(a.dtype), a0.astype(a.dtype)], axis=1),
            jnp.concatenate([b, b - b0.astype(b.dtype)], axis=0),
        )

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        if residual == "folded":
            return Factors((Term(trainable["a"], trainable["b"]),))
        return Factors((Term(*change(frozen, trainable)),))

    def taken(frozen):
        return (Term(frozen["a0"], -frozen["b0"]),)

    return Adapter(
        init=init,
        factors=factors,
        where=Where(rank=rank),
        folded=taken if residual == "folded" else None,
    )
