"""AdaLoRA's budget: prune the least important components of all sites together.

A component is one column of ``a``, one row of ``b`` and one entry of a trained vector
over the rank (AdaLoRA's ``e``), its weight, found by their axes: any method with such a
vector can be pruned. A weight of 0 takes its component out and changes no shape.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpeft.allocate._allocator import Allocator
from jaxpeft.allocate._components import component_sites
from jaxpeft.tree import is_node, map_nodes, wider


class ImportanceState(NamedTuple):
    """The state of ``importance``; trees like the trainable one, with fewer leaves.

    Attributes:
        sensitivity: running mean of ``|w dL/dw|`` for each entry of a component.
        uncertainty: running mean of its distance from ``sensitivity``.
        keep: for each entry of the pruned vectors whether it is kept; ``True``
            between two prunings, and from the last one on what that one kept.
    """

    sensitivity: PyTree
    uncertainty: PyTree
    keep: PyTree


def budgets(
    start: int,
    end: int,
    *,
    total_steps: int,
    initial_steps: int = 0,
    final_steps: int = 0,
) -> list[int]:
    r"""Returns the number of components to keep after each update.

    .. math::
        \mathrm{budget}(t) = \begin{cases}
            n_0 & t \le t_i \\
            \Big\lfloor n_T + (n_0 - n_T)
                \big(1 - \frac{t - t_i}{T - t_f - t_i}\big)^3 \Big\rfloor
                & t_i < t \le T - t_f \\
            n_T & \text{after}
        \end{cases}

    Args:
        start: n_0, all components of all sites.
        end: n_T, those of them that are left in the end, from 1 to ``start``.
        total_steps: T, the number of updates.
        initial_steps: t_i, updates before anything is pruned.
        final_steps: t_f, updates after the last pruning.

    Returns:
        ``total_steps + 1`` numbers, for t = 0 to T.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> budgets(8, 4, total_steps=20, initial_steps=2, final_steps=4)[:10]
        [8, 8, 8, 7, 6, 5, 5, 5, 4, 4]

    References:
        Zhang et al., AdaLoRA, arXiv 2303.10512, section 3.3.
    """
    if not 1 <= end <= start:
        raise ValueError(
            f"`end` must be from 1 to the {start} components at the start, got {end}"
        )
    last = total_steps - final_steps
    if min(initial_steps, final_steps) < 0 or not initial_steps < last:
        raise ValueError(
            f"`initial_steps` ({initial_steps}) and `final_steps` ({final_steps}) must "
            f"leave at least one of the {total_steps} steps between them"
        )

    def budget(t: int) -> int:
        if t <= initial_steps:
            return start
        if t > last:
            return end
        left = 1 - (t - initial_steps) / (last - initial_steps)
        return int((start - end) * left**3 + end)

    return [budget(t) for t in range(total_steps + 1)]


def _only(tree: PyTree, leaves: Mapping[str, Any], f: Callable[[Any], Any]) -> PyTree:
    """A tree like ``tree`` with ``f(leaf)`` for some leaves of some sites."""

    def each(node):
        mine = leaves.get(node.site.path, ())
        return node.replace(
            trainable={
                n: f(x) if n in mine else None for n, x in node.trainable.items()
            }
        )

    return map_nodes(each, tree)


def scores(state: ImportanceState) -> dict[str, Float[Array, "layers r"]]:
    r"""Returns how important each component is.

    .. math::
        \mathrm{score}(k) = \bar s(e_k) + \mathrm{mean}_i\, \bar s(a_{ik})
            + \mathrm{mean}_j\, \bar s(b_{kj}), \qquad
        \bar s = \text{sensitivity} \cdot \text{uncertainty}

    Args:
        state: the state of ``importance``.

    Returns:
        ``{path of the site: scores}``; padding of unequal ranks has minus infinity.

    References:
        Zhang et al., AdaLoRA, arXiv 2303.10512, section 3.2.
    """
    products = jax.tree.map(jnp.multiply, state.sensitivity, state.uncertainty)
    sites, found = component_sites(products), {}
    for node in jax.tree.leaves(products, is_leaf=is_node):
        if not is_node(node) or (site := sites.get(node.site.path)) is None:
            continue
        total = 0.0
        for name, position in site.leaves.items():
            x = jnp.moveaxis(node.trainable[name], position, site.batch)
            total = total + jnp.mean(x.reshape(*site.real.shape, -1), axis=-1)
        found[node.site.path] = jnp.where(site.real, total, -jnp.inf)
    return found


def most_important(
    scored: Mapping[str, Float[Array, "layers r"]], budget: Int[Array, ""] | int
) -> dict[str, Bool[Array, "layers r"]]:
    """Returns the ``budget`` best components of all sites, exactly so many.

    Args:
        scored: ``{path: scores}``. Among equals the earlier site, layer and component
            wins.
        budget: how many to keep; may be traced.

    Returns:
        ``{path: whether each component is kept}``.

    Example:
        >>> most_important({"up": jnp.array([[1.0, 3.0, 2.0]])}, 2)["up"]
        Array([[False,  True,  True]], dtype=bool)
    """
    flat = jnp.concatenate([x.reshape(-1) for x in scored.values()])
    place = jnp.argsort(jnp.argsort(-flat))  # stable
    kept, result, at = place < budget, {}, 0
    for path, x in scored.items():
        result[path] = kept[at : at + x.size].reshape(x.shape)
        at += x.size
    return result


def importance(
    target_rank: int = 8,
    *,
    total_steps: int,
    initial_steps: int = 0,
    final_steps: int = 0,
    every: int = 1,
    b1: int | float = 0.85,
    b2: int | float = 0.85,
) -> Allocator:
    r"""Returns AdaLoRA's allocation: fewer and fewer components, the best of all.

    After each update, with every entry ``w`` of ``a``, ``b`` and ``e`` and its
    gradient,

    .. math::
        I = |w\, \partial L / \partial w|, \qquad
        \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \qquad
        \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|

    and where a pruning is due, all but the ``budget(t)`` components of highest score
    (``scores``, ``budgets``) are set to 0. Until the last pruning, at
    ``t = total_steps - final_steps``, the optimiser may bring them back; what that
    one removes stays removed.

    Notation:
        paper, HF PEFT    here
        target_r          target_rank: the mean over sites
        total_step        total_steps
        tinit, tfinal     initial_steps, final_steps
        deltaT            every
        beta1, beta2      b1, b2

    Args:
        target_rank: components left in the end, on average over the sites (each layer
            of a stack is one); at least 1.
        total_steps: the number of updates of the whole run.
        initial_steps: updates before anything is pruned.
        final_steps: updates after the last pruning.
        every: prune where this divides the number of updates done.
        b1: decay of the mean of the sensitivity, in (0, 1).
        b2: decay of the mean of the uncertainty, in (0, 1).

    Returns:
        An ``Allocator``, for ``training.advance`` or a loop of your own. Its
        ``init`` raises ``ValueError`` where no site can be pruned, or none needs it.

    Raises:
        ValueError: an argument outside of what is allowed.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(
        ...     params, jp.adalora(rank=4), ["query"], key=jax.random.key(0)
        ... )
        >>> trainable, _ = jp.partition(adapted)
        >>> allocation = importance(target_rank=2, total_steps=100, final_steps=20)
        >>> state = allocation.init(trainable)
        >>> gradients = jax.tree.map(jnp.ones_like, trainable)
        >>> state, trainable = allocation.update(state, trainable, gradients, 80)
        >>> int(jnp.sum(state.keep["query"]["kernel"].trainable["e"]))
        2

    References:
        Zhang et al., AdaLoRA, arXiv 2303.10512, algorithm 1. HF PEFT:
        ``update_and_allocate``.

    Note:
        HF PEFT counts updates from 0, so that its last pruning never comes where
        ``tfinal`` is 0; it keeps scores strictly above a threshold, so that equal
        scores all go, and cannot keep everything. Here exactly the budget is kept.
    """
    numbers = {"target_rank": target_rank, "total_steps": total_steps, "every": every}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` must be a whole number from 1 up, got {value!r}"
            )
    for name, value in {"b1": b1, "b2": b2}.items():
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}")
    timing = {
        "total_steps": total_steps,
        "initial_steps": initial_steps,
        "final_steps": final_steps,
    }
    budgets(1, 1, **timing)  # objects to the timing before there is a tree
    last = total_steps - final_steps

    def table(sites) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which the budget changes, and what it is from each on."""
        start = sum(int(site.real.sum()) for site in sites.values())
        end = target_rank * sum(len(site.real) for site in sites.values())
        if end > start:
            raise ValueError(
                f"`target_rank` {target_rank} asks for {end} components in the end, "
                f"but there are {start} at the start; attach with a larger rank"
            )
        values = np.array(budgets(start, end, **timing))
        changes = np.flatnonzero(np.diff(values, prepend=values[0] + 1))
        return changes.astype(np.int32), values[changes].astype(np.int32)

    def init(trainable):
        sites = component_sites(trainable)
        table(sites)
        scored = {path: site.leaves for path, site in sites.items()}
        pruned = {path: (site.weight,) for path, site in sites.items()}
        zeros = lambda x: jnp.zeros(x.shape, wider(x.dtype, jnp.float32))
        return ImportanceState(
            _only(trainable, scored, zeros),
            _only(trainable, scored, zeros),
            _only(trainable, pruned, lambda x: jnp.ones(x.shape, bool)),
        )

    def update(state, trainable, gradients, step, before=None):
        del before
        sites = component_sites(trainable)
        step = jnp.asarray(step, jnp.int32)

        def smooth(old, new, decay):
            mean = decay * old + (1 - decay) * new
            return jnp.where(step < last, mean, old)

        def pick(tree):  # the scored leaves alone, wide
            scored = {path: site.leaves for path, site in sites.items()}
            return _only(tree, scored, lambda x: x.astype(wider(x.dtype, jnp.float32)))

        now = jax.tree.map(
            lambda w, g: jnp.abs(w * g), pick(trainable), pick(gradients)
        )
        sensitivity = jax.tree.map(
            lambda old, new: smooth(old, new, b1), state.sensitivity, now
        )
        uncertainty = jax.tree.map(
            lambda old, new, mean: smooth(old, jnp.abs(new - mean), b2),
            state.uncertainty,
            now,
            sensitivity,
        )
        state = ImportanceState(sensitivity, uncertainty, state.keep)
        steps, values = table(sites)
        budget = jnp.asarray(values)[jnp.searchsorted(steps, step, side="right") - 1]
        best = most_important(scores(state), budget)
        regular = (step > initial_steps) & (step < last) & (step % every == 0)
        due = regular | (step == last)

        def decide(node):
            site = sites.get(node.site.path)
            if site is None:
                return node
            old = node.trainable[site.weight]
            new = jnp.where(due, best[node.site.path].reshape(old.shape), step <= last)
            keep = jnp.where(step > last, old, new)
            return node.replace(trainable=node.trainable | {site.weight: keep})

        keep = map_nodes(decide, state.keep)

        def prune(node, kept):
            site = sites.get(node.site.path)
            if site is None:
                return node
            vector = node.trainable[site.weight]
            vector = jnp.where(kept.trainable[site.weight], vector, 0)
            return node.replace(trainable=node.trainable | {site.weight: vector})

        return state._replace(keep=keep), map_nodes(prune, trainable, keep)

    return Allocator(init, update, settled=last)
