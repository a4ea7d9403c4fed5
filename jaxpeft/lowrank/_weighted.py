"""One adapter from several of the same base, and more or less of one."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxpeft.lowrank._products import (
    is_plain,
    layer_products,
    not_low_rank,
    strength_leaf,
)
from jaxpeft.lowrank._weighted_check import check_settings, differences, not_finite
from jaxpeft.numerics import join_products, joined_rank
from jaxpeft.tree import (
    BATCH,
    IN,
    OUT,
    AdaptedKernel,
    Adapter,
    attach,
    detach,
    dims_of,
    expand_leaf,
    grouped,
    is_node,
    map_nodes,
    matrix_shape,
    nodes,
    place_like,
    site_key,
)


def weighted(
    adapters: Sequence[PyTree],
    weights: Sequence[int | float | Array] | Array | np.ndarray,
    how: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    election: str = "total",
    key: Key[Array, ""] | None = None,
    into: Adapter | None = None,
) -> PyTree:
    r"""Makes one low-rank adapter from several that sit on the same base.

    With :math:`s_i a_i b_i` the change that adapter i makes to a kernel:

    =================  ======================================================  =====
    ``how``            the new change                                          rank
    =================  ======================================================  =====
    "cat"              :math:`\sum_i w_i s_i a_i b_i`, exactly                 sum
    "svd"              its best approximation of rank ``rank``                 given
    "linear"           :math:`(\sum_i \pm c_i a_i)(\sum_i c_i b_i)` with       equal
                       :math:`c_i = \sqrt{|w_i s_i|}`, the sign that of
                       :math:`w_i s_i`
    "magnitude_prune"  "linear" of the largest entries of each factor          equal
    "dare_linear"      "linear" of entries kept at random, over the density    equal
    "ties"             of the largest entries, those that have the sign that   equal
                       most of the adapters elect; their mean
    "dare_ties"        the same of entries kept at random                      equal
    =================  ======================================================  =====

    The last five join factors, not changes: beside the sum there are cross terms
    :math:`a_i b_j`, so "linear" of an adapter with itself at weights 1/2 and 1/2 is
    twice that adapter, and the result depends on how a method cuts its change into
    factors. They are HF PEFT's, for comparison; "cat" and "svd" do what they say for
    every method. No change of a kernel is ever formed.

    Args:
        adapters: adapted trees with the same sites over the same base; any methods
            whose change of a kernel is of low rank.
        weights: w, one for each; of any sign. They may be traced.
        how: see the table.
        rank: for "svd"; by default the largest rank at each site and layer.
        density: the share of the entries to keep, in (0, 1], for the last four.
        election: how "ties" and "dare_ties" elect signs: by the sum of the entries
            ("total") or by their number ("frequency").
        key: a typed key for "dare_linear" and "dare_ties".
        into: the plain low-rank method of the result, ``jaxpeft.lora()``, whose rank
            and alpha give way to the result's own; by default the first tree's, where
            it is plain.

    Returns:
        An adapted tree over the same base; the scales are inside the factors.

    Raises:
        ValueError: the trees differ in sites or base, a site's change is not of low
            rank, is not finite, or has ranks that ``how`` does not allow. All are
            listed.
        TypeError: ``key`` is not a typed key.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.zeros((4, 6))}}, jax.random.key(0)
        >>> one = jp.attach(params, jp.lora(rank=2), ["query"], key=key)
        >>> other = jp.attach(params, jp.lora(rank=3), ["query"], key=key)
        >>> both = weighted([one, other], [0.7, 0.3])
        >>> both["query"]["kernel"].site.ranks
        (5,)

    References:
        HF PEFT, ``add_weighted_adapter``. Yadav et al., TIES, arXiv 2306.01708. Yu et
        al., DARE, arXiv 2311.03099.

    Note:
        HF PEFT leaves out adapters that a site does not have, and with one adapter
        does "linear" whatever it was asked for.
    """
    trees, settings = list(adapters), {"density": density, "election": election}
    check_settings(trees, weights, how, rank=rank, key=key, **settings)
    if into is not None and not is_plain(into):
        raise ValueError(
            f"`into` must be a plain low-rank method such as jaxpeft.lora(), got {into}"
        )
    by_path = [{node.site.path: node for node in nodes(tree)} for tree in trees]
    plain = [detach(tree) for tree in trees]
    problems = differences(by_path, plain)
    sites = {} if problems else {p: [each[p] for each in by_path] for p in by_path[0]}
    targets, products, ranks = {}, {}, {}
    for path, each in sites.items():
        wrong = [why for node in each if (why := not_low_rank(node))]
        targets[path] = each[0].adapter if into is None else into
        if not wrong and not is_plain(targets[path]):
            wrong = [
                f"{path!r}: {targets[path].name!r} is no plain low-rank method and "
                "cannot carry the result; write into=jaxpeft.lora()"
            ]
        problems += wrong
        if wrong:
            continue
        products[path] = layer_products(each)
        ranks[path], more = _ranks(path, each[0], products[path], how, rank)
        problems += more or not_finite(path, products[path])
    if problems:
        raise ValueError("`adapters` cannot be combined so:\n  " + grouped(problems))
    result = plain[0]
    for adapter in dict.fromkeys(targets.values()):
        # Equal, not identical: methods that differ in numbers alone are equal.
        own = {path: ranks[path] for path, its in targets.items() if its == adapter}
        result = _attached(result, adapter, own, by_path[0])

    def filled(node):
        path = node.site.path
        keys = None
        if key is not None:
            keys = jax.random.split(site_key(key, path), len(ranks[path]))
        a, b = _join(products[path], ranks[path], weights, keys, how=how, **settings)
        pattern = by_path[0][path].site.pattern
        return _filled(node, a, b, dataclasses.replace(node.site, pattern=pattern))

    return map_nodes(filled, result)


def _ranks(path, node: AdaptedKernel, layers, how: str, rank: int | None):
    """The result's rank in each layer, and what stands in the way."""
    most = min(matrix_shape(node.base.shape, node.roles)[1:])
    ranks, problems = [], []
    for products in layers:
        each = [a.shape[-1] for a, *_ in products]
        count = products[0][0].shape[0]
        new = joined_rank(each, how, rank or min(max(each), most)) if any(each) else 0
        if how not in ("cat", "svd") and len(set(each)) > 1:
            problems.append(
                f"{path!r} has ranks {each}, which {how!r} cannot join; write "
                'how="cat" or how="svd"'
            )
        elif how == "svd" and new > min(most, sum(each)):
            problems.append(
                f"{path!r}: `rank` {new} is more than the {min(most, sum(each))} that "
                "the sum has"
            )
        ranks += [new] * count
    return ranks, problems


