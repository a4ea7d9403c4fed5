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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxpeft.numerics import gated, gated_copies
from jaxpeft.parts._options import check_options, scale_leaf
from jaxpeft.parts._router import Router, Rule, empty_pair, row_gates
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where


@functools.cache
def _apply(rule: Rule | None, shared: bool, ranks: tuple[int, ...]):
    def apply(temperature, active, rows, routed, h):
        if rule is None:
            gates = row_gates(rows, h)
        else:
            gates = rule.gates(routed, temperature, active)[2]
        return gated_copies(h, gates) if shared else gated(h, gates, ranks)

    return apply


def drop_entries(key, leaf, rate: float):
    """Inverted dropout of a leaf's entries; the key stays good for another call."""
    key = jax.random.fold_in(key, 0)
    keep = jax.random.bernoulli(key, 1 - rate, leaf.shape)
    kept = leaf / jnp.asarray(1 - rate, leaf.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(leaf))


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
    """The options of each layer: equal groups of layers from the bottom.

    Where layers do not divide, layer i of L is in group floor(i G / L) of G.
    """
    groups = [i * len(experts) // layers for i in range(layers)]
    if layers % len(experts):
        sizes = [groups.count(i) for i in range(len(experts))]
        warnings.warn(
            f"experts={list(experts)} over {layers} layers, which do not divide: the "
            f"groups have {sizes} layers from the bottom up",
            stacklevel=2,
        )
    each = [experts[i] for i in groups]
    least = lambda n: None if top_k is None else min(top_k, n)
    return [{"experts": n, "top_k": least(n)} for n in each]


def mixture(
    name: str,
    *,
    rank: int,
    alpha: int | float | None,
    experts: int | tuple[int, ...],
    shared_a: bool,
    start: Literal["kaiming", "gaussian"],
    router: Router,
    a_std: int | float | None = None,
    dropout: int | float = 0.0,
    dropout_on: Literal["a", "b", "input"] = "input",
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
        start: ``a`` is uniform up to 1/sqrt(d_in), or normal.
        a_std: its standard deviation where it is normal; ``None``: 1/sqrt(d_in).
        router: how gates follow from the input.
        dropout: probability of dropping an entry.
        dropout_on: of the input (a mask a call), or of the leaf ``a`` or ``b`` (a mask
            a step and layer, for all tokens and experts).
        gates: fixed gates in place of the router's.

    Raises:
        ValueError: an option outside of what is allowed, more experts kept than there
            are, or a router of zeros over a shared ``a``.
    """
    check_options(name, rank=rank, alpha=alpha, dropout=dropout)
    _check_experts(name, experts, router.top_k, gates)
    most = max(experts) if isinstance(experts, tuple) else experts
    router.check(name, most)
    if shared_a and router.std == 0:
        raise ValueError(
            f"`router_std` of {name} is 0: experts that share `a` and start with b = 0 "
            "under a router of zeros get equal gradients for ever, and stay one plain "
            f"LoRA; write {name}(router_std=0.02)."
        )
    drop = dropout if dropout_on == "input" else 0.0

    def init(key, kernel, rank, alpha):
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}")
        d_in, d_out = kernel.shape
        shape = (d_in, rank) if shared_a else (most, d_in, rank)
        bound = 1 / math.sqrt(d_in)
        std = None if start == "kaiming" else bound if a_std is None else a_std
        a, w = _draw_both(
            key, (shape, std), ((d_in, most), router.std), kernel.dtype, bound
        )
        frozen = {
            "scale": scale_leaf(alpha, rank, "alpha/r", kernel.dtype),
            "active": jnp.ones((most,), bool),
        }
        return frozen, {
            "a": a,
            "b": jnp.zeros((most, rank, d_out), kernel.dtype),
            "router": w,
        }

    def factors(kernel, frozen, trainable, call):
        del kernel
        leaves = {**frozen, **trainable}
        a, b, active = leaves["a"], frozen["scale"] * leaves["b"], frozen["active"]
        if dropout and not drop and call.step_key is not None:
            if dropout_on == "a":
                a = drop_entries(call.step_key, a, dropout)
            else:
                b = drop_entries(call.step_key, b, dropout)
        (n, rank, d_out), rows, mask = b.shape, call.gates, call.mask
        gate = Gate(names=tuple(map(str, range(n))))
        if gates is None and rows is None:
            report = router.rule.report(leaves["temperature"], active, mask)
            gate = dataclasses.replace(gate, reads=leaves["router"], report=report)
        fixed = tuple(map(bool, gates)) if gates is not None else (True,) * (n == 1)
        if rows is None and fixed:
            weights = frozen["gates"] if any(gates or ()) else None
            pair = _fixed(a, b, fixed, weights, shared_a)
            return Factors((Term(*pair, drop=drop, gate=gate),))
        rule = router.rule if rows is None else None
        apply = _apply(rule, shared_a, (rank,) * n)
        apply = Partial(apply, leaves["temperature"], active, rows)
        pair = _side_by_side(a), b.reshape(n * rank, d_out)
        gate = dataclasses.replace(gate, apply=apply)
        return Factors((Term(*pair, drop=drop, gate=gate),))

    layers = None
    if isinstance(experts, tuple):
        layers = functools.partial(_spread, experts, router.top_k)
    return Adapter(
        init=init,
        factors=factors,
        penalty=router.penalty(),
        where=Where(
            rank=rank, alpha=float(rank if alpha is None else alpha), layers=layers
        ),
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


def _fixed(a, b, there: Sequence[bool], gates, shared: bool) -> tuple:
    """Experts under gates of which is known beforehand which are 0: one pair."""
    chosen = [k for k, here in enumerate(there) if here]
    if not chosen:
        return empty_pair(a.shape[-2], b.shape[-1], b.dtype)
    ups = [b[k] if gates is None else b[k] * gates[k].astype(b.dtype) for k in chosen]
    if shared:
        return a, functools.reduce(jnp.add, ups)
    a = a[jnp.array(chosen)]
    return _side_by_side(a), jnp.concatenate(ups, 0)
