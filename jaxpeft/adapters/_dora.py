"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353)."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpeft.numerics import (
    ZERO_STARTS,
    bottom_factors,
    factored_square_norms,
    live_features,
    magnitude_ratio,
    qr_factors,
    safe_sqrt,
    square_norms,
    top_factors,
    zero_factors,
)
from jaxpeft.parts import (
    LORA_KINDS,
    SCALINGS,
    check_options,
    check_site_rank,
    lora_form,
    peft_form,
    read_lora,
    scale_leaf,
)
from jaxpeft.tree import Adapter, Factors, Term, Where, method

# Where `a` and `b` begin; the last three also carry that beginning along.
STARTS = {
    "pissa": top_factors,
    "milora": bottom_factors,
    "olora": lambda kernel, rank, scale: qr_factors(kernel, rank),
}
INITS = (*ZERO_STARTS, *STARTS)
MAGNITUDE = {"m_out": "lora_magnitude_vector"}  # its name in PEFT's files


@method
def dora(
    rank: int = 8,
    alpha: int | float | None = None,
    dropout: int | float = 0.0,
    init: Literal[
        "uniform", "gaussian", "embedding", "pissa", "milora", "olora"
    ] = "uniform",
    scaling: Literal["alpha/r", "alpha/sqrt_r"] = "alpha/r",
    stop_gradient_norm: bool = True,
    eps: float = 1e-8,
) -> Adapter:
    r"""Returns DoRA: a LoRA for the kernel's direction, a magnitude per out feature.

    With :math:`V = W + s\, a b`, which is never formed,

    .. math::
        n_j = \sqrt{\textstyle\sum_i V_{ij}^2}, \qquad
        y = \big(x W + s\, (z a)\, b\big)\, \frac{m}{n}, \qquad
        z = \mathrm{dropout}(x), \quad s = \alpha / r

    and ``m`` starts as the out-norm of ``W``: at the start the adapted model is the
    base. The norms come from Gram matrices, at two thin matmuls per kernel and step:

    .. math::
        n_j^2 = \sum_i W_{ij}^2 + 2 s\, (W^T a\, b)_{jj} + s^2 (b^T a^T a\, b)_{jj}

    Notation:
        paper      PyTorch, HF PEFT              here
        W_0        weight [out, in]              kernel [d_in, d_out] = weight.T
        A          lora_A.weight [r, in]         a [d_in, r] = lora_A.T
        B          lora_B.weight [out, r]        b [r, d_out] = lora_B.T
        m          lora_magnitude_vector [out]   m_out [d_out]
        ||V||_c    norm(weight, dim=1) [out]     out-norm: over the in axis, [d_out]

    Args:
        rank: r, at least 1.
        alpha: numerator of the scale; ``None`` means ``rank``.
        dropout: probability in [0, 1) of dropping an entry of the low-rank path's
            input. The norms see neither dropout nor its mask.
        init: where ``a`` and ``b`` start. "uniform" (a uniform, b 0) is HF PEFT's,
            "gaussian" and "embedding" are as in ``lora``; "pissa", "milora" and
            "olora" start from the kernel's largest or smallest components or its QR,
            and subtract that start again.
        scaling: "alpha/sqrt_r" is rsLoRA's.
        stop_gradient_norm: whether the norm is a constant for differentiation, as
            the paper proposes to save memory. Here the exact gradient costs one more
            thin matmul and no memory; the magnitude's gradient is the same.
        eps: the norm is clamped at eps, > 0, of the norm of what W and a b bring to it
            (and at 1e-6 of it, float32's own limit, if eps is below).

    Returns:
        An ``Adapter`` with trainable ``a``, ``b`` and ``m_out`` (float32 whatever the
        kernel's dtype), and frozen ``scale``, ``w2_out`` (the kernel's square norms)
        and ``live_out``. Out features with a norm of at most 1e-6 of the root mean
        square are dead: their factor is 1 and their magnitude gets no gradient.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(params, dora(rank=2), ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)[0] == 2 * (6 + 4) + 4
        True

    References:
        Liu et al., DoRA, arXiv 2402.09353, eq. 5; section 4.3 for the constant norm.
        HF PEFT: ``LoraConfig(use_dora=True)``.

    Note:
        Under dropout HF PEFT drops the base path's input as well, at the price of a
        second matmul with the kernel; here dropout is the low-rank path's alone.
        Without dropout both compute the same. An all-zero out feature gives NaN there.
    """
    check_options(
        "dora",
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        positive={"eps": eps},
        choices={"init": (init, INITS), "scaling": (scaling, SCALINGS)},
    )

    def init_leaves(key, kernel, rank, alpha):
        w2_out = square_norms(kernel, "out")
        m_out = safe_sqrt(w2_out)  # of V too: it starts as W
        frozen = {
            "scale": scale_leaf(alpha, rank, scaling, kernel.dtype),
            "w2_out": w2_out,
            "live_out": live_features(m_out),
        }
        if init in ZERO_STARTS:
            a, b = zero_factors(key, kernel.shape, rank, init, kernel.dtype)
        else:
            check_site_rank(rank, kernel.shape)
            scale = alpha / SCALINGS[scaling](rank)
            a, b = STARTS[init](kernel, rank, scale=scale)
            frozen |= {"a0": a, "b0": b}
        return frozen, {"a": a, "b": b, "m_out": m_out}

    def factors(kernel, frozen, trainable, call):
        del call
        pairs = [(trainable["a"], frozen["scale"] * trainable["b"])]
        if init in STARTS:
            pairs.append((-frozen["a0"], frozen["scale"] * frozen["b0"]))
        a = jnp.concatenate([a for a, _ in pairs], 1)
        b = jnp.concatenate([b for _, b in pairs], 0)
        if stop_gradient_norm:
            a, b = jax.lax.stop_gradient((a, b))
        squares = factored_square_norms(kernel, a, b, "out", frozen["w2_out"], eps=eps)
        o = magnitude_ratio(trainable["m_out"], squares, frozen["live_out"])
        terms = (Term(*pairs[0], drop=dropout), *(Term(*pair) for pair in pairs[1:]))
        return Factors(terms, o=o)

    def report(frozen, trainable):
        del trainable
        return {"dead_out": jnp.sum(~frozen["live_out"])}

    return Adapter(
        init=init_leaves,
        factors=factors,
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
        report=report,
    )


@peft_form(dora)
def _form(*, init, scaling, dropout, **_):
    start = init if init in STARTS else True
    kinds = {"pissa": ("linear", "conv1d"), "olora": ("linear",)}
    return lora_form(
        kinds=kinds.get(init, LORA_KINDS),
        scaling=scaling,
        dropout=dropout,
        extra=MAGNITUDE,
        fields={"use_dora": True, "init_lora_weights": start},
        read=_read,
        beside=MAGNITUDE,
        beside_fields={"use_dora": True},
        redone=init in STARTS,
        refusal="PEFT does not start from 'milora'" if init == "milora" else "",
    )


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    start = config.get("init_lora_weights")
    if start in ("pissa", "olora") and kind != "embedding":
        if kind != "linear" and not (start == "pissa" and kind == "conv1d"):
            return None
        options = read_lora(config, kind, (start,), use_dora=True)
    else:
        options = read_lora(config, kind, use_dora=True)
        start = "embedding" if kind == "embedding" else "uniform"
    return None if options is None else options | {"init": start}
