"""MoSLD: LoRAs that share ``a``, mixed, with weight dropout (arXiv 2412.08946)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, check_options, mixture
from jaxpeft.tree import Adapter, method


@method(numbers=NUMBERS, drawn=("a_std", "router_std"))
def mosld(
    rank: int = 8,
    alpha: int | float | None = 16,
    experts: int | tuple[int, ...] = 5,
    top_k: int | None = 2,
    dropout: int | float = 0.1,
    dropout_on: Literal["a", "b", "input"] = "a",
    a_std: int | float | None = None,
    router_std: int | float = 0.02,
    renormalise: bool = True,
    temperature: int | float = 1.0,
    balance_coef: int | float = 0.001,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    gates: tuple[int | float, ...] | None = None,
) -> Adapter:
    r"""Returns MoSLD: experts with one ``a`` and each its own ``b``, two a token.

    .. math::
        y = x W + s \sum_{k=1}^{N} g_k\, (x \tilde a)\, b_k, \qquad
        g = \mathrm{softmax}(x w \text{ of the } K \text{ largest}), \qquad
        \tilde a = \frac{m \odot a}{1 - p}

    for each token. The mask m drops entries of the weight ``a``, not of the input: one
    mask a step, site and layer, for all tokens and experts; on only under
    ``with_dropout``. ``a`` starts as Normal(0, a_std^2), ``b`` as 0 and the router as
    Normal(0, router_std^2): at the start the adapted model is the base.

    Notation:
        paper               PyTorch              here
        W_0                 weight [out, in]     kernel [d_in, d_out] = weight.T
        A ("upper")         shared [r, in]       a [d_in, r]
        B_k ("lower")       [out, r]             b [N, r, d_out]
        W_l                 [N, in]              router [d_in, N], float32
        p                                        dropout

    Args:
        rank: r, at least 1; ``rank_pattern`` of ``attach`` overrides it per site.
        alpha: numerator of the scale, s = alpha / r; ``None`` means ``rank``.
        experts: N; or a list with one N for each layer, or for each of equal groups of
            layers from the bottom: the paper's is (8, 6, 4, 2), of which 5 is the mean.
            Of L layers and G groups, layer i is in group floor(i G / L). Layers are
            counted along a stack, or by the first number in a path.
        top_k: K; layers with fewer experts keep all. ``None``: all everywhere.
        dropout: p, in [0, 1); 0 is the paper's MoSL.
        dropout_on: what is dropped: "a"; "b", the paper's ablation; or "input", the
            dropout of LoRA.
        a_std: standard deviation of ``a`` at the start; ``None``: 1/sqrt(d_in).
        router_std: above 0: under a router of zeros all experts would stay equal.
        renormalise: whether the gates of the kept experts add up to 1.
        temperature: what the router's logits are divided by.
        balance_coef: weight of the balance loss, see ``mixtures.auxiliary``; the paper
            has one and prints no number.
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
        ...     params, mosld(rank=2, experts=3), ["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 6 * 2 + 3 * 2 * 4 + 6 * 3
        True

    References:
        MoSLD: An Extremely Parameter-Efficient Mixture-of-Shared LoRAs for Multi-Task
        Learning, arXiv 2412.08946, eq. 1 to 4. No code of the authors' is known.

    Note:
        The paper's eq. 2 keeps an entry with probability p, its text with 1 - p; only
        the text is unbiased under the division by 1 - p, and it is what is done here.
        Its training details give 8, 6, 4, 2 experts from the bottom up; its section
        5.2 finds 2, 4, 6, 8 better.
    """
    check_options("mosld", choices={"dropout_on": (dropout_on, ("a", "b", "input"))})
    router = Router(
        top_k, renormalise, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return mixture(
        "mosld",
        rank=rank,
        alpha=alpha,
        experts=experts,
        shared_a=True,
        start="gaussian",
        a_std=a_std,
        dropout=dropout,
        dropout_on=dropout_on,
        router=router,
        gates=gates,
    )