def _attached(tree, adapter: Adapter, ranks: dict[str, list[int]], before):
    """The tree with fresh leaves of the result's shapes, to be filled.

    With alpha equal to the rank the usual scale is 1; `_filled` divides by any other.
    """
    patterns: dict[str, Any] = {"rank_pattern": ranks}
    if adapter.where.alpha is not None:
        patterns["alpha_pattern"] = ranks
    with warnings.catch_warnings():  # a sum may have more rank than a kernel
        warnings.simplefilter("ignore")
        return attach(
            tree,
            adapter,
            lambda path, leaf: path in ranks,
            key=jax.random.key(0),  # every leaf that is drawn is replaced
            axes={path: " ".join(before[path].site.roles) for path in ranks},
            **patterns,
        )


def _join(layers, ranks: list[int], weights, keys, *, how: str, **settings):
    """``(a [layers, d_in, k], b [layers, k, d_out])``, padded with zeros."""
    made, done, top = [], 0, max(ranks)
    for products in layers:
        count = products[0][0].shape[0]
        own = None if keys is None else keys[done : done + count]
        scales = jnp.asarray(weights, products[0][0].dtype)
        rank = ranks[done]  # "svd" alone asks for it
        a, b = _join_layers(products, scales, own, how=how, rank=rank, **settings)
        more = top - a.shape[-1]
        made.append(
            (
                jnp.pad(a, ((0, 0), (0, 0), (0, more))),
                jnp.pad(b, ((0, 0), (0, more), (0, 0))),
            )
        )
        done += count
    return tuple(jnp.concatenate(factors) for factors in zip(*made, strict=True))


