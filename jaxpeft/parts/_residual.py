"""A trained pair that starts as a part of the kernel, which is taken out of it."""

from collections.abc import Callable
from typing import Any

from jaxpeft.parts._options import SCALINGS, check_site_rank, scale_leaf
from jaxpeft.parts._peft import PeftForm, lora_form, read_lora
from jaxpeft.tree import Adapter, Factors, Term, Where


def residual_pair(
    start: Callable[..., tuple[Any, Any]],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    scaling: str,
    residual: str,
) -> Adapter:
    r"""Returns the adapter of a low-rank pair that starts at given factors.

    .. math:: y = x W - s\, (x a_0)\, b_0 + s\, (z a)\, b, \qquad
              a = a_0,\ b = b_0 \text{ at the start}

    so that the output at the start is the base's, and what is trained is a part of
    the kernel itself.

    Args:
        start: ``(key, kernel [d_in, d_out], rank, scale) -> (a_0, b_0)``; ``scale``
            may be traced.
        rank: the rank where no pattern says another.
        alpha: the numerator of the scale where no pattern says another.
        dropout: probability of dropping an entry of ``z``; ``a_0, b_0`` see ``x``.
        scaling: a name in ``SCALINGS``.
        residual: "separate" leaves the kernel alone and carries the subtraction
            along; "folded" stores ``W - s a_0 b_0`` in its place.

    Returns:
        An ``Adapter`` with trainable ``a [d_in, r]`` and ``b [r, d_out]``, and frozen
        ``scale``, ``a0`` and ``b0``.
    """
    folded = residual == "folded"

    def init(key, kernel, rank, alpha):
        check_site_rank(rank, kernel.shape)
        a0, b0 = start(key, kernel, rank, alpha / SCALINGS[scaling](rank))
        scale = scale_leaf(alpha, rank, scaling, kernel.dtype)
        return {"scale": scale, "a0": a0, "b0": b0}, {"a": a0, "b": b0}

    def taken(frozen):
        return (Term(frozen["a0"], -frozen["scale"] * frozen["b0"]),)

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        b = frozen["scale"] * trainable["b"]
        terms = (Term(trainable["a"], b, drop=dropout),)
        return Factors(terms if folded else terms + taken(frozen))

    return Adapter(
        init=init,
        factors=factors,
        where=Where(rank=rank, alpha=alpha),
        folded=taken if folded else None,
    )


def residual_form(
    start: str | None, scaling: str, dropout: float, kinds: tuple[str, ...]
) -> PeftForm:
    """The form of such a method in HF PEFT's files, see ``PeftForm``.

    Args:
        start: ``init_lora_weights`` of the same factors there; ``None``: it has none.
        scaling: a name in ``SCALINGS``.
        dropout: the method's.
        kinds: the kinds of modules where the factors are the same.
    """

    def read(config, kind):
        return read_lora(config, kind, (start,)) if kind in kinds else None

    return lora_form(
        scaling=scaling,
        dropout=dropout,
        kinds=kinds,
        fields={"init_lora_weights": start},
        read=read if start else None,
        redone=True,
        refusal="" if start else "PEFT does not start from these factors",
    )
