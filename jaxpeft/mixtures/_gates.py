"""Gates that are given, tokens that do not count, and the losses of routers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxpeft.mixtures._nodes import is_residual
from jaxpeft.numerics import balance_and_z
from jaxpeft.parts import UNIVERSAL
from jaxpeft.tree import (
    AdaptedKernel,
    map_nodes,
    nodes,
    seen_penalty,
    structure_of,
    with_call,
    with_options,
)

BASE = "__base__"  # a row whose gates are all 0


def _mixtures(adapted: PyTree) -> list[AdaptedKernel]:
    found = [node for node in nodes(adapted) if structure_of(node).experts]
    if not found:
        raise ValueError("`adapted` has no site with experts; attach a mixture first.")
    return found


def _check_names(node: AdaptedKernel, names: Sequence[str], known) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(
            f"`gates` names {unknown}, which are no experts at {node.site.path!r}; "
            f"there are {list(known)}."
        )


def fix_gates(adapted: PyTree, gates: Mapping[str, float] | None) -> PyTree:
    """Gives all tokens the same gates, in place of the router's or the stage's.

    The numbers are known when the model is traced: experts with gate 0 are not
    computed, and the tree can be merged (not with domains behind a universal expert).

    Args:
        adapted: a tree with mixtures.
        gates: ``{expert: weight}``; others get 0, but a universal expert that others
            stand behind 1. Experts without names are "0", "1", ... ``None``: the
            router's again, or the stage's.

    Returns:
        The tree; its leaves are the same arrays.

    Raises:
        ValueError: an expert is unknown, or sites have other numbers of experts.
    """
    _mixtures(adapted)

    def change(node):
        experts = structure_of(node).experts
        if not experts:
            return node
        if gates is None:
            return with_options(node, gates=None)
        _check_names(node, list(gates), experts)
        weights = {UNIVERSAL: 1.0} if is_residual(node) else {}
        weights |= {name: float(g) for name, g in gates.items()}
        fixed = tuple(weights.get(e, 0.0) for e in experts)
        return with_options(node, gates=fixed)

    return map_nodes(change, adapted)


def with_gates(adapted: PyTree, gates: Array | np.ndarray | Sequence[str] | None):
    """Gives each row of the batch gates of its own, for one call.

    Args:
        adapted: a tree with mixtures, all of the same experts.
        gates: ``[batch, N]`` in the order of the experts, with the universal
            expert first where there is one; or the name of one expert for each row,
            ``"__base__"`` for none. ``None`` takes them off again.

    Returns:
        The tree with the gates beside its leaves. Rows of zeros give the base model's
        output, bit for bit. All experts are computed.

    Raises:
        ValueError: a name or a shape does not fit.
    """
    if gates is None:
        return with_call(adapted, gates=None)
    found = _mixtures(adapted)
    experts = structure_of(found[0]).experts
    for node in found:
        if (others := structure_of(node).experts) != experts:
            raise ValueError(
                f"`gates` need the same experts everywhere; {found[0].site.path!r} has "
                f"{list(experts)}, {node.site.path!r} {list(others)}."
            )
    if not hasattr(gates, "shape"):
        _check_names(found[0], list(gates), (*experts, BASE))
        behind = is_residual(found[0])
        rows = np.zeros((len(gates), len(experts)), np.float32)
        for row, name in zip(rows, gates, strict=True):
            if name != BASE:
                row[experts.index(name)] = 1
                row[0] = 1 if behind else row[0]
        gates = rows
    if gates.ndim != 2 or gates.shape[1] != len(experts):
        raise ValueError(
            f"`gates` must be [batch, {len(experts)}], for {list(experts)}, got shape "
            f"{list(gates.shape)}."
        )
    return with_call(adapted, gates=jnp.asarray(gates))


def with_mask(adapted: PyTree, mask: Array | np.ndarray | None) -> PyTree:
    """Says which tokens count in the sums over gates; outputs stay the same.

    Args:
        adapted: a tree with mixtures.
        mask: 1 for tokens, 0 for padding, of the shape of the leading axes of the
            sites' inputs, mostly ``[batch, length]``; ``None`` takes it off again.

    Returns:
        The tree with the mask beside its leaves.

    Raises:
        ValueError: the tree has no mixture.
    """
    if mask is None:
        return with_call(adapted, mask=None)
    _mixtures(adapted)
    return with_call(adapted, mask=jnp.asarray(mask))


def auxiliary(adapted: PyTree, statistics: Mapping[str, Any]) -> dict[str, Array]:
    r"""Returns the routers' balance and z-losses, and what to add to the task loss.

    .. math::
        \text{penalty} = c_b \sum_{sites} N \sum_k f_k P_k + c_z \sum_{sites} z

    with each method's own ``balance_coef`` and ``z_coef``; ``aux_reduce="mean"`` takes
    means in place of sums. Each layer of a stack is a site.

    Args:
        adapted: the tree that was run.
        statistics: the second result of ``jaxpeft.adapt(fn, taps="own")``.

    Returns:
        Scalars: ``"penalty"``; ``"balance"`` and ``"z"``, means over all sites (1 is
        an even balance), 0 where no router ran.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 3, 6))
        >>> adapter = jp.mosld(rank=1, experts=2)
        >>> adapted = jp.attach(params, adapter, ["w"], key=jax.random.key(0))
        >>> forward = jp.adapt(lambda params, x: x @ params["w"], taps="own")
        >>> y, statistics = forward(with_mask(adapted, jnp.ones((2, 3))), x)
        >>> round(float(auxiliary(adapted, statistics)["penalty"]), 6)
        0.001

    References:
        Fedus et al., arXiv 2101.03961, eq. 4 to 6; Zoph et al., arXiv 2202.08906,
        eq. 5.
    """
    zero = jnp.zeros((), jnp.float32)
    each = [balance_and_z(sums) for sums in statistics.values()]
    if not each:
        return {"penalty": zero, "balance": zero, "z": zero}
    mean = lambda xs: jnp.mean(jnp.concatenate([jnp.ravel(x) for x in xs]))
    balance, z = (mean(x).astype(jnp.float32) for x in zip(*each, strict=True))
    penalty = seen_penalty(adapted, statistics)
    return {"penalty": penalty, "balance": balance, "z": z}
