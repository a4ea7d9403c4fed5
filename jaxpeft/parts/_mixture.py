"""Mixtures of low-rank experts: what every method with a router is made of.

Here the experts of a site are alike and have no names; ``_domain_mixture.py`` has those
that do. Gates are applied in rank space, so a mixture of N experts of rank r costs what
one pair of rank N r costs, and no array ``[tokens, experts, d_out]`` exists.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxpeft.numerics import (
    gated,
    gated_copies,
    kept_experts,
    router_logits,
    routing_sums,
    softmax_gates,
)
from jaxpeft.parts._options import check_options, scale_leaf
from jaxpeft.tree import Adapter, Factors, Gate, Term

AUX_REDUCE = ("sum", "mean")


class Routing(NamedTuple):
    """How gates follow from logits: the static part of a router.

    Attributes:
        top_k: experts kept for each token; ``None``: all.
        renormalise: whether the gates of the kept ones add up to 1.
        temperature: what logits are divided by.
    """

    top_k: int | None = None
    renormalise: bool = True
    temperature: float = 1.0

    def gates(self, routed, active=None):
        """``(logits, kept, gates)`` of an input's product with the router."""
        logits = router_logits(routed, active, self.temperature)
        kept = kept_experts(logits, self.top_k)
        return logits, kept, softmax_gates(logits, kept, self.renormalise)

    def report(self, active, mask):
        """What a gate reports: sums over its input; see ``numerics.routing_sums``."""
        return Partial(_report(self), active, mask)


# Partial compares its function by identity: one for equal settings.
@functools.cache
def _report(routing: Routing):
    def report(active, mask, routed):
        return routing_sums(*routing.gates(routed, active), mask, routing.top_k)

    return report


def row_gates(rows, h):
    """Gates ``[batch, N]`` given with the call, for a hidden ``[batch, ..., r]``."""
    if h.ndim < 2 or rows.shape[0] != h.shape[0]:
        raise ValueError(
            f"`gates` are for a batch of {rows.shape[0]} rows, but a site's input has "
            f"leading axes {tuple(h.shape[:-1])}; the first must be the batch"
        )
    return rows.reshape(rows.shape[0], *(1,) * (h.ndim - 2), rows.shape[-1])


@functools.cache
def _apply(routing: Routing | None, shared: bool, ranks: tuple[int, ...]):
    def apply(active, rows, routed, h):
        if routing is None:
            gates = row_gates(rows, h)
        else:
            gates = routing.gates(routed, active)[2]
        return gated_copies(h, gates) if shared else gated(h, gates, ranks)

    return apply


def drop_entries(key, leaf, rate: float):
    """Inverted dropout of a leaf's entries; the key stays good for another call."""
    key = jax.random.fold_in(key, 0)
    keep = jax.random.bernoulli(key, 1 - rate, leaf.shape)
    kept = leaf / jnp.asarray(1 - rate, leaf.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(leaf))


def check_routing(
    name: str,
    *,
    top_k: int | None,
    temperature: int | float,
    balance_coef: int | float,
    z_coef: int | float,
    aux_reduce: str,
    router_std: int | float | None,
) -> None:
    """Raises unless the options of a router are of use."""
    check_options(
        name,
        weights={"balance_coef": balance_coef, "z_coef": z_coef},
        positive={"temperature": temperature},
        choices={"aux_reduce": (aux_reduce, AUX_REDUCE)},
    )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"`top_k` must be a whole number from 1 up, or None for all experts, got "
            f"{top_k!r}; write {name}(top_k=2)."
        )
    if router_std is not None and not (math.isfinite(router_std) and router_std >= 0):
        raise ValueError(f"`router_std` of {name} must be at least 0, got {router_std}")


def warn_of_idle_router(
    name: str, routing: Routing, experts: int, trained_by: float, stacklevel: int
) -> None:
    """Warns where every gate is 1 and no loss but the task's reaches the router."""
    if routing.top_k == 1 and experts > 1 and routing.renormalise and not trained_by:
        warnings.warn(
            f"{name}(top_k=1) without `balance_coef`: the gates of the kept experts "
            "add up to 1, so every gate is 1 and the router never learns; write a "
            "balance_coef, keep more experts, or, where there is that option, "
            "renormalise=False",
            stacklevel=stacklevel + 1,
        )


