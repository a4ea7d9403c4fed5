"""Ranks and alphas of sites and layers, from a pattern or an allocation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.tree._lift import matrix_shape
from jaxpeft.tree._paths import resolve_pattern
from jaxpeft.tree._terms import BATCH


def per_layer_values(
    what, pattern, default, by_path, roles, ranks=None
) -> dict[str, Any]:
    """Each site's ranks or alphas, one value per layer.

    Args:
        what: ``"rank"`` or ``"alpha"``.
        pattern: ``rank_pattern`` or ``alpha_pattern`` of ``attach``.
        default: the method's own value; ``None``: the method has none.
        by_path: the leaves of the tree, by path.
        roles: the roles of the axes of each chosen site.
        ranks: where alphas are asked for: each site's ranks. A layer of a stack may
            have rank 0, and its alpha may then be 0, too.

    Returns:
        ``{path: a value for each layer, or None}``.

    Raises:
        ValueError: the pattern does not fit, or a value is not allowed.
    """
    argument = f"{what}_pattern"
    paths = list(roles)
    if default is None:
        if pattern is not None:
            raise ValueError(f"`{argument}` was given, but this adapter has no {what}")
        return dict.fromkeys(paths)
    if pattern is None:
        values = {}
    elif isinstance(pattern, Mapping):
        values = resolve_pattern(argument, pattern, paths)
    elif not _is_list(pattern):
        raise ValueError(
            f"`{argument}` must be {{pattern: {what}}} or a list with one {what} per "
            f"stacked layer, got {pattern!r}"
        )
    else:
        stacked = [p for p in paths if BATCH in roles[p]]
        if len(stacked) < len(paths):
            lone = next(p for p in paths if p not in stacked)
            raise ValueError(
                f"`{argument}` is a list with one {what} per stacked layer, but site "
                f"{lone!r} is not stacked; write {argument}={{pattern: value}}"
            )
        values = dict.fromkeys(paths, pattern)
    result = {}
    for path in paths:
        layers = matrix_shape(by_path[path].shape, roles[path])[0]
        value = values.get(path, default)
        each = tuple(value) if _is_list(value) else (value,) * layers
        if len(each) != layers:
            raise ValueError(
                f"`{argument}` gives {len(each)} values for site {path!r}, which has "
                f"{layers} layer{'s' * (layers > 1)}"
            )
        # 0 is allowed in a stack in which another layer has more: as a rank, or as the
        # alpha of a layer whose rank is 0.
        some = BATCH in roles[path] and any(each)
        none = [some] * layers
        if ranks is not None:
            none = [some and rank == 0 for rank in ranks[path] or (None,) * layers]
        for v, allowed in zip(each, none, strict=True):  # False equals 0, and is none
            if not (allowed and v == 0 and not isinstance(v, bool)):
                _check_value(what, v, path)
        result[path] = tuple(int(v) if what == "rank" else float(v) for v in each)
    return result


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _check_value(what: str, v: Any, path: str) -> None:
    if what == "rank":
        kind = "an integer of at least 1"
        fits = isinstance(v, int | np.integer) and v >= 1
    else:
        kind = "a finite number > 0"
        fits = isinstance(v, int | float | np.number) and 0 < v < float("inf")
    if isinstance(v, bool) or not fits:
        raise ValueError(
            f"{what} of site {path!r} must be {kind}, got {v!r}; for no adapter leave "
            "the site out with `exclude`"
        )
