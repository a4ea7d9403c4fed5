"""Gates of mixtures: a router's logits, softmax with the best kept, sums of use."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpeft.numerics._shown import where_shown


def router_logits(
    routed: Float[Array, "*rows n"],
    active: Bool[Array, " n"] | None = None,
    temperature: int | float | Float[Array, ""] = 1.0,
) -> Float[Array, "*rows n"]:
    r"""Returns a router's logits.

    .. math:: l_k = x w_k / \tau \ \text{ for active experts, else } -\infty

    Args:
        routed: x w, the site's input times one column an expert.
        active: which experts there are; ``None``: all.
        temperature: tau, positive.
    """
    logits = routed
    if not isinstance(temperature, int | float) or temperature != 1:
        logits = logits / jnp.asarray(temperature, logits.dtype)
    if active is not None:
        logits = jnp.where(jnp.broadcast_to(active, logits.shape), logits, -jnp.inf)
    return logits


def kept_experts(
    logits: Float[Array, "*rows n"], top_k: int | None
) -> Bool[Array, "*rows n"]:
    """Returns which experts each token keeps: the ``top_k`` largest logits.

    Args:
        logits: minus infinity for experts that are not there, which are never kept.
        top_k: how many at most; ``None``: all. Of equal logits the first is kept.

    Returns:
        A mask; it has no gradient.

    Example:
        >>> kept_experts(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).tolist()
        [False, True, True, False]
    """
    logits = lax.stop_gradient(logits)
    there = logits > -jnp.inf
    n = logits.shape[-1]
    if top_k is None or top_k >= n:
        return there
    # How many come before: N comparisons of [rows, N], and no sort.
    place = jnp.arange(n).reshape((1,) * (logits.ndim - 1) + (n,))
    before = jnp.zeros(logits.shape, jnp.int32)
    for j in range(n):
        other = logits[..., j : j + 1]
        ahead = (other > logits) | ((other == logits) & (j < place))
        before += ahead.astype(jnp.int32)
    return there & (before < top_k)


def softmax_gates(
    logits: Float[Array, "*rows n"],
    kept: Bool[Array, "*rows n"],
    renormalise: bool = True,
) -> Float[Array, "*rows n"]:
    r"""Returns the gates: the softmax, of the kept experts alone or cut to them.

    .. math:: g = \mathrm{softmax}(l \text{ where kept, else } -\infty)

    is the softmax over all experts, cut to the kept ones and divided by their sum,
    without a division by a small sum; the logits of the others get a gradient of
    exactly 0. Without ``renormalise`` the cut softmax is not divided.

    Args:
        logits: from ``router_logits``.
        kept: from ``kept_experts``; at least one in each row.
        renormalise: whether the gates add up to 1.

    Example:
        >>> logits = jnp.log(jnp.array([4.0, 3.0, 1.0]))
        >>> gates = softmax_gates(logits, kept_experts(logits, 2))
        >>> [round(7 * float(g), 4) for g in gates]
        [4.0, 3.0, 0.0]
    """
    if renormalise:
        return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
    return jnp.where(kept, jax.nn.softmax(logits), 0.0)


def gated(
    h: Float[Array, "*rows r_all"],
    gates: Float[Array, "*gate_rows n"],
    ranks: tuple[int, ...],
) -> Float[Array, "*rows r_all"]:
    """Multiplies each expert's part of a concatenated hidden with its gate.

    Args:
        h: the hidden of all experts, side by side.
        gates: one an expert; leading axes of ``h`` or of length 1.
        ranks: the width of each expert's part.

    Example:
        >>> gated(jnp.ones((1, 3)), jnp.array([[2.0, 5.0]]), (1, 2)).tolist()
        [[2.0, 5.0, 5.0]]
    """
    parts, at, first = [], 0, 0
    for rank, group in itertools.groupby(ranks):
        n = len(list(group))
        part = h[..., at : at + n * rank].reshape(*h.shape[:-1], n, rank)
        part = part * gates[..., first : first + n, None].astype(h.dtype)
        parts.append(part.reshape(*h.shape[:-1], n * rank))
        at, first = at + n * rank, first + n
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def gated_copies(
    z: Float[Array, "*rows r"], gates: Float[Array, "*gate_rows n"]
) -> Float[Array, "*rows n_r"]:
    """Returns one shared hidden times each gate, side by side: ``[*rows, n r]``.

    Args:
        z: the hidden that all experts read.
        gates: one an expert; leading axes of ``z`` or of length 1.

    Example:
        >>> gated_copies(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0]])).tolist()
        [[3.0, 6.0, 5.0, 10.0]]
    """
    spread = gates[..., :, None].astype(z.dtype) * z[..., None, :]
    return spread.reshape(*z.shape[:-1], gates.shape[-1] * z.shape[-1])


def routing_sums(
    logits: Float[Array, "*rows n"],
    kept: Bool[Array, "*rows n"],
    gates: Float[Array, "*rows n"],
    mask: Array | None,
    top_k: int | None,
) -> dict[str, Array]:
    r"""Returns sums over the tokens of each row, from which losses and reports follow.

    With m the mask and p the softmax over all experts, for each row of the batch:

    ================  ======================================================
    "tokens"          :math:`\sum_t m_t`, ``[rows]``
    "gates"           :math:`\sum_t m_t g_{tk}`, ``[rows, n]``
    "load"            :math:`\sum_t m_t [k \text{ kept}] / K`, ``[rows, n]``; with
                      soft gates "gates"
    "probabilities"   :math:`\sum_t m_t p_{tk}`, ``[rows, n]``
    "entropy"         :math:`-\sum_t m_t \sum_k g_{tk} \log g_{tk}`, ``[rows]``
    "z"               :math:`\sum_t m_t\, \mathrm{logsumexp}(l_t)^2`, ``[rows]``
    "active"          above 0 for each expert that there is, ``[n]``
    ================  ======================================================

    Sums of several batches or devices may be added. "gates", "load" and "entropy" have
    no gradient.

    Args:
        logits: from ``router_logits``; the first axis is the batch.
        kept: from ``kept_experts``.
        gates: from ``softmax_gates``.
        mask: 1 for tokens and 0 for padding, of the shape of the leading axes;
            ``None``: no padding.
        top_k: how many are kept; K is that or the number of experts.

    Raises:
        ValueError: the mask is of another shape.
    """
    if logits.ndim == 1:
        logits, kept, gates = logits[None], kept[None], gates[None]
        mask = None if mask is None or mask.ndim else mask[None]
    shape, dtype = logits.shape[:-1], logits.dtype
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}, but a router sees tokens of shape "
            f"{tuple(shape)}; give one entry for each token that reaches the sites"
        )
    real = jnp.ones(shape, bool) if mask is None else mask != 0
    rest = tuple(range(1, len(shape)))
    there = logits != -jnp.inf
    count = jnp.sum(there, -1, keepdims=True)
    logits = where_shown(real, logits)
    gates = where_shown(real, lax.stop_gradient(gates))
    load = gates
    if top_k is not None:
        kept = (kept & real[..., None]).astype(dtype)
        load = kept / jnp.minimum(top_k, count).astype(dtype)
    weight = real.astype(dtype)
    total = lambda v: jnp.sum(v, rest)
    surprise = -gates * jnp.log(jnp.where(gates > 0, gates, 1.0))
    return {
        "tokens": total(weight),
        "gates": total(gates),
        "load": total(load),
        "probabilities": total(jax.nn.softmax(logits) * weight[..., None]),
        "entropy": total(jnp.sum(surprise, -1)),
        "z": total(jax.nn.logsumexp(logits, -1) ** 2 * weight),
        # Where there is no token, none is active: nothing to balance.
        "active": jnp.any(there, tuple(range(there.ndim - 1))).astype(dtype),
    }


def balance_and_z(sums: dict[str, Array]) -> tuple[Array, Array]:
    r"""Returns the balance loss and the z-loss of one router.

    .. math::
        N \sum_k f_k P_k, \qquad
        f_k = \frac{\text{load}_k}{\text{tokens}}, \quad
        P_k = \frac{\text{probabilities}_k}{\text{tokens}}, \qquad
        \frac{\text{z}}{\text{tokens}}

    Balance is 1 when all experts are used equally and N when one takes all (of K = 1);
    N counts the experts that there are, not the padding. ``f`` has no gradient.

    Args:
        sums: from ``routing_sums``; leading axes (layers, uses) stay.

    Returns:
        ``(balance, z)``, of the leading axes; both 0 where there is no token.

    References:
        Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4 to 6, with a mask
        and ``top_k``; Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5, for z.
    """
    tokens = jnp.maximum(jnp.sum(sums["tokens"], -1), 1.0)
    f = lax.stop_gradient(jnp.sum(sums["load"], -2)) / tokens[..., None]
    p = jnp.sum(sums["probabilities"], -2) / tokens[..., None]
    # A number above 0 where sums of several batches were added.
    experts = jnp.sum((sums["active"] > 0).astype(p.dtype), -1)
    balance = experts * jnp.sum(f * p, -1)
    return balance, jnp.sum(sums["z"], -1) / tokens
