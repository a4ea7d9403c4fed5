"""What a PEFT file holds whole: trained modules, biases, and copies of the base."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._tensors import TensorFile, on_host
from jaxpeft.interop.peft._config import PREFIX
from jaxpeft.interop.peft._rules import is_saved_whole
from jaxpeft.numerics import dense
from jaxpeft.parts import form_of
from jaxpeft.tree import OUTPUT_HEADS, is_abstract, is_node

Keys = dict[str, dict[str, str]]  # module: {end of the key: key}

# Beside the leaves themselves PEFT writes the base's own weights of a targeted
# embedding and, where it saves everything of one, of a module that is saved whole; of
# such a module the trained values, too, a second time under another name.
OWN = ("base_layer.", "original_module.")
AGAIN = "modules_to_save."


class Whole(NamedTuple):
    """One leaf of the file that takes the place of one of the model's.

    Attributes:
        module: whose.
        part: ``"weight"`` or ``"bias"``.
        key: its key in the file.
        asked: whether the config asks for it. Embeddings that
            ``save_embedding_layers`` left in the file it does not.
    """

    module: Module
    part: str
    key: str
    asked: bool = True


def whole_leaves(config, table: Table, keys: Keys, file, problems) -> list[Whole]:
    """The leaves of modules, and the biases, that the config says are whole."""
    found = []
    for module in table.modules:
        ends = keys.get(module.name, {})
        saved = is_saved_whole(config, module.name)
        for part, path in module.leaves.items():
            key = ends.get(part)
            if saved and key is None:
                problems.append(f"missing: {PREFIX}{module.name}.{part}")
            if part == "bias" and config.get("bias", "none") != "none" and not saved:
                key = ends.get("base_layer.bias", key)
            elif not saved:
                continue
            if key is None:
                continue
            if is_node(table.leaves[path]):
                problems.append(f"{path!r} already carries an adapter in `params`")
            elif _fits(file, key, table, module, part, problems):
                found.append(Whole(module, part, key))
    return found


def check_copies(table: Table, keys: Keys, file, sites, whole, problems):
    """What the file has of the base itself: its own weights, or others.

    Args:
        table: the model's modules.
        keys: the file's.
        file: the file.
        sites: ``{module: its method}`` of what the config targets.
        whole: what it asks to be whole.
        problems: what does not fit is added to them.

    Returns:
        ``(keys that need no more reading, embeddings that differ from the model's)``.
    """
    done: set[str] = set()
    other: list[Whole] = []
    asked = {each.key for each in whole}
    for module in table.modules:
        ends, method = keys.get(module.name, {}), sites.get(module.name)
        for end, key in ends.items():
            part = end.rpartition(".")[2]
            if end.startswith(AGAIN):
                done.add(key)
            elif end.startswith(OWN) and end != _BIAS and part in module.leaves:
                done.add(key)
                # What a method decomposes is written without what it took out.
                changed = method is not None and form_of(method).redone
                if not _fits(file, key, table, module, part, problems) or changed:
                    continue
                if not _repeats(file, key, table, module, part):
                    problems.append(
                        f"{key!r} is what the adapter was trained over, and differs "
                        f"from the model's {module.name!r}: load the base that it "
                        "belongs to"
                    )
        key = ends.get("weight") if _is_table(module) and method is None else None
        if key is None or key in asked:
            continue
        done.add(key)
        if not _fits(file, key, table, module, "weight", problems):
            continue
        if not _repeats(file, key, table, module, "weight"):
            if is_node(table.leaves[module.leaves["weight"]]):
                problems.append(
                    f"{key!r} differs from the model's {module.name!r}, which carries "
                    "an adapter in `params`"
                )
            other.append(Whole(module, "weight", key, asked=False))
    return done, other


_BIAS = "base_layer.bias"  # of a trained bias, not a copy


def _is_table(module: Module) -> bool:
    """Whether a module is an embedding or predicts tokens."""
    return module.kind == "embedding" or module.name.rpartition(".")[2] in OUTPUT_HEADS


def _fits(file, key: str, table: Table, module: Module, part: str, problems) -> bool:
    """Whether a tensor has the shape of the model's; says it where it has not."""
    have, need = file.shapes[key], table.tensor_shape(module, part)
    if have == need:
        return True
    why = ""
    if len(have) == len(need) == 2 and have[1] == need[1] and _is_table(module):
        why = (
            ": the vocabulary was resized. Resize the base's in transformers, "
            f"model.resize_token_embeddings({have[0]}), save it, and load that one"
        )
    problems.append(f"{key!r} has shape {list(have)}; the model's is {list(need)}{why}")
    return False


def _repeats(file: TensorFile, key: str, table: Table, module: Module, part: str):
    """Whether a tensor is the base's own, but for the rounding of the coarser dtype."""
    leaf = table.leaves[module.leaves[part]]
    base = leaf.base if is_node(leaf) else leaf
    if is_abstract(base):
        return True  # a plan of a model has no values
    ours, theirs = table.tensor(module, part, on_host(dense(base))), file.read(key)
    kinds = [jnp.finfo(x.dtype) for x in (ours, theirs)]
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.allclose(
        ours,
        theirs,
        rtol=max(float(kind.eps) for kind in kinds),
        atol=max(float(kind.smallest_subnormal) for kind in kinds),
    )


def by_leaf(each: list[Whole], problems: list[str]) -> dict[str, list[Any]]:
    """``{path of our leaf: [(module, part, key), ...]}``, all layers of a stack."""
    found: dict[str, list[tuple[Module, str, str]]] = {}
    for module, part, key, _ in each:
        found.setdefault(module.leaves[part], []).append((module, part, key))
    for path, own in found.items():
        if len(own) < own[0][0].layers:
            problems.append(partial(path, [module for module, *_ in own]))
    return found


def partial(path: str, modules: list[Module]) -> str:
    """What to say of a file that has some layers of a stack."""
    have = [module.layer for module in modules]
    return (
        f"{path!r} is a stack of {modules[0].layers} layers, and the file is about "
        f"layers {have} alone; load into a model with scan_layers=False"
    )
