"""Mixtures of named experts that are trained one after another, in stages.

Every expert has leaves of its own (``a.NAME``, ``b.NAME``, ``router.NAME``), so that
adding, taking off or renaming one leaves all others as they are, byte for byte. A stage
decides which leaves train, and which gates the forward pass uses.
"""

import functools
import hashlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxpeft.numerics import gated
from jaxpeft.parts._options import check_options
from jaxpeft.parts._router import Router, Rule, empty_pair, row_gates, weighing
from jaxpeft.tree import Adapter, Factors, Gate, Term, Where

UNIVERSAL = "universal"
STAGES = ("all", "universal", "router")


def stage_names(domains: tuple[str, ...]) -> list[str]:
    """The stages of a mixture with these domains."""
    return [*STAGES, *(f"domain:{name}" for name in domains)]


def domain_of(stage: str) -> str | None:
    """The domain that a stage trains, if it is one domain's."""
    return stage.removeprefix("domain:") if stage.startswith("domain:") else None


def check_domain(name: Any) -> None:
    """Raises unless a domain's name can be a part of a leaf's."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"a domain's name must be made of letters, digits, '_' and '-', got "
            f"{name!r}; write 'code' or 'law-2'."
        )
    if name == UNIVERSAL:
        raise ValueError(
            f"a domain cannot be named {UNIVERSAL!r}, the name of the expert of all "
            "domains; choose another name."
        )


def _check(domains, stage, gates, inactive, stale, slope, folded) -> None:
    if not (math.isfinite(slope) and 0 <= slope < 1):
        raise ValueError(f"`slope` must be in [0, 1), got {slope}; write slope=0.01.")
    for domain in domains:
        check_domain(domain)
    twice = sorted({d for d in domains if domains.count(d) > 1})
    if twice:
        raise ValueError(f"`domains` names {twice} twice; each needs its own name.")
    if stage not in stage_names(domains):
        raise ValueError(
            f"`stage` must be one of {', '.join(stage_names(domains))}, got {stage!r}."
        )
    for argument, names in (("inactive", inactive), ("stale", stale)):
        unknown = sorted(set(names) - set(domains))
        if unknown:
            raise ValueError(
                f"`{argument}` names {unknown}, which are none of the domains "
                f"{list(domains)}."
            )
    if gates is not None and len(gates) != len(domains) + 1:
        raise ValueError(
            f"`gates` must hold {len(domains) + 1} numbers, for the universal expert "
            f"and then for {list(domains)}, got {gates!r}."
        )
    if folded and stage in ("all", "universal"):
        raise ValueError(
            f"`folded` keeps the universal expert's change in the kernel, but stage "
            f"{stage!r} trains it; write stage='router' or a domain's."
        )


# Cached, for `Partial` compares functions by identity: equal settings, one function.
@functools.cache
def _residual(rule: Rule | None, ranks: tuple[int, ...], universal: bool, there: float):
    """What acts between the factors of experts behind the universal one.

    Args:
        rule: the router's; ``None``: it does not decide.
        ranks: of the domains that are computed.
        universal: whether the pair holds the universal expert's ``b``, before theirs.
        there: how much of the universal expert's change the kernel holds, 1 or 0.
    """

    def apply(temperature, slope, mixing, rows, routed, z):
        # z = x a_u. The domains read h a_i = s_u z (b_u a_i), which is z mixing.
        h = jnp.matmul(z.astype(mixing.dtype), mixing)
        h = jnp.where(h >= 0, h, 0 if slope is None else slope.astype(h.dtype) * h)
        weight = None
        if rule is not None:
            h = gated(h, rule.gates(routed, temperature)[2], ranks)
        elif rows is not None:  # gates of the call: the universal expert's is first
            gates = row_gates(rows, z)
            weight = gates[..., :1].astype(z.dtype) - there
            h = gated(h, gates[..., 1:], ranks)
        if not universal:
            return h
        z = z if weight is None else z * weight
        return jnp.concatenate([z.astype(h.dtype), h], -1)

    return apply


def domain_mixture(
    name: str,
    *,
    residual: bool,
    domains: tuple[str, ...],
    rank: int,
    rank_universal: int,
    alpha: int | float | None,
    slope: int | float = 0.0,
    route_universal: bool = False,
    dropout: int | float = 0.0,
    router: Router,
    stage: str = "all",
    gates: tuple[int | float, ...] | None = None,
    inactive: tuple[str, ...] = (),
    stale: tuple[str, ...] = (),
    folded: bool = False,
) -> Adapter:
    r"""Returns a mixture of a universal expert and one expert for each domain.

    With :math:`h = s_u (x a_u) b_u`, either in parallel or (``residual``) behind it:

    .. math::
        y = x W + g_u h + \sum_i g_i s_i (x a_i) b_i \qquad\text{or}\qquad
        y = x W + h + \sum_i g_i s_i\, \mathrm{leaky}(h a_i)\, b_i

    The second is computed with :math:`h a_i = s_u (x a_u)(b_u a_i)`, so that ``h``,
    which is as wide as the output, is never formed.

    Leaves of one site, in the order of the experts: ``a.NAME [d_in, r]`` (of a domain
    behind the universal expert ``[d_out, r]``), ``b.NAME [r, d_out]``, ``router.NAME
    [d_in, 1]`` where the expert is routed, and with an alpha the scales.

    Args:
        name: the method's, for errors.
        residual: which of the two forms.
        domains: names of the domains, in their order.
        rank: of each domain.
        rank_universal: of the universal expert.
        alpha: numerator of all scales; ``None``: they are 1.
        slope: of the leaky ReLU.
        route_universal: whether the universal expert has a gate beside the domains.
        dropout: probability of dropping an entry of the input.
        router: how gates follow from the input.
        stage: what trains, and which gates are used unless ``gates`` says.
        gates: fixed gates of the universal expert and of each domain.
        inactive: domains that are not routed yet.
        stale: domains trained behind a universal expert that has changed since.
        folded: whether the universal expert's change is stored in the kernel.

    Returns:
        An ``Adapter``; leaves that do not train in its stage are frozen.

    Raises:
        ValueError: an option outside of what is allowed, a name that is not a domain's
            or is there twice, or a folded universal expert that is to train.
    """
    counts = {"rank_universal": rank_universal}
    check_options(name, rank=rank, alpha=alpha, dropout=dropout, counts=counts)
    _check(domains, stage, gates, inactive, stale, slope, folded)
    experts = (UNIVERSAL, *domains)
    # Domains that stand behind the universal expert cannot do without it.
    always = (UNIVERSAL,) if residual else ()
    # The experts with a router's column, and those of them that tokens may be sent to.
    columns = experts if route_universal else domains
    routed = tuple(c for c in columns if c not in inactive)
    router.check(name, len(columns))
    if router.std is None:
        raise ValueError(
            f"`router_std` of {name} must be a number; write {name}(router_std=0.02)."
        )
    names, std = _trained(stage, columns, experts), router.std

    def init(key, kernel, rank, alpha):
        d_in, d_out = kernel.shape
        d_domain = d_out if residual else d_in
        sizes = {UNIVERSAL: (d_in, rank_universal)}
        sizes |= dict.fromkeys(domains, (d_domain, rank))
        # Of each expert's row of numbers the first are its `a`, the last its column.
        most = max(d_in * rank_universal, d_domain * rank)
        leaves = {}
        numbers = _numbers(key, tuple(sizes), most + d_in, kernel.dtype)
        for (expert, (d, r)), u in zip(sizes.items(), numbers, strict=True):
            bound = jnp.asarray(1 / math.sqrt(d), kernel.dtype)
            leaves[f"a.{expert}"] = bound * u[: d * r].reshape(d, r)
            leaves[f"b.{expert}"] = jnp.zeros((r, d_out), kernel.dtype)
            if expert in columns:
                width = jnp.asarray(math.sqrt(2) * std, kernel.dtype)
                leaves[f"router.{expert}"] = width * jax.lax.erf_inv(u[most:])[:, None]
        trainable = {n: leaves.pop(n) for n in names}
        if alpha is not None:
            one = lambda r: jnp.asarray(alpha / r, kernel.dtype)
            leaves |= {"scale": one(rank), "scale_universal": one(rank_universal)}
        return leaves, trainable

    def up(leaves, expert, gate=1.0):
        """An expert's ``b`` with its scale and a gate, a float or an array, inside."""
        b = leaves[f"b.{expert}"]
        scale = leaves.get("scale_universal" if expert == UNIVERSAL else "scale")
        b = b if scale is None else scale * b
        if isinstance(gate, float):
            return b if gate == 1 else gate * b
        return b * gate.astype(b.dtype)

    def weights_of(leaves, rows) -> tuple[dict[str, Any], Rule | None]:
        """The experts that are computed, and the router's rule if it decides.

        Each comes with what its ``b`` is multiplied by: a gate that was given as an
        option, a leaf; else 1.0, also where the router or the call has its gate.
        """
        if rows is not None:
            return dict.fromkeys(experts, 1.0), None
        if gates is not None:
            given = enumerate(zip(experts, gates, strict=True))
            return {e: leaves["gates"][i] for i, (e, gate) in given if gate}, None
        if stage == "universal":
            return {UNIVERSAL: 1.0}, None
        if one := domain_of(stage):
            return dict.fromkeys((*always, one), 1.0), None
        # The softmax of one logit is 1.
        rule = router.rule if len(routed) > 1 else None
        return dict.fromkeys((*always, *routed), 1.0), rule

    def factors(kernel, frozen, trainable, call):
        # One look-up for all: the stage moves leaves between frozen and trained. The
        # mask is asked for in every stage: only who asks sees 0 in padding.
        leaves, rows, mask = {**frozen, **trainable}, call.gates, call.mask
        weights, rule = weights_of(leaves, rows)
        make = _behind if residual else _beside
        pair, apply = make(leaves, weights, rule, rows)
        reads = report = None
        if rule is not None:
            reads = _joined([leaves[f"router.{e}"] for e in routed], 1)
            report = rule.report(leaves["temperature"], None, mask)
        gate = Gate(reads, apply, report, names=experts)
        pair = pair or empty_pair(*kernel.shape, kernel.dtype)
        return Factors((Term(*pair, drop=dropout, gate=gate),))

    def _beside(leaves, weights, rule, rows):
        """The pair of experts that read the input, and what acts between its factors.

        Args:
            leaves: all leaves by name.
            weights: the experts that are computed, and what goes into their ``b``.
            rule: the router's, if it decides.
            rows: gates of the call, if there are some.
        """
        if not weights:
            return (), None
        downs = [leaves[f"a.{e}"] for e in weights]
        ups = [up(leaves, e, weight) for e, weight in weights.items()]
        apply = None
        if rule is not None or rows is not None:
            apply = weighing(rule, False, tuple(a.shape[1] for a in downs))
            apply = Partial(apply, leaves["temperature"], None, rows)
        return (_joined(downs, 1), _joined(ups, 0)), apply

    def _behind(leaves, weights, rule, rows):
        """The same where the domains read the universal expert's output."""
        behind = [e for e in weights if e != UNIVERSAL]
        weight = weights.get(UNIVERSAL, 0.0)
        if folded and rows is None:  # the kernel gives it a weight of 1 already
            weight = weight - 1.0
        # Whether the pair needs its `b`: not if its weight is known to be 0.
        own = not isinstance(weight, float) or weight != 0
        ups, apply = [up(leaves, UNIVERSAL, weight)] if own else [], None
        there = float(folded)  # of the universal expert, in the kernel
        if rows is not None and not behind:
            apply = weighing(None, False, (rank_universal,))
            apply = Partial(apply, leaves["temperature"], None, rows - there)
        if behind:
            downs = _joined([leaves[f"a.{e}"] for e in behind], 1)
            # b_u a_i of all domains, [r_u, sum of ranks]: once a call, not a token.
            mixing = jnp.matmul(up(leaves, UNIVERSAL), downs, precision="highest")
            ups += [up(leaves, e, weights[e]) for e in behind]
            ranks = tuple(leaves[f"b.{e}"].shape[0] for e in behind)
            numbers = leaves["temperature"], leaves.get("slope")
            apply = Partial(_residual(rule, ranks, own, there), *numbers, mixing, rows)
        return ((leaves["a.universal"], _joined(ups, 0)) if ups else ()), apply

    def universal(frozen):
        return (Term(frozen["a.universal"], up(frozen, UNIVERSAL)),)

    return Adapter(
        init=init,
        factors=factors,
        penalty=router.penalty(),
        where=Where(rank=rank, alpha=None if alpha is None else float(alpha)),
        folded=universal if folded else None,
    )


def _numbers(key, experts, size: int, dtype):
    """Uniform numbers in (-1, 1), ``[experts, size]``.

    The key of a row is made of its expert's name, so that an expert starts the same
    whichever others there are.
    """
    digests = [hashlib.sha256(e.encode()).digest()[:4] for e in experts]
    seeds = np.array([int.from_bytes(d, "little") for d in digests], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.split(key, 1)[0], seeds)
    least = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
    draw = lambda k: jax.random.uniform(k, (size,), dtype, least, 1.0)
    return jax.vmap(draw)(keys)


def _trained(stage: str, columns, experts) -> tuple[str, ...]:
    """Names of the leaves that train in a stage."""
    pair = lambda expert: (f"a.{expert}", f"b.{expert}")
    column = tuple(f"router.{expert}" for expert in columns)
    if stage == "router":
        return column
    if stage == "all":
        return sum(map(pair, experts), ()) + column
    return pair(domain_of(stage) or UNIVERSAL)


def _joined(parts: list, axis: int):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
