"""A trained pair that starts as a part of the kernel, and leaves the rest of it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxpeft.parts._options import SCALINGS, check_site_rank, scale_leaf
from jaxpeft.parts._peft import lora_form, low_rank_pair, read_lora
from jaxpeft.tree import Adapter, Factors, Term


def residual_pair(
    start: Callable[..., tuple[Any, Any]],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    scaling: str,
    residual: str,
    peft_start: str | None = None,
    peft_kinds: tuple[str, ...] = ("linear", "conv1d"),
) -> Adapter:
    r"""Returns the adapter of a low-rank pair that starts at given factors.

    .. math:: y = x W - s\, (x a_0)\, b_0 + s\, (z a)\, b, \qquad
              a = a_0,\ b = b_0 \text{ at the start}

    so that the output at the start is the base's, and what is trained is a part of
    the kernel itself.

    Args:
        start: ``(key, kernel [d_in, d_out], rank, scale) -> (a_0, b_0)``; ``scale``
            is a Python number.
        rank: the rank where no pattern says another.
        alpha: the numerator of the scale where no pattern says another.
        dropout: probability of dropping an entry of ``z``; ``a_0, b_0`` see ``x``.
        scaling: a name in ``SCALINGS``.
        residual: "separate" leaves the kernel alone and carries the subtraction
            along; "folded" stores ``W - s a_0 b_0`` in its place.
        peft_start: ``init_lora_weights`` of the same factors in HF PEFT; ``None``: it
            has none.
        peft_kinds: the kinds of modules where they are the same there.

    Returns:
        An ``Adapter`` with trainable ``a [d_in, r]`` and ``b [r, d_out]``, and frozen
        ``scale``, ``a0`` and ``b0``.
    """

    def init(key, kernel, rank, alpha):
        check_site_rank(rank, kernel.shape)
        a0, b0 = start(key, kernel, rank, alpha / SCALINGS[scaling](rank))
        scale = scale_leaf(alpha, rank, scaling, kernel.dtype)
        return {"scale": scale, "a0": a0, "b0": b0}, {"a": a0, "b": b0}

    def factors(kernel, frozen, trainable):
        del kernel
        scale = frozen["scale"]
        terms = (Term(trainable["a"], scale * trainable["b"], drop=dropout),)
        if residual == "separate":
            terms += (Term(frozen["a0"], -scale * frozen["b0"]),)
        return Factors(terms)

    def part(frozen):
        product = jnp.matmul(frozen["a0"], frozen["b0"], precision="highest")
        return frozen["scale"] * product

    def read(config, kind):
        return read_lora(config, kind, (peft_start,)) if kind in peft_kinds else None

    peft = lora_form(
        scaling=scaling,
        dropout=dropout,
        kinds=peft_kinds,
        fields={"init_lora_weights": peft_start},
        read=read if peft_start else None,
        pair=low_rank_pair,
        redone=True,
        refusal="" if peft_start else "PEFT does not start from these factors",
    )
    folded = residual == "folded"
    return Adapter(
        init=init,
        factors=factors,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        fold=(lambda kernel, frozen: kernel - part(frozen)) if folded else None,
        unfold=(lambda kernel, frozen: kernel + part(frozen)) if folded else None,
        peft=peft,
    )
