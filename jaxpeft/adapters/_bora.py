"""BoRA: bi-dimensional weight-decomposed low-rank adaptation (arXiv 2412.06441)."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpeft.numerics import (
    factored_square_norms,
    live_features,
    magnitude_ratio,
    safe_sqrt,
    square_norms,
    zero_factors,
)
from jaxpeft.parts import SCALINGS, check_options, scale_leaf
from jaxpeft.tree import Adapter, Factors, Term, Where, method

ORDERS = (("out", "in"), ("in", "out"))


@method
def bora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    order: tuple[str, str] = ("out", "in"),
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
    stop_gradient_norms: bool = False,
    eps: float = 1e-8,
) -> Adapter:
    r"""Returns BoRA, bi-dimensional weight decomposition (arXiv 2412.06441).

    The kernel with its LoRA, :math:`V = W + s\, a b`, is normalised twice, once per
    out feature and once per in feature, each time with a trained magnitude. With the
    order ("out", "in"):

    .. math::
        d_j &= \frac{m^{out}_j}{\sqrt{\sum_i V_{ij}^2}}, \qquad
        c_i = \frac{m^{in}_i}{\sqrt{\sum_j (V_{ij} d_j)^2}} \\
        y &= \big((x c) W + s\, ((z c) a)\, b\big)\, d, \qquad
        z = \mathrm{dropout}(x), \quad s = \alpha / r

    With ("in", "out"), ``c`` comes first, from ``V``, and ``d`` from ``c V``. Both
    magnitudes start as the norms of ``W``: at the start the adapted model is the
    base. ``V`` is never formed: the norms come from Gram matrices, and from one
    weighted reduction over ``W^2`` a step.

    Notation:
        paper          PyTorch                      here
        W_0            weight [out, in]             kernel [d_in, d_out] = weight.T
        A, B           lora_A [r, in],              a [d_in, r] = lora_A.T,
                       lora_B [out, r]              b [r, d_out] = lora_B.T
        V              weight + (alpha/r) B A       W + s a b, a concept
        norm, dim=1    [out]                        out-norm: over the in axis, [d_out]
        norm, dim=0    [in]                         in-norm: over the out axis, [d_in]
        magnitudes     [out], [in]                  m_out [d_out], m_in [d_in]

    Axes are named by their feature; papers, PyTorch and Flax disagree about rows and
    columns.

    Args:
        rank: r, at least 1.
        alpha: numerator of the scale; ``None`` means ``rank``.
        dropout: probability in [0, 1) of dropping an entry of the low-rank path's
            input. The norms never see a mask.
        order: which norm is taken first: ("out", "in") or ("in", "out"). After it the
            norms of the second axis are the magnitudes exactly, those of the first
            roughly.
        scaling: "alpha/sqrt_r" is rsLoRA's.
        stop_gradient_norms: whether both norms are constants for differentiation. The
            merged kernel does not change when the first magnitude is multiplied by a
            number; the exact gradient knows, one with constant norms drifts.
        eps: norms are clamped at eps, > 0, of the norm of what W and a b bring to them
            (and at 1e-6 of it, float32's own limit, if eps is below).

    Returns:
        An ``Adapter`` with trainable ``a``, ``b``, ``m_out`` and ``m_in`` (float32
        whatever the kernel's dtype) and frozen ``scale``, ``live_out``, ``live_in``
        and the square norms of the first axis, ``w2_out`` or ``w2_in``. Features with
        a norm of at most 1e-6 of the root mean square of their axis are dead: their
        factor is 1 and their magnitude gets no gradient.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(params, bora(rank=2), ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)[0] == (2 + 1) * (6 + 4)
        True

    References:
        Wang et al., BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation, arXiv
        2412.06441. Not *Block-Diversified LoRA*, which has the same short name.

    Note:
        There is no official code, and the paper's equations were not available to
        us: the formulas are those of two independent implementations by others, which
        agree. One of them differentiates through the norms, the other does not; the
        default here is the exact gradient. The merged kernel differs from the base by
        a matrix of full rank: there is no plain LoRA that equals it.
    """
    check_options(
        "bora",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        positive={"eps": eps},
        choices={"order": (order, ORDERS), "scaling": (scaling, SCALINGS)},
    )
    first, last = order

    def init(key, kernel, rank, alpha):
        a, b = zero_factors(key, kernel.shape, rank, "uniform", kernel.dtype)
        squares = {axis: square_norms(kernel, axis) for axis in order}
        norms = {axis: safe_sqrt(squares[axis]) for axis in order}
        frozen = {f"live_{axis}": live_features(norms[axis]) for axis in order}
        frozen["scale"] = scale_leaf(alpha, rank, scaling, kernel.dtype)
        frozen[f"w2_{first}"] = squares[first]
        magnitudes = {f"m_{axis}": norms[axis] for axis in order}
        return frozen, {"a": a, "b": b} | magnitudes

    held = jax.lax.stop_gradient if stop_gradient_norms else lambda x: x

    def factors(kernel, frozen, trainable, call):
        del call
        a, b = trainable["a"], frozen["scale"] * trainable["b"]

        def ratio(axis, base, weight=None):
            squares = factored_square_norms(
                kernel, held(a), held(b), axis, base, weight, eps=eps
            )
            live = frozen[f"live_{axis}"]
            return magnitude_ratio(trainable[f"m_{axis}"], squares, live)

        scale = {first: ratio(first, frozen[f"w2_{first}"])}
        weight = held(scale[first] ** 2)
        scale[last] = ratio(last, square_norms(kernel, last, weight), weight)
        term = Term(a, b, drop=dropout)
        return Factors((term,), c=scale["in"], o=scale["out"])

    def report(frozen, trainable):
        del trainable
        return {f"dead_{axis}": jnp.sum(~frozen[f"live_{axis}"]) for axis in order}

    return Adapter(
        init=init,
        factors=factors,
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
        report=report,
    )
