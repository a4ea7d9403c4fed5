"""AdaLoRA: low-rank triplets whose number training decides (arXiv 2303.10512)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.numerics import gram_distance
from jaxpeft.parts import PeftForm, check_options, peft_form
from jaxpeft.tree import Adapter, Factors, Penalty, Term, Where, method

STD = 0.02  # of a and b at the start
OFFSET = 1e-5  # added to the rank in the scale's divisor, as everybody does


@method(numbers=("gamma",))
def adalora(
    rank: int = 12,
    alpha: int | float | None = None,
    gamma: int | float = 0.5,
    dropout: int | float = 0.0,
) -> Adapter:
    r"""Returns AdaLoRA: a trained weight for each component, so that some may go.

    .. math::
        y &= x W + \frac{\alpha}{r + 10^{-5}}\, \big((z a)\, \mathrm{diag}(e)\big)\, b,
        \qquad z = \mathrm{dropout}(x) \\
        \text{penalty} &= \frac{\gamma}{2N} \sum_{\text{sites}} \big(
            \lVert a^T a - I \rVert_F + \lVert b b^T - I \rVert_F \big)

    with ``a``, ``b`` drawn from Normal(0, 0.02^2) and ``e`` 0 at the start, so that
    the adapted model is the base. ``rank`` is the number of components at the start;
    ``jaxpeft.allocate.importance`` removes the least important ones during training,
    over all sites together, by setting their entries of ``e`` to 0. Shapes and scale
    never change; ``jaxpeft.allocate.finalise`` cuts what is 0 off.

    Notation:
        paper     HF PEFT               here
        W         weight [out, in]      kernel [d_in, d_out] = weight.T
        Q         lora_A [r, in]        a [d_in, r] = lora_A.T
        P         lora_B [out, r]       b [r, d_out] = lora_B.T
        Lambda    lora_E [r, 1]         e [r]
        r_0       init_r                rank
        gamma     orth_reg_weight       gamma

    Args:
        rank: r, at least 1; a budget of half as much more than what is to be left is
            usual.
        alpha: numerator of the scale; ``None`` means ``rank``.
        gamma: weight of the orthogonality terms, >= 0; 0 skips them.
        dropout: probability in [0, 1) of dropping an entry of the path's input.

    Returns:
        An ``Adapter`` with trainable ``a``, ``b`` and ``e``, and frozen ``scale``.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, adalora(rank=3), targets=["query"], key=jax.random.key(0)
        ... )
        >>> jp.count(adapted)[0] == 3 * (6 + 4 + 1)
        True

    References:
        Zhang et al., AdaLoRA, arXiv 2303.10512, section 3.1. HF PEFT:
        ``AdaLoraConfig``.

    Note:
        The paper squares the norms of the penalty; its code and HF PEFT do not, and
        so it is here. HF PEFT adds the penalty only to a model that returns its own
        loss; here it is ``jaxpeft.penalty``'s, as every method's is.
    """
    check_options(
        "adalora", rank=rank, alpha=alpha, dropout=dropout, weights={"gamma": gamma}
    )

    def init(key, kernel, rank, alpha):
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        (d_in, d_out), dtype = kernel.shape, kernel.dtype
        key_a, key_b = jax.random.split(key)
        trainable = {
            "a": STD * jax.random.normal(key_a, (d_in, rank), dtype),
            "b": STD * jax.random.normal(key_b, (rank, d_out), dtype),
            "e": jnp.zeros((rank,), dtype),
        }
        return {"scale": jnp.asarray(alpha / (rank + OFFSET), dtype)}, trainable

    def factors(kernel, frozen, trainable, call):
        del kernel, call
        weights = (frozen["scale"] * trainable["e"])[:, None]
        b = weights * trainable["b"]
        return Factors((Term(trainable["a"], b, drop=dropout),))

    def penalty(frozen, trainable):
        if "gamma" not in frozen:
            return jnp.zeros((), jnp.float32)
        a, b = (
            trainable[n].astype(np.promote_types(trainable[n].dtype, np.float32))
            for n in ("a", "b")
        )
        return frozen["gamma"] / 2 * (gram_distance(a) + gram_distance(b.T))

    return Adapter(
        init=init,
        factors=factors,
        penalty=Penalty(penalty, joined="mean"),
        where=Where(rank=rank, alpha=float(rank if alpha is None else alpha)),
    )


@peft_form(adalora)
def _form(*, rank, gamma, dropout, **_):
    return PeftForm(
        peft_type="ADALORA",
        kinds=("linear", "conv1d"),
        to_leaves=_to_leaves,
        from_leaves=lambda leaves, kind: {
            "a": leaves["lora_A"].T,
            "b": leaves["lora_B"].T,
            "e": leaves["lora_E"].reshape(-1),
        },
        arrange=_arrange,
        fields={
            "orth_reg_weight": gamma,
            "lora_dropout": dropout,
            # PEFT wants a schedule in every config; this one has no pruning left.
            "target_r": rank,
            "total_step": 1,
        },
        rank="init_r",
        patterns=False,
        read=_read,
    )


def _to_leaves(frozen, trainable, kind):
    """All components, those that are pruned with a weight of 0."""
    e = trainable["e"][:, None]
    return {"lora_A": trainable["a"].T, "lora_B": trainable["b"].T, "lora_E": e}


def _arrange(config, module, leaves):
    """Puts the components that PEFT kept back in their places, zeros elsewhere."""
    kept = (config["rank_pattern"] or {}).get(f"{module}.lora_E")
    if kept is None:
        return leaves
    kept = np.asarray(kept, bool).reshape(-1)
    whole = {}
    for name, x in leaves.items():
        rows = x.T if name == "lora_B" else x
        if len(kept) != config["init_r"] or len(rows) != kept.sum():
            raise ValueError(
                f"{name} has {len(rows)} components; rank_pattern keeps {kept.sum()} "
                f"of {len(kept)}, and init_r is {config['init_r']}"
            )
        wide = np.zeros((len(kept), rows.shape[1]), x.dtype)
        wide[kept] = rows
        whole[name] = wide.T if name == "lora_B" else wide
    return whole


def _read(config, kind):
    """The options that a PEFT config means; see ``PeftForm.read``."""
    if config["peft_type"] != "ADALORA" or kind == "embedding":
        return None
    return {
        "rank": config["init_r"],
        "alpha": config["lora_alpha"],
        "gamma": config["orth_reg_weight"],
        "dropout": config["lora_dropout"],
    }
