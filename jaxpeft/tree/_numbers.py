"""Numbers of methods: leaves of a tree, so that trees that differ in them are alike.

Alpha has no leaf of its own. A method makes a scale of it (``alpha / r``, or another),
whose leaf begins with ``scale``; here alpha is read off it, and written to it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxpeft.tree._adapter import rebuild
from jaxpeft.tree._lift import leaf_axes, site_numbers
from jaxpeft.tree._node import AdaptedKernel, made_like, map_nodes
from jaxpeft.tree._paths import nearest
from jaxpeft.tree._terms import BATCH
from jaxpeft.tree._together import is_several, named_parts, parts_of, together
from jaxpeft.tree._unit import alpha_of, is_scale, unit_scale


def with_numbers(adapted: PyTree, **numbers: Any) -> PyTree:
    """Changes numbers of a tree's methods: alpha, weights of penalties, and others.

    They are leaves, so that nothing is compiled again, and they may be traced: a tree
    can be mapped over them with ``jax.vmap``.

    Args:
        adapted: a tree made by ``attach``.
        **numbers: options of the constructors that are leaves, each for all sites that
            have it: a number, or for ``gates`` one for each expert.

    Returns:
        The tree with other leaves.

    Raises:
        ValueError: no site has such a number, or it is not finite or of another shape
            than a site's. One that was exactly 0 or ``None`` when the adapter was made
            is not there.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.ones((4, 6))}}, jax.random.key(0)
        >>> adapted = jp.attach(params, jp.lora(2, alpha=4), ["query"], key=key)
        >>> float(with_numbers(adapted, alpha=1)["query"]["kernel"].frozen["scale"])
        0.5
    """
    parts = [part for _, part in named_parts(adapted)]
    there = {name for part in parts for name in _names(part)}
    for name in numbers:
        if name not in there:
            raise ValueError(
                f"no site has a number {name!r}; there are {sorted(there)}, nearest: "
                f"{nearest(name, sorted(there), 1)}. A number that is 0 or None when "
                "an adapter is made is left out: make it with another value"
            )
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(value)):
            raise ValueError(f"`{name}` must be finite, got {value}")

    def change(part):
        own, made = _names(part), {}
        for name, value in numbers.items():
            if name in own:
                _check_shape(part, name, np.shape(value))
                made |= _leaves(part, name, value)
        return part.replace(frozen=part.frozen | made)

    each = lambda node: {n: change(part) for n, part in parts_of(node).items()}
    return map_nodes(lambda node: together(each(node)), adapted)


def _check_shape(node: AdaptedKernel, name: str, shape: tuple[int, ...]) -> None:
    """Raises unless a site's number may have a value of this shape."""
    own = () if name == "alpha" else _own_shape(node, node.frozen[name])
    if shape not in ((), own):
        allowed = f"{own[0]} numbers or one" if own else "one number"
        raise ValueError(
            f"`{name}` must be {allowed} at site {node.site.path!r}, got shape "
            f"{list(shape)}"
        )


def _own_shape(node: AdaptedKernel, leaf) -> tuple[int, ...]:
    """The shape of a number's leaf for one layer: ``()``, or how many there are."""
    return leaf.shape[node.roles.count(BATCH) :]


def _names(node: AdaptedKernel) -> list[str]:
    """The numbers that a site has: alpha, and those with a leaf."""
    options = node.adapter.options
    has_alpha = node.adapter.where.alpha is not None
    scaled = ["alpha"] if has_alpha and any(map(is_scale, node.frozen)) else []
    return scaled + [n for n in options.numbers if n in node.frozen]


def _leaves(node: AdaptedKernel, number: str, value: Any) -> dict[str, Array]:
    """The leaves that follow from a number, for another value of it."""
    if number != "alpha":
        like = node.frozen[number]
        spread = jnp.broadcast_to(jnp.asarray(value), like.shape)
        return {number: spread.astype(like.dtype)}
    made = {}
    for name, like in node.frozen.items():
        if is_scale(name):
            # What the method makes of alpha 1 at the rank of each layer that there is:
            # a slice has fewer than its site.
            ranks = (node.site.ranks or ())[: math.prod(like.shape)]
            units = np.array([unit_scale(node.adapter, r, name) for r in ranks])
            units = jnp.asarray(units.reshape(like.shape), like.dtype)
            made[name] = jnp.asarray(value, like.dtype) * units
    return made


def alphas_of(node: AdaptedKernel) -> tuple[float, ...] | None:
    """The alpha of each layer, read off its scale: the shortest decimal that gives it.

    ``None`` for methods without an alpha, where the scale has no value (it is traced,
    or a shape), and where adapters were stacked; 0 for layers of rank 0.
    """
    scales = node.frozen.get("scale")
    if node.adapter.where.alpha is None or not is_concrete(scales):
        return None
    scales, ranks = np.asarray(jax.device_get(scales)).reshape(-1), node.site.ranks
    if ranks is None or len(scales) != len(ranks):
        return None  # adapters that were stacked: more layers than ranks
    return tuple(
        alpha_of(node.adapter, rank, scale) if rank else 0.0
        for rank, scale in zip(ranks, scales, strict=True)
    )


def is_concrete(x: Any) -> bool:
    """Whether a leaf has a value that can be looked at."""
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


def options_of(node: AdaptedKernel) -> dict[str, Any]:
    """The options of a site's method, with the numbers that its leaves have now.

    The alpha in it is that of the constructor; ``alphas_of`` has that of each layer.
    Of traced leaves and shapes the constructor's numbers stay.

    Raises:
        ValueError: layers of a stack differ in a number that is no alpha.
    """
    options = dict(node.adapter.options)
    for name in node.adapter.options.numbers:
        leaf = node.frozen.get(name)
        if leaf is None or not is_concrete(leaf):
            continue
        own = _own_shape(node, leaf)
        each = np.asarray(jax.device_get(leaf)).reshape(-1, *own)
        if (each != each[0]).any():
            raise ValueError(
                f"site {node.site.path!r}: the layers differ in {name!r}; a file has "
                "one for all"
            )
        short = [float(str(x)) for x in each[0].reshape(-1)]
        options[name] = tuple(short) if own else short[0]
    return options


def with_options(
    node: AdaptedKernel, leaves: Mapping[str, Any] | None = None, **changes: Any
) -> AdaptedKernel:
    """The node under the same method with other options.

    Args:
        node: a whole node.
        leaves: all leaves by name, frozen or not; by default the node's own. What is
            frozen and what trains under the new options is sorted out here.
        **changes: the options that change. Numbers among them become leaves.
    """
    if is_several(node):
        raise ValueError(
            f"site {node.site.path!r} has adapters {list(parts_of(node))}; take one "
            "off, change it, and put it back: jaxpeft.extract(adapted, name), "
            "jaxpeft.graft(params, adapter, name=name)"
        )
    adapter = rebuild(node.adapter, **changes)
    have = dict({**node.frozen, **node.trainable} if leaves is None else leaves)
    own = made_like(node.base, lambda: site_numbers(adapter, node.base, node.roles))
    # Of numbers that do not change, the leaf's own value stays.
    have |= {n: x for n, x in own.items() if n in changes or n not in have}
    frozen, trainable = (
        {name: have[name] for name in part}
        for part in leaf_axes(adapter, node.site.rank)
    )
    return node.replace(adapter=adapter, frozen=frozen, trainable=trainable)
