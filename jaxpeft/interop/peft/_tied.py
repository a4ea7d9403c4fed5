"""PEFT's adapters on an embedding that is the output head as well.

PEFT changes the module that it wraps and leaves the weight that two modules share as it
is: an adapter on the embedding changes the look-up, one on the head the logits. With
``ensure_weight_tying`` it puts one adapter on both.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PyTree

from jaxpeft.interop._modules import Table
from jaxpeft.interop._untie import Tie, loosened, ties
from jaxpeft.interop.peft._attach import Found, read_leaf
from jaxpeft.interop.peft._sites import decomposed_tie
from jaxpeft.interop.peft._whole import Keys, Whole
from jaxpeft.lowrank import is_plain
from jaxpeft.models import ModuleName
from jaxpeft.parts import form_of
from jaxpeft.tree import is_node, leaves_with_path, resolve_pattern


def tables(
    params: PyTree, names: Sequence[ModuleName], axes: Mapping[str, str] | None
) -> tuple[Table, Table]:
    """The modules of a tree as PEFT sees them, every one by itself, and as they lie.

    Args:
        params: the tree.
        names: rows of the model.
        axes: roles, as in ``attach``.

    Returns:
        ``(of the untied tree, of the tree)``: the same where nothing is tied.
    """
    names = [ModuleName(*row) for row in names]
    leaves = dict(leaves_with_path(params))
    weights = [path for path, x in leaves.items() if len(x.shape) >= 2]
    words = resolve_pattern("axes", axes, weights) if axes else {}
    made = []
    for tree in (loosened(params, names), params):
        own = dict(leaves_with_path(tree))
        made.append(Table(names, own, {p: w for p, w in words.items() if p in own}))
    return made[0], made[1]


def bound(table: Table, key: str) -> str:
    """Why a module has no leaf: it is another one's, in this tree."""
    for row in table.rows:
        if row.tied and key.startswith(row.tied + "."):
            return _one_leaf(table, row)
    return ""


def _one_leaf(table: Table, row: ModuleName) -> str:
    """Why the two modules of a tie cannot be told apart in a tree."""
    adapted = any(
        is_node(table.leaves[path])
        for module in table.modules
        if module.row == row
        for path in module.leaves.values()
    )
    why = (
        "which carries an adapter in `params`: that acts on both"
        if adapted
        else "and `names` has no rows for the two apart (ModuleName: `tied`)"
    )
    return (
        f"{row.tied!r} shares the weight of {row.theirs!r}, {why}. PEFT's adapter "
        "changes one of them"
    )


def settle(config, table: Table, tied: Table, keys, found, whole, file, problems):
    """Puts what acts on embedding and head alike back onto the leaf that is both.

    Args:
        config: with defaults.
        table: modules of the untied tree.
        tied: modules of the tree as it is.
        keys: the file's.
        found: adapters, on modules of ``table``.
        whole: leaves that the file has whole, of modules of ``table``.
        file: the file.
        problems: what has no place in either tree is added to them.

    Returns:
        ``(found, whole)``: on modules of ``tied`` throughout, or of ``table``.
    """
    pairs = [tie for tie in ties(table.rows) if tie.tied in tied.leaves]
    for site in found:
        if why := decomposed_tie(site.module.name, site.adapter, table.rows):
            problems.append(
                f"{why}. Convert the adapter to plain LoRA in PEFT, over a model "
                "whose head is its own (path_initial_model_for_weight_conversion)"
            )
    alone = {row.theirs: row for row in table.rows if row.tied}
    for name in (*(s.module.name for s in found), *(w.module.name for w in whole)):
        row = alone.get(name)
        if row is not None and table.by_name[name].row == row:
            problems.append(_one_leaf(table, row))
    if problems:
        return found, whole
    for tie in pairs:
        own = [site for site in found if site.module.name in tie.modules]
        kept = [each for each in whole if each.module.name in tie.modules]
        if left := [each.key for each in kept if not each.asked]:
            have = {each.module.name for each in kept}
            for module in (table.by_name[name] for name in tie.modules):
                if module.name not in have and (key := _weight_of(keys, module.name)):
                    kept.append(Whole(module, "weight", key, asked=False))
        if own and left:
            problems.append(
                f"{left} differ from the model's embedding, beside which the file has "
                "adapters: load the base that they belong to"
            )
        elif own or kept:
            one = _one_site(config, tie, own, file, problems) if not kept else None
            if one is None and not own:
                one = _one_whole(config, kept, file, problems)
            if one is None:
                return found, whole
            found = [site for site in found if site not in own or site is one]
            whole = [each for each in whole if each not in kept or each is one]
    by_name = tied.by_name
    found = [site._replace(module=by_name[_home(pairs, site)]) for site in found]
    whole = [each._replace(module=by_name[_home(pairs, each)]) for each in whole]
    return found, whole


def _weight_of(keys: Keys, name: str) -> str | None:
    return keys.get(name, {}).get("weight")


def _home(pairs: Sequence[Tie], each: Found | Whole) -> str:
    """The name of the module that has the leaf in a tied tree."""
    name = each.module.name
    return next((t.modules[0] for t in pairs if name in t.modules), name)


def _one_site(config, tie: Tie, own: Sequence[Found], file, problems) -> Found | None:
    """The adapter of the embedding, where the head's is the same one."""
    if len(own) != 2 or not config.get("ensure_weight_tying"):
        return None
    words, head = sorted(own, key=lambda site: tie.modules.index(site.module.name))
    read = lambda site: form_of(site.adapter).from_leaves(
        {end: read_leaf(file, key) for end, key in site.keys.items()},
        site.module.kind,
    )
    ours, theirs = read(words), read(head)
    if not all(np.array_equal(ours[one], theirs[two].T) for one, two in ("ab", "ba")):
        problems.append(
            f"{words.module.name!r} and {head.module.name!r} share one adapter by "
            "ensure_weight_tying, and the file has two that differ: which of them PEFT "
            "would use depends on the order of its keys"
        )
        return None
    plain = is_plain(words.adapter) and is_plain(head.adapter)
    alike = (words.rank, words.alpha) == (head.rank, head.alpha)
    return words if plain and alike else None


def _one_whole(config, kept: Sequence[Whole], file, problems) -> Whole | None:
    """The embedding, where the head is the same one."""
    tying = config.get("ensure_weight_tying") and len(kept) == 2
    if not tying and any(each.asked for each in kept):
        return None
    first, *others = kept
    value = file.read(first.key)
    if not all(np.array_equal(value, file.read(each.key)) for each in others):
        problems.append(
            f"{[each.key for each in kept]} are one table in PEFT, and the file has "
            "two that differ: which of them it would use depends on their order"
        )
    return first
