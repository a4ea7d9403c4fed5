"""MoLoRA: a soft mixture of LoRAs (arXiv 2309.05444)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, mixture
from jaxpeft.tree import Adapter, method


@method(numbers=NUMBERS, drawn=("a_std", "router_std"))
def molora(
    rank: int = 4,
    alpha: int | float | None = 16,
    experts: int | tuple[int, ...] = 10,
    top_k: int | None = None,
    dropout: int | float = 0.0,
    a_std: int | float | None = 0.02,
    router_std: int | float = 0.02,
    renormalise: bool = True,
    temperature: int | float = 1.0,
    balance_coef: int | float = 0.0,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    gates: tuple[int | float, ...] | None = None,
) -> Adapter:
    r"""Returns MoLoRA: LoRAs that a router mixes softly, token by token.

    .. math::
        y = x W + s \sum_{k=1}^{N} g_k\, (x a_k)\, b_k, \qquad
        g = \mathrm{softmax}(x w)

    ``a`` starts as Normal(0, a_std^2), ``b`` as 0 and the router as Normal(0,
    router_std^2): at the start the adapted model is the base.

    Notation:
        paper       reference code              here
        A_i         lora_a [N, in, r]           a [N, d_in, r]
        B_i         lora_b [N, r, out]          b [N, r, d_out]
        W_g         router kernel [in, N]       router [d_in, N], float32

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale, s = alpha / r; ``None`` means ``rank``.
        experts: N; or a list with one N for each layer, or for each of equal groups of
            layers from the bottom. Layers are counted along a stack, or by the first
            number in a path.
        top_k: experts kept for each token; ``None``: all.
        dropout: probability in [0, 1) of dropping an entry of the experts' input, one
            mask for all of them.
        a_std: standard deviation of ``a`` at the start; ``None``: 1/sqrt(d_in).
        router_std: standard deviation of the router at the start.
        renormalise: whether the gates of the kept experts add up to 1; the reference
            code's top-k does not, which shrinks the update.
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
        ...     params, molora(rank=2, experts=3), ["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 3 * 2 * (6 + 4) + 6 * 3
        True

    References:
        Zadouri et al., Pushing Mixture of Experts to the Limit: Extremely Parameter
        Efficient MoE for Instruction Tuning, arXiv 2309.05444, eq. 1 to 3. Code:
        for-ai/parameter-efficient-moe.

    Note:
        The reference code holds an array ``[batch, length, N, d_out]``; here gates are
        applied to the ``N r`` hidden numbers of a token.
    """
    router = Router(
        top_k, renormalise, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return mixture(
        "molora",
        rank=rank,
        alpha=alpha,
        experts=experts,
        shared_a=False,
        start="gaussian",
        a_std=a_std,
        dropout=dropout,
        router=router,
        gates=gates,
    )
