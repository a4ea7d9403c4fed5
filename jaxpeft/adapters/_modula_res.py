"""MoDULA-Res: domain experts behind a universal one (arXiv 2412.07405)."""

from typing import Literal

from jaxpeft.parts import NUMBERS, Router, domain_mixture
from jaxpeft.tree import Adapter, method


@method(numbers=(*NUMBERS, "slope"))
def modula_res(
    domains: tuple[str, ...] = (),
    rank: int = 8,
    rank_universal: int = 16,
    alpha: int | float | None = None,
    slope: int | float = 0.01,
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
    stale: tuple[str, ...] = (),
    folded: bool = False,
) -> Adapter:
    r"""Returns MoDULA-Res: domain experts that read the universal expert's output.

    .. math::
        h = s_u\, (x a_u)\, b_u, \qquad
        y = x W + h + \sum_{i=1}^{n} g_i\, s_i\, \mathrm{leaky}(h a_i)\, b_i, \qquad
        g = \mathrm{softmax}(x w) \text{ for each token}

    with :math:`\mathrm{leaky}(v) = v` for :math:`v \ge 0`, else ``slope`` times v. It
    is computed as :math:`h a_i = s_u (x a_u) (b_u a_i)`, the last product once a step,
    so ``h`` is never formed. Trained in stages (``jaxpeft.mixtures.stage``):

    ===============  =====================  ==================================
    stage            trains                 gates of the domains
    ===============  =====================  ==================================
    "universal"      :math:`a_u, b_u`       0
    "domain:NAME"    that domain's a, b     NAME 1, all others 0
    "router"         the router             the router's
    "all"            everything at once     the router's
    ===============  =====================  ==================================

    At the start ``a`` is uniform up to 1/sqrt(its in size), ``b`` is 0 and the
    router's columns are Normal(0, router_std^2): the adapted model is the base. While
    :math:`b_u` is 0, no domain and no router has a gradient: the order of the stages
    is a condition.

    Notation:
        paper          PyTorch, HF PEFT         here
        W_0            weight [out, in]         kernel [d_in, d_out] = weight.T
        A, B           lora_A, lora_B           a.universal [d_in, r], b.universal
        A_i            lora_A.weight [r, out]   a.NAME [d_out, r] = lora_A.T
        B_i            lora_B.weight [out, r]   b.NAME [r, d_out] = lora_B.T
        W_R            [n, in]                  router.NAME [d_in, 1], a column each

    Args:
        domains: names, in the order of their gates; ``mixtures.add_domain`` adds more.
        rank: r of each domain; ``rank_pattern`` of ``attach`` overrides it per site.
        rank_universal: r of the universal expert.
        alpha: ``None``: every scale s is 1; else alpha over the expert's rank.
        slope: of the leaky ReLU below 0; the paper does not give it.
        dropout: probability in [0, 1) of dropping an entry of the experts' input.
        top_k: experts kept for each token; ``None``: all.
        temperature: what the router's logits are divided by.
        router_std: standard deviation of a new column of the router.
        balance_coef: weight of the balance loss, see ``mixtures.auxiliary``.
        z_coef: weight of the router's z-loss.
        aux_reduce: whether these two losses are summed over the sites, or averaged.
        stage: see the table; ``mixtures.stage`` changes and checks it.
        gates: fixed numbers, for the universal expert (the weight of h) and each
            domain, in place of the stage's; ``mixtures.fix_gates`` sets them.
        inactive: domains that no token is routed to yet; ``mixtures`` keeps the list.
        stale: domains trained behind a universal expert that has changed since.
        folded: whether the kernel holds :math:`W + s_u a_u b_u`; see
            ``mixtures.fold_universal``.

    Returns:
        An ``Adapter``. Leaves that do not train in its stage are frozen ones.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jax, jaxpeft as jp
        >>> params = {"query": {"kernel": jax.numpy.ones((6, 4))}}
        >>> adapter = modula_res(("law", "code"), rank=1, stage="domain:law")
        >>> adapted = jp.attach(params, adapter, ["query"], key=jax.random.key(0))
        >>> jp.count(adapted)[0] == 4 + 4
        True

    References:
        MoDULA: Mixture of Domain-Specific and Universal LoRA for Multi-Task Learning,
        arXiv 2412.07405, eq. 1 to 12. No code of the authors' is known.

    Note:
        A domain sees an input only through the ``rank_universal`` numbers of
        :math:`x a_u`: what lies outside of them is out of its reach.
    """
    router = Router(
        top_k, True, temperature, router_std, balance_coef, z_coef, aux_reduce
    )
    return domain_mixture(
        "modula_res",
        residual=True,
        domains=domains,
        rank=rank,
        rank_universal=rank_universal,
        alpha=alpha,
        slope=slope,
        dropout=dropout,
        router=router,
        stage=stage,
        gates=gates,
        inactive=inactive,
        stale=stale,
        folded=folded,
    )
