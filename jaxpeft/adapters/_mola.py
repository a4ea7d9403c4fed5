"""MoLA: LoRA experts, more of them in higher layers (arXiv 2402.08562)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, mixture
from jaxpeft.tree import Adapter, method


@method(numbers=NUMBERS, drawn=("router_std",))
def mola(
    rank: int = 8,
    alpha: int | float | None = 16,
    experts: int | tuple[int, ...] = (2, 4, 6, 8),
    top_k: int | None = 2,
    dropout: int | float = 0.05,
    router_std: int | float | None = None,
    renormalise: bool = True,
    temperature: int | float = 1.0,
    balance_coef: int | float = 0.0,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    gates: tuple[int | float, ...] | None = None,
) -> Adapter:
    r"""Returns MoLA: LoRAs of which a router keeps two, token by token.

    .. math::
        y = x W + s \sum_{k=1}^{N} g_k\, (x a_k)\, b_k, \qquad
        g = \mathrm{softmax}(x w \text{ of the } K \text{ largest})

    with another N in each quarter of the layers. ``a`` and the router start uniform up
    to 1/sqrt(d_in), ``b`` as 0: at the start the adapted model is the base.

    Notation:
        paper       PyTorch                 here
        A_i         lora_A.weight [r, in]   a [N, d_in, r]
        B_i         lora_B.weight [out, r]  b [N, r, d_out]
        W_i^j       router [N, in]          router [d_in, N], float32

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale, s = alpha / r; ``None`` means ``rank``.
        experts: N; or a list with one N for each layer, or for each of equal groups of
            layers from the bottom. Layers are counted along a stack, or by the first
            number in a path.
        top_k: K; layers with fewer experts keep all. ``None``: all everywhere.
        dropout: probability in [0, 1) of dropping an entry of the experts' input, one
            mask for all of them.
        router_std: standard deviation of the router at the start; ``None``: it starts
            uniform up to 1/sqrt(d_in).
        renormalise: whether the gates of the kept experts add up to 1.
        temperature: what the router's logits are divided by.
        balance_coef: weight of the balance loss, see ``mixtures.auxiliary``; the
            authors' code has 0.001, turned off.
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
        ...     params, mola(rank=2, experts=3), ["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 3 * 2 * (6 + 4) + 6 * 3
        True

    References:
        Gao et al., Higher Layers Need More LoRA Experts, arXiv 2402.08562, eq. 1 to 4.
        Code: GCYZSL/MoLA.

    Note:
        The authors' code pools the routers of a layer before it forms the balance loss
        and counts padding; here each site has its own, and padding is masked.
    """
    router = Router(
        top_k, renormalise, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return mixture(
        "mola",
        rank=rank,
        alpha=alpha,
        experts=experts,
        shared_a=False,
        start="kaiming",
        dropout=dropout,
        router=router,
        gates=gates,
    )
