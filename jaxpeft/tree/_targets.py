"""Which leaves a user means: targets, exclusions, and errors that show the way."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._axes import use_of
from jaxpeft.tree._node import is_node
from jaxpeft.tree._paths import (
    BIASES,
    OUTPUT_HEADS,
    compiled,
    in_module,
    module_path,
    names_leaf,
    nearest,
)
from jaxpeft.tree._together import DEFAULT, parts_of

# Standard names of leaves that are no linear layer's weight; and the output heads that
# "all-linear" leaves out, as HF PEFT does.
_NOT_LINEAR = ("embedding", "embeddings", "bias", "scale", "b")
NOT_ADAPTED = (*OUTPUT_HEADS, "score", "classifier")


def _is_weight(path: str, leaf: Any, adapter: Adapter, paths: Collection[str]) -> bool:
    """Whether a leaf is of the kind that the method sits on."""
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "ndim"):
        return False
    if adapter.where.leaf == "any":
        return True
    if adapter.where.leaf == "bias":
        return path.rpartition("/")[2] in BIASES
    # A stacked bias or norm scale has two axes and is no matrix all the same. Haiku's
    # bias is "b" beside "w"; alone, a kernel may have that name.
    head, slash, last = path.rpartition("/")
    beside = last == "b" and f"{head}{slash}w" in paths
    own = last in ("bias", "scale", "offset") or beside
    return leaf.ndim >= 2 and not own


def _is_linear(path: str, axes) -> bool:
    """Whether a kernel is contracted: as the model says, or else by its name."""
    if (use := use_of(axes, path)) is not None:
        return use == "contracted"
    return path.rpartition("/")[2] not in _NOT_LINEAR


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def choose(
    leaves, adapter, targets, exclude, name=DEFAULT, axes=None
) -> dict[str, str]:
    """``{path: the entry that found it}``, or an error that shows the way."""
    paths = {p for p, _ in leaves}
    weights = {p: x for p, x in leaves if _is_weight(p, x, adapter, paths)}
    if not weights:
        what = "biases" if adapter.where.leaf == "bias" else "weights"
        raise ValueError(
            f"`params` has no {what}: none of its {len(leaves)} leaves is an array "
            f"that {adapter.name or 'an adapter'} can sit on"
        )
    if isinstance(targets, str) and targets == "all-linear":
        found = {
            p: targets
            for p, leaf in weights.items()
            if not (is_node(leaf) and leaf.adapter.where.leaf != "kernel")
            and leaf.ndim >= 2
            and _floating(leaf)
            and _is_linear(p, axes)
            and module_path(p).rpartition("/")[2] not in NOT_ADAPTED
        }
    else:
        # A method on any leaf sits on all that lies in a module that is named.
        names = names_leaf if adapter.where.leaf == "kernel" else in_module
        found = _match("targets", targets, weights, names)
    if exclude is not None:
        out = _match("exclude", exclude, weights, in_module)
        found = {p: entry for p, entry in found.items() if p not in out}
        if not found:
            raise ValueError(f"`exclude` {exclude!r} leaves nothing of `targets`")
    if not found:
        raise ValueError(
            f"`targets` {targets!r} matched none of the {len(leaves)} leaves; they are "
            f"named like {nearest('', [p for p, _ in leaves])}"
        )
    for path in found:
        leaf = weights[path]
        if is_node(leaf) and (had := parts_of(leaf).get(name)) is not None:
            raise ValueError(
                f"site {path!r} already carries {had.adapter.name!r} (attached as "
                f"{had.site.pattern!r}) and is matched again by {found[path]!r}. "
                "Name other `targets`, leave it out with `exclude`, detach first, or "
                "give this one a name of its own, attach(..., name='french')."
            )
        if not _floating(leaf):
            raise ValueError(
                f"site {path!r} has dtype {leaf.dtype}; an adapter needs a floating "
                f"kernel. Leave it out with exclude=[{module_path(path)!r}]."
            )
    return found


def _match(argument, patterns, weights, names) -> dict[str, str]:
    """``{path: the entry that found it}`` of one argument.

    Args:
        argument: its name, for errors.
        patterns: what the user gave.
        weights: the leaves that may be meant, by path.
        names: ``(entry of a list, path) -> bool``.
    """
    paths = list(weights)
    if callable(patterns):
        name = getattr(patterns, "__name__", "callable")
        return {p: name for p, leaf in weights.items() if patterns(p, leaf)}
    if isinstance(patterns, str):
        expression = compiled(patterns, argument)
        found = {
            p: patterns
            for p in paths
            if expression.fullmatch(module_path(p)) or expression.fullmatch(p)
        }
        if not found:
            hint = nearest(patterns, paths, 2)
            raise ValueError(
                f"`{argument}` {patterns!r} is a string, so a regular expression that "
                f"must match a whole module path; it matched none of the {len(paths)} "
                f"kernels. Nearest: {hint}. To match by name write "
                f"{argument}={hint or [patterns]!r}; for part of a path, "
                f"{argument}={'.*' + patterns + '.*'!r}."
            )
        return found
    found: dict[str, str] = {}
    if not isinstance(patterns, Sequence) or not patterns:
        raise ValueError(
            f"`{argument}` must be a list of module names, a regular expression, "
            f'"all-linear" or a callable, got {patterns!r}'
        )
    for entry in patterns:
        if not isinstance(entry, str):
            raise ValueError(f"`{argument}` entry {entry!r} is not a string")
        hits = [p for p in paths if names(entry.strip("/"), p)]
        if not hits:
            near = nearest(entry, paths)
            raise ValueError(
                f"`{argument}` entry {entry!r} matched none of the {len(paths)} "
                f"kernels; nearest: {near}. List entries are names, matched at the "
                f"end of a path: write {argument}={near[:1]!r}, or a string such as "
                f"{argument}={'.*' + re.escape(near[0]) if near else '.*'!r} for a "
                "regular expression."
            )
        for path in hits:
            found.setdefault(path, entry)
    return found