@functools.partial(jax.jit, static_argnames=("how", "rank", "density", "election"))
def _join_layers(products, weights, keys, **settings):
    def one(products, key):
        return join_products(products, weights, key=key, **settings)

    return jax.vmap(one, in_axes=(0, None if keys is None else 0))(products, keys)


def _filled(node: AdaptedKernel, a, b, site) -> AdaptedKernel:
    """A fresh plain node whose leaves give the change ``a b``, its scale included."""
    roles, shape = node.roles, node.base.shape
    dims = [dims_of(shape, roles, role) for role in (BATCH, IN, OUT)]
    scale = node.frozen["scale"].astype(b.dtype).reshape(-1, 1, 1)
    b = b / jnp.where(scale == 0, 1, scale)  # 0 where a layer has no rank
    leaves = {
        "a": expand_leaf(a, (IN, None), *dims),
        "b": expand_leaf(b, (None, OUT), *dims),
    }
    return place_like(node.replace(trainable=leaves, site=site), node.base)


def scaled(
    adapted: PyTree,
    strength: int | float | Float[Array, ""],
    *,
    into: Adapter | None = None,
) -> PyTree:
    r"""More or less of an adapter: :math:`W + t\,(W' - W)` in place of ``W'``.

    Args:
        adapted: a tree made by ``attach``, or what ``extract`` took off one.
        strength: t, of any sign; 0 is the base, 1 changes nothing. It may be traced:
            it multiplies the scale, or of a method without one the up-projection.
        into: for other low-rank methods, the plain one of the result,
            ``jaxpeft.lora()``; see ``weighted``.

    Returns:
        The adapted tree; alphas follow from its scales.

    Raises:
        ValueError: ``strength`` is not finite, or the change at a site is not of low
            rank, or no leaf's multiple and there is no ``into``. All sites are listed.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((4, 6))}}, jax.random.key(0)
        >>> adapted = jp.attach(params, jp.lora(2, 4), ["query"], key=key)
        >>> float(scaled(adapted, 0.25)["query"]["kernel"].frozen["scale"])
        0.5
    """
    if not isinstance(strength, jax.core.Tracer) and not np.isfinite(strength):
        raise ValueError(f"`strength` must be a finite number, got {strength}")
    if into is not None:
        return weighted([adapted], jnp.stack([jnp.asarray(strength)]), into=into)
    found = [x for x in jax.tree.leaves(adapted, is_leaf=is_node) if is_node(x)]
    if not found:
        raise ValueError("`adapted` has no adapters; give a tree that attach made")
    problems = [
        f"{node.site.path!r}: {node.adapter.name!r}"
        for node in found
        if (name := strength_leaf(node.adapter)) is None
        or {**node.frozen, **node.trainable}[name] is None
    ]
    if problems:
        raise ValueError(
            "only whole low-rank adapters with a leaf that the change is a multiple of "
            "can be changed in place. Write into=jaxpeft.lora() for another method "
            "whose change is of low rank; leave the others out, {path: node for path, "
            "node in jaxpeft.extract(adapted).items() if ...}:\n  " + grouped(problems)
        )

    def times(node):
        name = strength_leaf(node.adapter)
        new = lambda x: x * jnp.asarray(strength, x.dtype)
        each = lambda part: {n: new(x) if n == name else x for n, x in part.items()}
        return node.replace(frozen=each(node.frozen), trainable=each(node.trainable))

    return map_nodes(times, adapted)
