"""OLoRA: orthonormal low-rank adaptation (arXiv 2406.01775)."""

from typing import Literal

from jaxpeft.numerics import qr_factors
from jaxpeft.parts import (
    SCALINGS,
    check_options,
    peft_form,
    residual_form,
    residual_pair,
)
from jaxpeft.tree import Adapter, method

RESIDUALS = ("separate", "folded")


@method
def olora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    residual: Literal["separate", "folded"] = "separate",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
) -> Adapter:
    r"""Returns OLoRA: LoRA that starts from a QR decomposition of the kernel.

    Once, at ``attach``, with the decomposition :math:`W^T = Q R` of PyTorch's weight
    (not of our kernel; no pivoting):

    .. math:: a_0 = R_{:r}^T, \qquad b_0 = Q_{:, :r}^T, \qquad a = a_0, \quad b = b_0

    then, with the scale ``s`` and :math:`z = \mathrm{dropout}(x)`,

    .. math:: y = x\, (W - s\, a_0 b_0) + s\, (z a)\, b

    The rows of ``b`` start orthonormal. The output at the start is the base's, for
    any scale: ``s`` is not divided out of the factors, but multiplies both terms.

    Notation:
        paper       HF PEFT                  here
        W           weight [out, in]         kernel [d_in, d_out] = weight.T
        R_r         lora_A.weight [r, in]    a [d_in, r] = lora_A.T
        Q_r         lora_B.weight [out, r]   b [r, d_out] = lora_B.T
        W - Q_r R_r overwritten weight       kernel - scale * a0 @ b0

    Args:
        rank: r, from 1 to min(d_in, d_out) of every site.
        alpha: numerator of the scale; ``None`` means ``rank``.
        dropout: probability in [0, 1) of dropping an entry of the trained path's
            input; the initial factors' term never sees it.
        residual: "separate" leaves W alone and subtracts the initial factors in the
            forward, so that ``detach`` is exact to the bit; "folded" stores
            ``W - s a0 b0`` in its place, which saves the thin matmuls but rounds, so
            fold float32 kernels only.
        scaling: "alpha/sqrt_r" is rsLoRA's.

    Returns:
        An ``Adapter`` with trainable ``a`` and ``b``, and frozen ``scale``, ``a0``
        and ``b0``; loading a saved one never decomposes again.

    Raises:
        ValueError: a value outside of what is allowed; at ``attach``, a rank above
            min(d_in, d_out) of a site.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.eye(6)[:, :4]}}
        >>> adapted = jp.attach(
        ...     params, olora(rank=2), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (6 + 4)
        True

    References:
        Büyükakyüz, OLoRA, arXiv 2406.01775, section 3. HF PEFT:
        ``init_lora_weights="olora"``.
    """
    check_options(
        "olora",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        choices={"residual": (residual, RESIDUALS), "scaling": (scaling, SCALINGS)},
    )

    def start(key, kernel, rank, scale):
        del key, scale
        return qr_factors(kernel, rank)

    return residual_pair(
        start,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dropout=dropout,
        scaling=scaling,
        residual=residual,
    )


@peft_form(olora)
def _form(*, scaling, dropout, **_):
    # PEFT takes a Conv1D's weight for its transpose.
    return residual_form("olora", scaling, dropout, ("linear",))
