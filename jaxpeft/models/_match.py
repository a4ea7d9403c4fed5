"""A checkpoint against a model: each leaf finds its tensors, or all that is wrong."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.models._checkpoint import Tensor
from jaxpeft.models._families import FAMILIES, OLD_NAMES, Family, Source
from jaxpeft.tree import grouped


class Match(NamedTuple):
    """What a checkpoint gives to a model.

    Attributes:
      found: our path -> its tensors, in the order of its source.
      new: paths of the head that the checkpoint does not have.
      ignored: names on disk that the model has no use for.
    """

    found: dict[str, tuple[Tensor, ...]]
    new: tuple[str, ...]
    ignored: tuple[str, ...]


def match(
    folder: Path,
    model_type: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    other_task: bool,
) -> Match:
    """Pairs the leaves of a model with the tensors of a checkpoint.

    Args:
      folder: the checkpoint, for messages.
      model_type: a key of ``FAMILIES``.
      tensors: every tensor on disk, by its name there.
      wanted: the source of every leaf of the model, by path.
      shapes: the shape of every leaf of the model, by path.
      other_task: whether the checkpoint's classification head is none of ours.

    Raises:
      ValueError: listing all missing, unused and misfitting tensors at once.
    """
    family = FAMILIES[model_type]
    by_name, doubles = _canonical(tensors, family)
    heads = {path.split("/")[0] for path in wanted} & set(family.heads)
    skipped = set(family.heads) - heads
    skipped |= {"classifier", "score"} & set(family.heads) if other_task else set()
    patterns = [*family.ignored, *(f"{name}.*" for name in sorted(skipped))]
    ignored = [n for n in by_name if _any_match(n, patterns)]
    present = {name: by_name[name] for name in by_name if name not in set(ignored)}

    new = [path for path in wanted if _is_new(path, wanted, present, family.drawn)]
    needed = {name for path in wanted if path not in new for name in wanted[path][0]}
    missing = sorted(needed - set(present))
    unused = sorted(set(present) - needed)
    wrong = []
    for path, source in wanted.items():
        if path in new:
            continue
        shape = shapes[path][1:] if source.stacked else shapes[path]
        shape = shape[::-1] if source.transposed else shape
        for name in source.tensors:
            if name in present and present[name].shape != shape:
                wrong.append(_misfit(present[name], shape))
            elif name in present and present[name].numpy_dtype is None:
                wrong.append(f"{present[name].name}: dtype {present[name].dtype}")
    _complain(
        folder,
        {
            "missing": [n + _near(n, unused, present) for n in missing],
            "unused": [present[n].name + _near(n, missing, needed) for n in unused],
            "of another shape or dtype": wrong,
            "there twice": doubles,
        },
    )
    return Match(
        {
            path: tuple(present[name] for name in source.tensors)
            for path, source in wanted.items()
            if path not in new
        },
        tuple(new),
        tuple(by_name[name].name for name in ignored),
    )


def _canonical(
    tensors: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by name without prefix and in today's words; names met twice."""
    found: dict[str, Tensor] = {}
    doubles = []
    for name, tensor in sorted(tensors.items()):
        short = family.within(name)
        for old, today in OLD_NAMES.items():
            if short.endswith(old):
                short = short.removesuffix(old) + today
        if short in found:
            doubles.append(f"{found[short].name} and {name}")
        found[short] = tensor
    return found, doubles


def _any_match(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(f".{name}", pattern)  # "*.x" also means a bare "x"
        for pattern in patterns
    )


def _is_new(
    path: str,
    wanted: Mapping[str, Source],
    present: Mapping[str, Any],
    drawn: tuple[str, ...],
) -> bool:
    """Whether the whole module of a head, not only a tensor of it, is absent."""
    part = path.split("/")[0]
    if part not in drawn:
        return False
    siblings = [p for p in wanted if p.split("/")[0] == part]
    return not any(name in present for p in siblings for name in wanted[p].tensors)


def _misfit(tensor: Tensor, shape: tuple[int, ...]) -> str:
    text = (
        f"{tensor.name}: {list(tensor.shape)} in the file, {list(shape)} in the model"
    )
    if tensor.name.startswith(("classifier", "score")):
        text += (
            f" (pass num_labels={tensor.shape[0]}; or, for a new head, load with "
            "head=None and add the head's leaves from models.init)"
        )
    return text


def _near(name: str, *among: Iterable[str]) -> str:
    """The nearest name of the first group that has one near."""
    for group in among:
        if found := difflib.get_close_matches(name, list(group), n=1):
            return f" (nearest: {found[0]})"
    return ""


def _complain(folder: Path, sections: Mapping[str, list[str]]) -> None:
    if any(sections.values()):
        lines = [
            f"{len(names)} {title}:\n    " + grouped(names, 4)
            for title, names in sections.items()
            if names
        ]
        raise ValueError(
            f"the tensors of {folder} do not fit the model of its config:\n  "
            + "\n  ".join(lines)
        )
