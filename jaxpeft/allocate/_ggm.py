"""Which components go on training: those a graph ties to the most important ones.

A node is one component of a low-rank site (one column of ``a``, one row of ``b``), or
one bias that is trained by itself. All nodes train at first, and their scores are
recorded; then, once and on the host, some are chosen, and the others rest.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxpeft.allocate._allocation import Allocation, SiteRank
from jaxpeft.allocate._allocator import Allocator
from jaxpeft.allocate._choices import (
    NodeSite,
    by_node,
    choose_leaves,
    node_masks,
    node_sites,
    node_sizes,
    pick,
)
from jaxpeft.numerics import (
    NodeScores,
    Ranking,
    important_nodes,
    node_scores,
    rank_correlation,
    rank_nodes,
    select_nodes,
)
from jaxpeft.tree import combine

IMPORTANT, SELECTED = 0.07, 0.14  # of all nodes: the authors' 30 and 60 of 434
BETA = 0.85  # of both running means, as everybody has it
OTHERS = ("ridge", "score", "cov")  # what a choice by the graph is compared with


class GraphState(NamedTuple):
    """The state of ``ggm``.

    Attributes:
        samples: ``[collect_steps, n]``, the scores recorded so far.
        keep: ``{path: [layers, r]}``, ``[layers, 1]`` for a bias: which nodes train.
        means: running means of the sensitivity and of its uncertainty, two trees like
            the trainable one with the nodes' leaves; empty for "sensitivity".
        start: the nodes' leaves at the start, for "revert"; else empty.
    """

    samples: Float[Array, "steps n"]
    keep: dict[str, Bool[Array, "layers r"]]
    means: tuple[PyTree, ...] = ()
    start: PyTree = ()


def ggm(
    n_select: int | None = None,
    n_important: int | None = None,
    *,
    total_steps: int,
    initial_steps: int,
    collect_steps: int,
    by: Literal["ggm", "score", "cov", "ridge", "pinv", "random"] = "ggm",
    score: Literal["sensitivity", "ema"] = "sensitivity",
    unselected: Literal["keep", "revert"] = "keep",
    budget: int | None = None,
    row: Literal["center", "unit", "none"] = "none",
    standardise: bool = True,
    shrink: int | float = 0.2,
    thin: int = 1,
    rank_by: Literal["omega", "delta"] = "omega",
    rcond: int | float = 1e-15,
    seed: int = 0,
    lambda0: int | float = 1.0,
    tau: int | float = 0.1,
    power: int | float = 0.9,
    tolerance: int | float = 1e-6,
    max_iterations: int = 5000,
) -> Allocator:
    r"""Returns the graphical model's allocation: some components train on, others rest.

    For ``initial_steps`` all nodes train; for ``collect_steps`` more they train and
    each step's scores are recorded, from the leaves before the update and the
    gradients that the optimiser is given,

    .. math:: \text{score}_i = \mathrm{mean}_{\text{leaves}}\, \mathrm{mean}\,
        |w \cdot \partial L / \partial w|

    Then ``decide``, on the host: logarithms, correlations (``numerics.node_scores``),
    the nodes of largest mean score, and those that hang together with them
    (``numerics.rank_nodes``). From then on only the chosen ones move. It is the final
    update that is masked, after momentum and weight decay: the others do not move by a
    bit. Leaves outside of nodes (a head trained whole, magnitudes) always train. A
    bias of a stack is one node a layer where the kernel beside it is adapted too.

    Notation:
        paper's code         here
        target_KK            n_select
        importnodes          n_important of them
        lambda_0, tau, g     lambda0, tau, x ** power

    Args:
        n_select: nodes that train on, important ones included; ``None``: 14% of all.
        n_important: those of highest score; ``None``: 7% of all.
        total_steps: the number of updates of the whole run.
        initial_steps: updates before scores are recorded; the authors take an epoch.
        collect_steps: updates whose scores are; the authors take an epoch.
        by: what ranks the other nodes, see ``numerics.rank_nodes``. "score" is no
            more than the largest scores, "random" a floor.
        score: "sensitivity" as above; "ema" (the authors, AdaLoRA): running means of
            the sensitivity times those of its uncertainty. They hardly differ from
            one step to the next, so that there are few independent samples.
        unselected: "keep" leaves the nodes that rest as they are, and they must be
            stored; "revert" sets them back to the start, and the loss jumps once.
        budget: in place of ``n_select``, the most parameters of the chosen nodes.
        row: see ``numerics.node_scores``, as the three that follow. ``by="cov"`` is
            best with "center".
        standardise: correlations rather than covariances.
        shrink: weight of the identity.
        thin: keep every so many-th sample.
        rank_by: columns of Omega, or of Delta.
        rcond: of "pinv".
        seed: of "random".
        lambda0: see ``numerics.group_graph``, as the four that follow.
        tau: weight of the penalty; the authors' 1000 and 20 for the covariances of
            their scores have no effect.
        power: p of the penalty.
        tolerance: of the solver.
        max_iterations: of the solver.

    Returns:
        An ``Allocator`` with ``decide``; ``training.decide`` calls it after update
        ``initial_steps + collect_steps``. Its ``init`` raises ``ValueError`` where
        there are no nodes, or too few.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.eye(6)[:, :4]}}
        >>> adapted = jp.attach(params, jp.pc(rank=4), ["query"], key=jax.random.key(0))
        >>> trainable, frozen = jp.partition(adapted)
        >>> allocator = ggm(
        ...     2, 1, by="cov", total_steps=9, initial_steps=0, collect_steps=5
        ... )
        >>> state = allocator.init(trainable)
        >>> for step in range(1, 6):
        ...     gradients = jax.tree.map(lambda x: jnp.sin(x + step), trainable)
        ...     updated = jax.tree.map(lambda x: x + 0.01, trainable)
        ...     state, trainable = allocator.update(
        ...         state, updated, gradients, step, trainable
        ...     )
        >>> state, trainable, allocation = allocator.decide(state, trainable, frozen)
        >>> allocation["query/kernel"].rank
        2

    References:
        Zheng and Cao, Adaptive principal components allocation with the
        l2,g-regularized Gaussian graphical model, arXiv 2412.08592.

    Note:
        The authors' settings are ``score="ema"``, ``row="unit"``,
        ``standardise=False``, ``by="pinv"``: the last is what their solver amounts to.
        Whether the graph helps is open. ``allocation.facts`` says how far the choice
        agrees with simpler ones; on planted graphs see benchmarks/graph_recovery.py.
    """
    numbers = {"collect_steps": (collect_steps, 2), "initial_steps": (initial_steps, 0)}
    for name, (value, least) in numbers.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"`{name}` must be a whole number from {least} up, got {value!r}"
            )
    settled = initial_steps + collect_steps
    if not settled < total_steps:
        raise ValueError(
            f"`initial_steps` ({initial_steps}) and `collect_steps` ({collect_steps}) "
            f"must leave at least one of the {total_steps} steps after them"
        )
    choices = {
        "score": (score, ("sensitivity", "ema")),
        "unselected": (unselected, ("keep", "revert")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(allowed)}, got {value!r}"
            )
    if n_select is not None and budget is not None:
        raise ValueError("give `n_select` or `budget`, not both")
    moments = {"row": row, "standardise": standardise, "shrink": shrink, "thin": thin}
    solver = {
        "lambda0": lambda0,
        "tau": tau,
        "power": power,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
    }

    def counts(n: int) -> tuple[int, int | None]:
        """How many nodes are important, and how many chosen (by ``budget``: None)."""
        some = max(1, round(IMPORTANT * n)) if n_important is None else n_important
        if budget is not None:
            return some, None
        most = max(some, round(SELECTED * n)) if n_select is None else n_select
        if not 1 <= some <= most <= n:
            raise ValueError(
                f"`n_important` ({some}) must be at least 1 and at most `n_select` "
                f"({most}), and that at most the {n} nodes there are"
            )
        return some, most

    def init(trainable):
        sites = node_sites(trainable)
        n = sum(int(site.real.sum()) for site in sites.values())
        counts(n)
        if shrink == 0 and math.ceil(collect_steps / thin) <= n:
            raise ValueError(
                f"{math.ceil(collect_steps / thin)} samples of {n} nodes make a "
                f"singular matrix; collect more than {n} steps, or write shrink=0.2"
            )
        leaves = pick(trainable, sites)
        zeros = lambda: jax.tree.map(jnp.zeros_like, leaves)
        return GraphState(
            samples=jnp.zeros((collect_steps, n), jnp.float32),
            keep={path: jnp.asarray(site.real) for path, site in sites.items()},
            means=(zeros(), zeros()) if score == "ema" else (),
            start=jax.tree.map(jnp.copy, leaves) if unselected == "revert" else (),
        )

    def update(state, trainable, gradients, step, before):
        sites, step = node_sites(trainable), jnp.asarray(step, jnp.int32)
        now = jax.tree.map(
            lambda w, g: jnp.abs(w * g), pick(before, sites), pick(gradients, sites)
        )
        means = state.means
        if score == "ema":
            mix = lambda old, new: BETA * old + (1 - BETA) * new
            mean = jax.tree.map(mix, means[0], now)
            spread = jax.tree.map(
                lambda old, new, mean: mix(old, jnp.abs(new - mean)),
                *(means[1], now, mean),
            )
            held = jax.tree.map(
                lambda new, old: jnp.where(step <= settled, new, old),
                (mean, spread),
                means,
            )
            means, now = held, jax.tree.map(jnp.multiply, mean, spread)
        here = jnp.arange(collect_steps)[:, None] == step - 1 - initial_steps
        samples = jnp.where(here, by_node(now, sites)[None, :], state.samples)
        state = state._replace(samples=samples, means=means)
        return state, choose_leaves(state.keep, sites, trainable, before)

    def decide(state, trainable, frozen):
        sites = node_sites(combine(trainable, frozen))
        found = node_scores(np.asarray(state.samples), **moments)
        some, most = counts(len(found.mean))
        important = important_nodes(found.mean, some)
        sizes, other = node_sizes(trainable, sites)
        how = {"rank_by": rank_by, "rcond": rcond, "seed": seed}
        ranking = rank_nodes(
            found, important, by=by, **how, **(solver if by == "ggm" else {})
        )
        limit = {"count": most, "budget": budget, "sizes": sizes}
        chosen = select_nodes(ranking.values, important, **limit)
        masks = node_masks(chosen, sites)
        keep = {
            path: jax.device_put(mask, state.keep[path].sharding)
            for path, mask in masks.items()
        }
        if unselected == "revert":
            trainable = jax.jit(
                lambda keep, now, start: choose_leaves(keep, sites, now, start),
                out_shardings=jax.tree.map(lambda x: x.sharding, trainable),
            )(keep, trainable, state.start)
        stored = sizes[chosen] if unselected == "revert" else sizes
        facts = {
            "by": by,
            "unselected": unselected,
            "nodes": len(sizes),
            "chosen": len(chosen),
            "trained": int(sizes[chosen].sum()) + other,
            "stored": int(stored.sum()) + other,
            **_agreement(found, ranking, important, chosen, limit),
        }
        return state._replace(keep=keep), trainable, _allocation(masks, sites, facts)

    return Allocator(init, update, settled=settled, decide=decide)


def _agreement(
    found: NodeScores,
    ranking: Ranking,
    important: np.ndarray,
    chosen: np.ndarray,
    limit: Mapping[str, Any],
) -> dict[str, Any]:
    """What the solver did, and how near simpler selectors come to the same choice."""
    others = np.setdiff1d(np.flatnonzero(~found.silent), important)
    mine, agreement = set(chosen.tolist()) - set(important.tolist()), {}
    for name in OTHERS:
        values = rank_nodes(found, important, by=name).values
        theirs = set(select_nodes(values, important, **limit).tolist())
        agreement[name] = {
            "rank_correlation": rank_correlation(
                ranking.values[others], values[others]
            ),
            "overlap": len(mine & theirs) / max(1, len(mine)),
        }
    facts = {"important": important.tolist(), "agreement": agreement}
    facts["silent"] = np.flatnonzero(found.silent).tolist()
    if (graph := ranking.graph) is not None:
        facts["graph"] = {
            "iterations": len(graph.objective),
            "converged": bool(graph.converged),
            "zero_columns": graph.zero_columns,
            "objective": [float(x) for x in graph.objective],
        }
    return facts


def _allocation(
    masks: Mapping[str, np.ndarray],
    sites: Mapping[str, NodeSite],
    facts: dict[str, Any],
) -> Allocation:
    """The choice as plain data; biases, which have no rank, among the facts."""
    found, biases, out_of = {}, {}, {}
    for path, mask in masks.items():
        if None in sites[path].leaves.values():
            biases[path] = mask[:, 0].tolist()
            continue
        each = [tuple(map(int, np.flatnonzero(row))) for row in mask]
        ranks = tuple(len(x) for x in each)
        alphas = tuple(sites[path].alpha(i, r) for i, r in enumerate(ranks))
        whole = SiteRank(ranks, alphas, tuple(each))
        alone = SiteRank(ranks[0], alphas[0], each[0])
        found[path] = whole if sites[path].batch else alone
        out_of[path] = np.count_nonzero(sites[path].real, axis=1).tolist()
    return Allocation.of(found, facts | {"biases": biases, "out_of": out_of})
