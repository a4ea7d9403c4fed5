"""What has to fit before several adapters become one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.numerics import JOINS, MAJORITIES
from jaxpeft.tree import check_key, leaves_with_path

_THINNED = ("magnitude_prune", "dare_linear", "ties", "dare_ties")


def check_settings(trees, weights, how, *, rank, density, election, key) -> None:
    """Raises unless the arguments of ``weighted`` fit each other."""
    if how not in JOINS:
        raise ValueError(f"`how` must be one of {', '.join(JOINS)}, got {how!r}")
    if not trees:
        raise ValueError("`adapters` is empty; give a list of adapted trees")
    listed = isinstance(weights, list | tuple)
    shape = (len(weights),) if listed else np.shape(weights)
    if shape != (len(trees),):
        raise ValueError(
            f"`weights` must be {len(trees)} numbers, one for each of `adapters`, got "
            f"shape {list(shape)}"
        )
    traced = any(isinstance(w, jax.core.Tracer) for w in jax.tree.leaves(weights))
    if not traced and not np.all(np.isfinite(np.asarray(weights, np.float64))):
        raise ValueError(f"`weights` must be finite, got {weights}")
    if rank is not None and how != "svd":
        raise ValueError(f'`rank` is for how="svd"; {how!r} gives its own rank')
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be a whole number from 1 up, got {rank!r}")
    if (density is not None) != (how in _THINNED):
        said = "needs `density`, such as density=0.5" if density is None else ""
        said = said or "keeps every entry: leave `density` out"
        raise ValueError(f"{how!r} {said}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}")
    if election not in MAJORITIES:
        raise ValueError(
            f"`election` must be one of {', '.join(MAJORITIES)}, got {election!r}"
        )
    random = how.startswith("dare")
    if random and key is None:
        raise ValueError(f"{how!r} draws what it keeps: write key=jax.random.key(0)")
    if key is not None and not random:
        raise ValueError(f"{how!r} draws nothing: leave `key` out")
    if key is not None:
        check_key(key)


def differences(by_path: list[dict[str, Any]], plain: list[Any]) -> list[str]:
    """Sites that not all trees have, and leaves in which their bases differ.

    Args:
        by_path: each tree's nodes by path.
        plain: each tree without its adapters.
    """
    problems = []
    for i, each in enumerate(by_path):
        if not each:
            problems.append(f"adapters[{i}] has no adapters")
    every = dict.fromkeys(path for each in by_path for path in each)
    for path in every if not problems else ():
        have = [i for i, each in enumerate(by_path) if path in each]
        if len(have) < len(by_path):
            lacking = [i for i in range(len(by_path)) if i not in have]
            problems.append(f"{path!r} has no adapter in adapters{lacking}")
        elif len({each[path].site.roles for each in by_path}) > 1:
            problems.append(f"{path!r} has axes of different roles")
    first = dict(leaves_with_path(plain[0]))
    for i, tree in enumerate(plain[1:], 1):
        leaves = dict(leaves_with_path(tree))
        problems += [
            f"{path!r} is not in both adapters[0] and adapters[{i}]"
            for path in sorted(first.keys() ^ leaves.keys())
        ]
        problems += [
            f"{path!r} has another base in adapters[{i}] than in adapters[0]"
            for path, x in leaves.items()
            if path in first and not _same(first[path], x, _rounding(path, by_path))
        ]
    return problems


def _rounding(path: str, by_path) -> float:
    """By which share a base may differ where a part of it was folded and taken off."""
    nodes = [each[path] for each in by_path if path in each]
    folded = [node for node in nodes if node.adapter.folded is not None]
    return max((4 * float(jnp.finfo(n.base.dtype).eps) for n in folded), default=0.0)


def _same(x: Any, y: Any, tolerance: float) -> bool:
    if x is y:
        return True
    if not hasattr(x, "dtype") or not hasattr(y, "dtype"):
        return type(x) is type(y) and bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if any(isinstance(v, jax.core.Tracer | jax.ShapeDtypeStruct) for v in (x, y)):
        return True  # what is not there yet cannot be compared
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = jax.random.key_data(x), jax.random.key_data(y)
    if not tolerance:
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return bool(jnp.array_equal(x, y, equal_nan=floating))
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    return bool(np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y))


def not_finite(path: str, layers) -> list[str]:
    """The site, if one of its adapters is not finite."""
    leaves = jax.tree.leaves(layers)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return []
    fine = all(jnp.all(jnp.isfinite(x)) for x in leaves)
    return [] if fine else [f"{path!r} has leaves that are not finite"]
