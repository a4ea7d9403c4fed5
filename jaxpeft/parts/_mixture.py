"""Mixtures of low-rank experts that are alike and have no names.

``_domain_mixture.py`` has those with names. Gates are applied in rank space: a mixture
of N experts of rank r costs what one pair of rank N r costs, and no array ``[tokens,
experts, d_out]`` exists.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxpeft.parts._options import check_options, scale_leaf
from jaxpeft.parts._router import Router, empty_pair, weighing
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where


def drop_entries(key, leaf, rate: float):
    """Inverted dropout of a leaf's entries; the key stays good for another call."""
    # `fold_in` makes a new key and does not use `key` up, as drawing from it would.
    key = jax.random.fold_in(key, 0)
    keep = jax.random.bernoulli(key, 1 - rate, leaf.shape)
    kept = leaf / jnp.asarray(1 - rate, leaf.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(leaf))


def _check_experts(name, experts, gates) -> None:
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
    if gates is not None and (isinstance(experts, tuple) or len(gates) != experts):
        raise ValueError(
            f"`gates` must hold one number for each of {experts} experts, the same at "
            f"all sites, got {gates!r}; for experts that differ by layer there are none"
        )


def _spread(experts: Sequence[int], top_k: int | None, layers: int) -> list[dict]:
    """The options of each layer: equal groups of layers from the bottom.

    Where L layers do not divide by G groups, layer i is in group floor(i G / L).
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
        shared_a: whether all experts have one ``a``.
        start: how ``a`` starts: "kaiming", uniform up to 1/sqrt(d_in), or "gaussian".
        router: how gates follow from the input.
        a_std: standard deviation of a gaussian ``a``; ``None``: 1/sqrt(d_in).
        dropout: probability of dropping an entry.
        dropout_on: what entries are dropped of: the input, with one mask a call, or the
            leaf ``a`` or ``b``, with one mask a step and layer, for all tokens and
            experts.
        gates: one fixed gate for each expert, in place of the router's.

    Returns:
        An ``Adapter``.

    Raises:
        ValueError: an option outside of what is allowed, more experts kept than there
            are, or a router of zeros over a shared ``a``.
    """
    check_options(name, rank=rank, alpha=alpha, dropout=dropout)
    _check_experts(name, experts, gates)
    # A stack has room for the most experts of its layers; `_spread` says each layer's.
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
        reads = apply = report = None
        if gates is None and rows is None:
            reads = leaves["router"]
            report = router.rule.report(leaves["temperature"], active, mask)
        # Which gates are not 0, where that is known now: of gates that were given, and
        # of a single expert. Otherwise this is empty, and the router decides.
        fixed = tuple(map(bool, gates)) if gates is not None else (True,) * (n == 1)
        if rows is None and fixed:
            weights = frozen["gates"] if any(gates or ()) else None
            pair = _fixed(a, b, fixed, weights, shared_a)
        else:
            rule = router.rule if rows is None else None
            apply = weighing(rule, shared_a, (rank,) * n)
            apply = Partial(apply, leaves["temperature"], active, rows)
            pair = _side_by_side(a), b.reshape(n * rank, d_out)
        # In a stack `n` counts padding, too: `active` is false there.
        gate = Gate(reads, apply, report, names=tuple(map(str, range(n))))
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
    """Draws two leaves, each given as ``(shape, standard deviation)``.

    They are normal, or uniform up to the bound where the deviation is ``None``. If both
    are of one kind, one call of the generator draws them.
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
    """An ``a [N, d_in, r]`` as ``[d_in, N r]``; a shared ``[d_in, r]`` as it is."""
    return a if a.ndim == 2 else jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)


def _fixed(a, b, there: Sequence[bool], gates, shared: bool) -> tuple:
    """The pair ``(a, b)`` of experts under fixed gates, without those whose gate is 0.

    Args:
        a: as the leaf.
        b: as the leaf, with the scale inside.
        there: for each expert, whether its gate is other than 0.
        gates: the gates ``[N]``; ``None``: they are 1.
        shared: whether ``a`` is one for all.
    """
    chosen = [k for k, here in enumerate(there) if here]
    if not chosen:
        return empty_pair(a.shape[-2], b.shape[-1], b.dtype)
    ups = [b[k] if gates is None else b[k] * gates[k].astype(b.dtype) for k in chosen]
    if shared:  # (x a) b_1 + (x a) b_2 = (x a) (b_1 + b_2)
        return a, functools.reduce(jnp.add, ups)
    a = a[jnp.array(chosen)]
    return _side_by_side(a), jnp.concatenate(ups, 0)
