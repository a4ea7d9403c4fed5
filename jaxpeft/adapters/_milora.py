"""MiLoRA: adaptation of the minor singular components (arXiv 2406.09044)."""

from typing import Literal

from jaxpeft.numerics import bottom_factors
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
def milora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    residual: Literal["separate", "folded"] = "separate",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
) -> Adapter:
    r"""Returns MiLoRA: train the kernel's smallest singular components.

    Once, at ``attach``, with :math:`W = U S V^T` (descending) and the scale ``s``:

    .. math::
        a_0 = U_{-r:} \sqrt{S_{-r:} / s}, \qquad
        b_0 = \sqrt{S_{-r:} / s}\, V_{-r:}^T, \qquad a = a_0, \quad b = b_0

    then, with :math:`z = \mathrm{dropout}(x)`,

    .. math:: y = x\, (W - s\, a_0 b_0) + s\, (z a)\, b

    The output at the start is the base's; training begins in the subspace that the
    base uses least, and is free to leave it.

    Notation:
        paper    official code, PyTorch   here
        W        weight [out, in]         kernel [d_in, d_out] = weight.T
        A_m      lora_A.weight [r, in]    a [d_in, r] = lora_A.T
        B_m      lora_B.weight [out, r]   b [r, d_out] = lora_B.T
        W_p      overwritten weight       kernel - scale * a0 @ b0

    Args:
        rank: r, from 1 to min(d_in, d_out) of every site.
        alpha: numerator of the scale; ``None`` means ``rank``, as in the paper.
        dropout: probability in [0, 1) of dropping an entry of the trained path's
            input; the initial factors' term never sees it.
        residual: "separate" leaves W alone and subtracts the initial factors in the
            forward, so that ``detach`` is exact to the bit; "folded" stores
            ``W - s a0 b0`` in its place. A bfloat16 kernel would round most of so small
            a change away, so fold float32 kernels only.
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
        ...     params, milora(rank=2), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (6 + 4)
        True

    References:
        Wang et al., MiLoRA, arXiv 2406.09044, section 3. Code:
        github.com/sufenlp/MiLoRA.

    Note:
        A component whose singular value is exactly 0 starts with ``a`` and ``b`` at
        0, gets no gradient and never moves, as in the authors' code: nothing is
        trained on a kernel with ``r`` such components or more.
    """
    check_options(
        "milora",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        choices={"residual": (residual, RESIDUALS), "scaling": (scaling, SCALINGS)},
    )

    def start(key, kernel, rank, scale):
        del key
        return bottom_factors(kernel, rank, scale=scale)

    return residual_pair(
        start,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dropout=dropout,
        scaling=scaling,
        residual=residual,
    )


@peft_form(milora)
def _form(*, scaling, dropout, **_):
    return residual_form(None, scaling, dropout, ("linear", "conv1d"))
