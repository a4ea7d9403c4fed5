"""PiSSA: principal singular values and vectors adaptation (arXiv 2404.02948)."""

from typing import Literal

from jaxpeft.numerics import top_factors
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
def pissa(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    iterations: int | None = None,
    residual: Literal["separate", "folded"] = "separate",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
) -> Adapter:
    r"""Returns PiSSA: train the kernel's largest singular components.

    Once, at ``attach``, with :math:`W = U S V^T` (descending) and the scale ``s``:

    .. math::
        a_0 = U_{:r} \sqrt{S_{:r} / s}, \qquad b_0 = \sqrt{S_{:r} / s}\, V_{:r}^T,
        \qquad a = a_0, \quad b = b_0

    then, with :math:`z = \mathrm{dropout}(x)`,

    .. math:: y = x\, (W - s\, a_0 b_0) + s\, (z a)\, b

    The output at the start is the base's. Both factors get a gradient from the first
    step on, and they are as large as the kernel itself.

    Notation:
        HF PEFT                          here
        weight [out, in]                 kernel [d_in, d_out] = weight.T
        lora_A.weight [r, in]            a [d_in, r] = lora_A.T
        lora_B.weight [out, r]           b [r, d_out] = lora_B.T
        overwritten weight (residual)    kernel - scale * a0 @ b0
        "pissa_niter_16"                 iterations=16

    Args:
        rank: r, from 1 to min(d_in, d_out) of every site.
        alpha: numerator of the scale; ``None`` means ``rank``.
        dropout: probability in [0, 1) of dropping an entry of the trained path's
            input; the initial factors' term never sees it.
        iterations: ``None``: the exact decomposition. A number: so many power
            iterations of a random block (the paper's fast SVD; 4 to 16 are usual),
            which finds nearly the same factors in a fraction of the time.
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
        ...     params, pissa(rank=2), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 2 * (6 + 4)
        True

    References:
        Meng, Wang and Zhang, PiSSA, arXiv 2404.02948, section 3. HF PEFT:
        ``init_lora_weights="pissa"``.

    Note:
        HF PEFT overwrites the kernel, and decomposes again when it loads. Its fast
        way takes a random block of ``r`` vectors; here it has 10 more, which finds
        the same components better.
    """
    check_options(
        "pissa",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        choices={"residual": (residual, RESIDUALS), "scaling": (scaling, SCALINGS)},
    )
    if iterations is not None and iterations < 0:
        raise ValueError(
            f"`iterations` must be at least 0, or None for an exact decomposition; "
            f"got {iterations}. Write pissa(iterations=16)."
        )

    def start(key, kernel, rank, scale):
        return top_factors(kernel, rank, scale=scale, iterations=iterations, key=key)

    return residual_pair(
        start,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dropout=dropout,
        scaling=scaling,
        residual=residual,
    )


@peft_form(pissa)
def _form(*, iterations, scaling, dropout, **_):
    start = "pissa" if iterations is None else None
    return residual_form(start, scaling, dropout, ("linear", "conv1d"))
