"""Embedding and head of a tied model, each with a leaf of its own."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxpeft.models import ModuleName
from jaxpeft.tree import is_node, leaves_with_path


class Tie(NamedTuple):
    """Two modules of a checkpoint, and where their one table lies in our trees.

    Attributes:
        modules: their names, the embedding's first.
        tied: path of the leaf that is both.
        apart: paths of the leaves that are one each.
    """

    modules: tuple[str, str]
    tied: str
    apart: tuple[str, str]


def ties(names: Sequence[ModuleName]) -> list[Tie]:
    """What a table of names ties, and has rows for both kinds of tree of."""
    found = []
    for row in names:
        if not row.tied:
            continue
        other = [r.ours for r in names if r.theirs == row.theirs and r.ours != row.ours]
        head = [r.ours for r in names if r.theirs == row.tied]
        if other and head:
            apart = tuple(f"{ours}/embedding" for ours in (other[0], head[0]))
            both = (row.theirs, row.tied)
            found.append(Tie(both, f"{row.ours}/embedding", apart))
    return found


def untie(params: PyTree, *, names: Sequence[ModuleName]) -> PyTree:
    """Gives a tied model's embedding and head a leaf each.

    The function stays, and so does the memory: both leaves are the array that was
    there, until one of them is adapted, trained or placed elsewhere. The same model
    runs the tree, ``load_peft`` and ``save_peft`` read and write adapters of either
    leaf, and ``save_hf`` writes a checkpoint that is not tied.

    Args:
        params: nested dicts, plain or with adapters at other sites. One that is
            untied comes back as it is.
        names: ``model.names`` of our models. Rows of your own need one with ``tied``
            and those of both modules apart; see ``ModuleName``.

    Returns:
        The tree with, in a Llama, ``embed_tokens/lookup/embedding`` and
        ``lm_head/embedding``, both [V, D], in place of ``embed_tokens/embedding``.
        By default an adapter on the head takes the axes of its table as "out in".

    Raises:
        ValueError: ``names`` ties nothing or does not say where the two lie apart,
            ``params`` has no such leaf, or it carries an adapter: that acts on both.

    Example:
        >>> from jaxpeft.models import ModuleName
        >>> names = [
        ...     ModuleName("model.embed_tokens", "embed", "embedding", tied="lm_head"),
        ...     ModuleName("model.embed_tokens", "embed/lookup", "embedding"),
        ...     ModuleName("lm_head", "lm_head", "linear"),
        ... ]
        >>> apart = untie({"embed": {"embedding": [1.0]}}, names=names)
        >>> apart
        {'embed': {'lookup': {'embedding': [1.0]}}, 'lm_head': {'embedding': [1.0]}}
    """
    found = ties(names)
    if not found:
        raise ValueError(
            "`names` has no row with `tied` that also says where the two modules lie "
            "apart; for a model of ours write names=model.names. A model whose config "
            "does not tie them has two leaves already."
        )
    for tie in found:
        leaf = _get(params, tie.tied.split("/"))
        if leaf is None and all(_get(params, p.split("/")) is not None for p in tie[2]):
            continue
        if leaf is None:
            raise ValueError(
                f"`params` has no leaf {tie.tied!r}; give the tree of parameters "
                "itself, not {'params': ...}, with the same model's `names`."
            )
        if is_node(leaf):
            raise ValueError(
                f"{tie.tied!r} carries {leaf.adapter.name!r}, which acts on both "
                f"{tie.modules[0]!r} and {tie.modules[1]!r}; untie the plain tree, or "
                "merge it first: jaxpeft.merge(params)."
            )
        params = _without(params, tie.tied.split("/"))
        for path in tie.apart:
            params = _with(params, path.split("/"), leaf)
    return params


def untied_for(
    params: PyTree, names: Sequence[ModuleName], paths: Collection[str]
) -> PyTree:
    """The tree, untied where leaves are asked for that it only has then.

    Args:
        params: as for ``untie``.
        names: as for ``untie``, or rows that tie nothing.
        paths: of leaves.
    """
    apart = {path for tie in ties(names) for path in tie.apart}
    have = {path for path, _ in leaves_with_path(params)}
    return untie(params, names=names) if (apart & set(paths)) - have else params


def loosened(params: PyTree, names: Sequence[ModuleName]) -> PyTree:
    """The tree, untied where it can be."""
    for tie in ties(names):
        leaf = _get(params, tie.tied.split("/"))
        if leaf is None or is_node(leaf):
            return params
    return untie(params, names=names) if ties(names) else params


def _get(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _with(tree: Mapping[str, Any], keys: Sequence[str], leaf: Any) -> dict[str, Any]:
    first, *rest = keys
    return {**tree, first: _with(tree.get(first, {}), rest, leaf) if rest else leaf}


def _without(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    first, *rest = keys
    others = {key: x for key, x in tree.items() if key != first}
    left = _without(tree[first], rest) if rest else {}
    return others | ({first: left} if left else {})
