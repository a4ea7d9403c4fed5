"""HydraLoRA: one ``a``, several ``b``, mixed softly (arXiv 2404.19245)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, mixture
from jaxpeft.tree import Adapter, method


@method(numbers=NUMBERS, drawn=("router_std",))
def hydralora(
    rank: int = 4,
    alpha: int | float | None = 32,
    experts: int | tuple[int, ...] = 4,
    top_k: int | None = None,
    dropout: int | float = 0.05,
    router_std: int | float | None = None,
    renormalise: bool = True,
    temperature: int | float = 1.0,
    balance_coef: int | float = 0.0,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    gates: tuple[int | float, ...] | None = None,
) -> Adapter:
    r"""Returns HydraLoRA: experts that share ``a`` and are mixed softly by token.

    .. math::
        y = x W + s \sum_{k=1}^{N} g_k\, (x a)\, b_k, \qquad
        g = \mathrm{softmax}(x w)

    ``a`` and the router start uniform up to 1/sqrt(d_in), ``b`` as 0: at the start the
    adapted model is the base.

    Notation:
        paper       PyTorch                   here
        A           lora_A.weight [r, in]     a [d_in, r], of all experts
        B_i         lora_B_i.weight [out, r]  b [N, r, d_out]
        W_g         lora_route [N, in]        router [d_in, N], float32

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale, s = alpha / r; ``None`` means ``rank``.
        experts: N; or a list with one N for each layer, or for each of equal groups of
            layers from the bottom. Layers are counted along a stack, or by the first
            number in a path.
        top_k: experts kept for each token; ``None``: all.
        dropout: probability in [0, 1) of dropping an entry of the experts' input.
        router_std: standard deviation of the router at the start, above 0; ``None``:
            it starts uniform up to 1/sqrt(d_in).
        renormalise: whether the gates of the kept experts add up to 1.
        temperature: what the router's logits are divided by.
        balance_coef: weight of the balance loss, see ``mixtures.auxiliary``.
        z_coef: weight of the router's z-loss.
        aux_reduce: whether these two losses are summed over the sites, or averaged.
        gates: fixed numbers, one an expert, in place of the router's.

    Returns:
        An ``Adapter`` with trainable ``a``, ``b`` and ``router``.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, hydralora(rank=2, experts=3), ["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 6 * 2 + 3 * 2 * 4 + 6 * 3
        True

    References:
        Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient
        Fine-Tuning, arXiv 2404.19245, eq. 4 to 6. Code: Clin0212/HydraLoRA.

    Note:
        The authors' code draws a dropout mask for each expert and computes ``x a``
        again for each; here one mask and one product serve all of them.
    """
    router = Router(
        top_k, renormalise, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return mixture(
        "hydralora",
        rank=rank,
        alpha=alpha,
        experts=experts,
        shared_a=True,
        start="kaiming",
        dropout=dropout,
        router=router,
        gates=gates,
    )