def _check_experts(name, experts, top_k, gates) -> None:
    each = experts if isinstance(experts, tuple) else (experts,)
    for n in each:
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(
                f"`experts` must be whole numbers from 1 up, got {experts!r}; write "
                f"{name}(experts=4), or a list with one number for each layer or "
                "group of layers."
            )
    if not each:
        raise ValueError(f"`experts` is empty; write {name}(experts=4).")
    if top_k is not None and top_k > max(each):
        raise ValueError(
            f"`top_k` is {top_k}, but there are at most {max(each)} experts; write "
            f"{name}(experts={experts!r}, top_k={max(each)}) or give more experts."
        )
    if gates is not None and (isinstance(experts, tuple) or len(gates) != experts):
        raise ValueError(
            f"`gates` must hold one number for each of {experts} experts, the same at "
            f"all sites, got {gates!r}; for experts that differ by layer there are none"
        )


def _spread(experts: Sequence[int], top_k: int | None, layers: int) -> list[dict]:
    """The options of each layer: equal groups of layers from the bottom."""
    if layers % len(experts):
        raise ValueError(
            f"`experts` has {len(experts)} numbers, which do not divide {layers} "
            f"layers into equal groups; give one number, or {layers}"
        )
    each = [n for n in experts for _ in range(layers // len(experts))]
    least = lambda n: None if top_k is None else min(top_k, n)
    return [{"experts": n, "top_k": least(n)} for n in each]


def mixture(
    name: str,
    *,
    rank: int,
    alpha: int | float | None,
    experts: int | tuple[int, ...],
    shared_a: bool,
    top_k: int | None,
    start: Literal["kaiming", "gaussian"],
    a_std: int | float | None = None,
    router_std: int | float | None = None,
    dropout: int | float = 0.0,
    dropout_on: Literal["a", "b", "input"] = "input",
    renormalise: bool = True,
    temperature: int | float = 1.0,
    balance_coef: int | float = 0.0,
    z_coef: int | float = 0.0,
    aux_reduce: Literal["sum", "mean"] = "sum",
    gates: tuple[int | float, ...] | None = None,
) -> Adapter:
    r"""Returns a mixture of experts that are alike.

    .. math::
        y = x W + s \sum_k g_k\, (x a_k)\, b_k, \qquad
        g = \mathrm{softmax}(x w / \tau \text{ of the kept experts})

    Leaves of one site: ``a [N, d_in, r]``, or ``[d_in, r]`` where all experts share it;
    ``b [N, r, d_out]``, 0 at the start; ``router [d_in, N]``; frozen ``scale`` and
    ``active [N]``, which is false in the padding of a stack.

    Args:
        name: the method's, for errors.
        rank: r.
        alpha: numerator of the scale; ``None`` means ``rank``.
        experts: N, or one N for each layer or equal group of layers.
        shared_a: whether the experts have one ``a``.
        top_k: experts kept for each token, ``None``: all.
        start: ``a`` is uniform up to 1/sqrt(d_in), or normal.
        a_std: its standard deviation where it is normal; ``None``: 1/sqrt(d_in).
        router_std: that of the router; ``None``: uniform up to 1/sqrt(d_in).
        dropout: probability of dropping an entry.
        dropout_on: of the input (a mask a call), or of the leaf ``a`` or ``b`` (a mask
            a step and layer, for all tokens and experts).
        renormalise: whether the gates of the kept experts add up to 1.
        temperature: tau.
        balance_coef: weight of the balance loss that ``mixtures.auxiliary`` gives.
        z_coef: weight of its z-loss.
        aux_reduce: how it joins the sites.
        gates: fixed gates in place of the router's.

    Raises:
        ValueError: an option outside of what is allowed, more experts kept than there
            are, or a router of zeros over a shared ``a``.
    """
    check_options(name, rank=rank, alpha=alpha, dropout=dropout)
    check_routing(
        name,
        top_k=top_k,
        temperature=temperature,
        balance_coef=balance_coef,
        z_coef=z_coef,
        aux_reduce=aux_reduce,
        router_std=router_std,
    )
    _check_experts(name, experts, top_k, gates)
    most = max(experts) if isinstance(experts, tuple) else experts
    if shared_a and router_std == 0:
        raise ValueError(
            f"`router_std` of {name} is 0: experts that share `a` and start with b = 0 "
            "under a router of zeros get equal gradients for ever, and stay one plain "
            f"LoRA; write {name}(router_std=0.02)."
        )
    routing = Routing(top_k, renormalise, temperature)
    drop = dropout if dropout_on == "input" else 0.0
    warn_of_idle_router(name, routing, most, balance_coef + z_coef, stacklevel=5)

    def init(key, kernel, rank, alpha):
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        d_in, d_out = kernel.shape
        shape = (d_in, rank) if shared_a else (most, d_in, rank)
        bound = 1 / math.sqrt(d_in)
        std = None if start == "kaiming" else bound if a_std is None else a_std
        a, router = _draw_both(
            key, (shape, std), ((d_in, most), router_std), kernel.dtype, bound
        )
        frozen = {
            "scale": scale_leaf(alpha, rank, "alpha/r", kernel.dtype),
            "active": jnp.ones((most,), bool),
        }
        return frozen, {
            "a": a,
            "b": jnp.zeros((most, rank, d_out), kernel.dtype),
            "router": router,
        }

    def factors(kernel, frozen, trainable):
        del kernel
        leaves = {**frozen, **trainable}
        a, b, router = leaves["a"], frozen["scale"] * leaves["b"], leaves["router"]
        if "key" in frozen:
            if dropout_on == "a":
                a = drop_entries(frozen["key"], a, dropout)
            else:
                b = drop_entries(frozen["key"], b, dropout)
        n, rank, d_out = b.shape
        rows, active = frozen.get("gates"), frozen["active"]
        names = tuple(map(str, range(n)))
        gate = None
        if gates is None and rows is None:
            report = routing.report(active, frozen.get("mask"))
            gate = Gate(router, report=report, names=names)
        fixed = gates if gates is not None else (1.0,) * (n == 1)
        if rows is None and fixed:
            pair = _fixed(a, b, fixed, shared_a)
            return Factors(pair and (Term(*pair, drop=drop, gate=gate),))
        kind = routing if rows is None else None
        apply = Partial(_apply(kind, shared_a, (rank,) * n), active, rows)
        gate = dataclasses.replace(gate or Gate(names=names), apply=apply)
        pair = _side_by_side(a), b.reshape(n * rank, d_out)
        return Factors((Term(*pair, drop=drop, gate=gate),))

    per_layer = None
    if isinstance(experts, tuple):
        per_layer = functools.partial(_spread, experts, top_k)
    return Adapter(
        init=init,
        factors=factors,
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dropout=dropout,
        dropout_on="input" if dropout_on == "input" else "leaves",
        per_layer=per_layer,
        experts=tuple(map(str, range(most))),
    )


def _draw_both(key, one, other, dtype, bound: float) -> tuple[Any, Any]:
    """Two leaves ``(shape, standard deviation)``, uniform up to a bound without one.

    From one call of the generator where both are of one kind.
    """
    draw = lambda key, size, std: (
        jax.random.uniform(key, size, dtype, -bound, bound)
        if std is None
        else jax.random.normal(key, size, dtype)
    )
    sizes = [math.prod(shape) for shape, _ in (one, other)]
    if (one[1] is None) == (other[1] is None):
        flat = draw(key, (sum(sizes),), one[1])
        parts = [flat[: sizes[0]], flat[sizes[0] :]]
    else:
        keys = jax.random.split(key)
        pairs = zip(keys, sizes, (one[1], other[1]), strict=True)
        parts = [draw(k, (size,), std) for k, size, std in pairs]
    return tuple(
        x.reshape(shape) * jnp.asarray(1 if std is None else std, dtype)
        for x, (shape, std) in zip(parts, (one, other), strict=True)
    )


def _side_by_side(a):
    """``[N, d_in, r]`` as ``[d_in, N r]``; a shared one as it is."""
    return a if a.ndim == 2 else jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)


def _fixed(a, b, gates: Sequence[float], shared: bool) -> tuple:
    """Experts under gates known beforehand: one low-rank pair, or none."""
    chosen = [(k, g) for k, g in enumerate(gates) if g]
    if not chosen:
        return ()
    ups = [b[k] if g == 1 else b[k] * jnp.asarray(g, b.dtype) for k, g in chosen]
    if shared:
        return a, functools.reduce(jnp.add, ups)
    a = a[jnp.array([k for k, _ in chosen])]
    return _side_by_side(a), jnp.concatenate(ups, 0)
