"""MoDULA-Flan: a universal and domain experts side by side (arXiv 2412.07405)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, domain_mixture
from jaxpeft.tree import Adapter, method


@method(numbers=NUMBERS)
def modula_flan(
    domains: tuple[str, ...] = (),
    rank: int = 8,
    rank_universal: int = 16,
    alpha: int | float | None = None,
    route_universal: bool = True,
    dropout: int | float = 0.0,
    top_k: int | None = None,
    temperature: int | float = 1.0,
    router_std: int | float = 0.02,
    balance_coef: int | float = 0.0,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    stage: str = "all",
    gates: tuple[int | float, ...] | None = None,
    inactive: tuple[str, ...] = (),
) -> Adapter:
    r"""Returns MoDULA-Flan: one expert for everything, one for each domain, a router.

    .. math::
        y = x W + \sum_{k \in \{u, 1 .. n\}} g_k\, s_k\, (x a_k)\, b_k, \qquad
        g = \mathrm{softmax}(x w) \text{ for each token}

    and it is trained in stages (``jaxpeft.mixtures.stage``):

    ===============  =====================  ==================================
    stage            trains                 gates
    ===============  =====================  ==================================
    "universal"      :math:`a_u, b_u`       universal 1, domains 0
    "domain:NAME"    that domain's a, b     NAME 1, all others 0
    "router"         the router             the router's
    "all"            everything at once     the router's
    ===============  =====================  ==================================

    At the start ``a`` is uniform up to 1/sqrt(d_in), ``b`` is 0 and the router's
    columns are Normal(0, router_std^2): the adapted model is the base.

    Notation:
        paper          PyTorch, HF PEFT        here
        W_0            weight [out, in]        kernel [d_in, d_out] = weight.T
        A_i            lora_A.weight [r, in]   a.NAME [d_in, r] = lora_A.T
        B_i            lora_B.weight [out, r]  b.NAME [r, d_out] = lora_B.T
        W_R            [n + 1, in]             router.NAME [d_in, 1], a column each

    Args:
        domains: names, in the order of their gates; ``mixtures.add_domain`` adds more.
        rank: r of each domain; ``rank_pattern`` of ``attach`` overrides it per site.
        rank_universal: r of the universal expert.
        alpha: ``None``: every scale s is 1; else alpha over the expert's rank.
        route_universal: whether the universal expert has a gate of the router's, or
            is used in its own stage alone.
        dropout: probability in [0, 1) of dropping an entry of the experts' input.
        top_k: experts kept for each token; ``None``: all.
        temperature: what the router's logits are divided by.
        router_std: standard deviation of a new column of the router.
        balance_coef: weight of the balance loss, see ``mixtures.auxiliary``.
        z_coef: weight of the router's z-loss.
        aux_reduce: whether these two losses are summed over the sites, or averaged.
        stage: see the table; ``mixtures.stage`` changes and checks it.
        gates: fixed numbers, for the universal expert and each domain, in place of
            the stage's; ``mixtures.fix_gates`` sets them.
        inactive: domains that no token is routed to yet; ``mixtures`` keeps the list.

    Returns:
        An ``Adapter``. Leaves that do not train in its stage are frozen ones.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapter = modula_flan(("law", "code"), rank=1, stage="domain:law")
        >>> adapted = jp.attach(params, adapter, ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)[0] == 6 + 4
        True

    References:
        MoDULA: Mixture of Domain-Specific and Universal LoRA for Multi-Task Learning,
        arXiv 2412.07405, eq. 1 to 12. No code of the authors' is known.

    Note:
        The paper is silent about ``alpha``, initial values, the router's width and
        what stage trains with which optimiser: the defaults above are ours.
    """
    router = Router(
        top_k, True, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return domain_mixture(
        "modula_flan",
        residual=False,
        domains=domains,
        rank=rank,
        rank_universal=rank_universal,
        alpha=alpha,
        route_universal=route_universal,
        dropout=dropout,
        router=router,
        stage=stage,
        gates=gates,
        inactive=inactive,
    )
