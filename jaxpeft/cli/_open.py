"""From names on a command line to a model and an adapted tree."""

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli._console import stage
from jaxpeft.cli._types import whole

OWN, PEFT, MODEL = "own", "peft", "model"
HEADS = ("auto", "none", "causal_lm", "classification", "regression")
SEED = 0  # of what a checkpoint lacks
_MARKS = {
    OWN: "adapter.json",
    PEFT: "adapter_config.json",
    MODEL: "config.json",
}
_BY_CLASS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "classification",
}
_BY_TASK = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "classification"}
_LABELS = re.compile(r"\.(score|classifier|classifier\.out_proj)\.weight$")


class Wanted(NamedTuple):
    """What an adapter's files say of the model that it belongs to.

    Attributes:
        head: as in ``models.load``; ``None``: they do not say.
        labels: classes of the head.
        sites: ``{path: shape}`` of leaves that the model must have.
        param_dtype: in which the model was read when it was trained.
    """

    head: str | None = None
    labels: int | None = None
    sites: dict[str, list[int]] | None = None
    param_dtype: str | None = None


class Opened(NamedTuple):
    """A base model with an adapter on it.

    Attributes:
        model: the Linen module.
        adapted: its parameters, adapted.
        kind: which sort of folder the adapter was in, ``"own"`` or ``"peft"``.
        folder: the base's folder.
    """

    model: Any
    adapted: Any
    kind: str
    folder: Path


def add_base(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds what says which base model is meant."""
    parser.add_argument(
        "--base",
        required=required,
        help="the base model: a folder, a packaged model, or a name on the hub",
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="auto",
        help="the model's head (default: the one that the adapter was trained with)",
    )
    parser.add_argument(
        "--num-labels", type=whole(1), metavar="N", help="classes of the head"
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="accept another base than the one that an own adapter was trained with",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field of a PEFT config to overlook; may be given again",
    )


def kind_of(folder: Path) -> str:
    """What a folder holds: an adapter of either sort, or a model.

    Raises:
        FileNotFoundError: it is no folder, or holds none of these.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder.")
    found = [kind for kind, mark in _MARKS.items() if (folder / mark).is_file()]
    if OWN in found and PEFT in found:
        raise ValueError(
            f"{str(folder)!r} holds both {_MARKS[OWN]} and {_MARKS[PEFT]}; keep one "
            "adapter a folder."
        )
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r} holds none of {', '.join(_MARKS.values())}: neither an "
            "adapter nor a model."
        )
    return found[0]


def new_folder(name: str) -> Path:
    """An output folder that is not there yet, or empty; checked before any work."""
    folder = Path(name)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(
            f"--out {name!r} exists and is not empty; nothing is overwritten. Name "
            "another folder."
        )
    return folder


def open_adapter(given: argparse.Namespace, *, whole: bool = True) -> Opened:
    """Reads the base and puts the adapter on it.

    Args:
        given: the parsed arguments.
        whole: refuse a model a part of which is neither in the base's files nor in
            the adapter's: it would be drawn at random.
    """
    folder = Path(given.adapter)
    kind, wanted = _wanted(given, folder)
    base, model, params = open_base(given, wanted)
    adapted = _read(given, folder, kind, model, params)
    if whole:
        _check_whole(given, model, adapted, given.adapter)
    return Opened(model, adapted, kind, base)


def _wanted(given: argparse.Namespace, folder: Path) -> tuple[str, Wanted]:
    """The sort of an adapter's folder, and what it says of its model."""
    kind = kind_of(folder)
    if kind == MODEL:
        raise ValueError(f"{str(folder)!r} holds a model, not an adapter.")
    if kind == PEFT and given.any_base:
        raise ValueError("--any-base is for jaxpeft's own adapters; PEFT names none.")
    if kind == PEFT and given.ignore:
        _check_ignored(folder, given.ignore)
    if kind == OWN and given.ignore:
        raise ValueError("--ignore is for PEFT's configs, and this adapter has none.")
    return kind, _own(folder) if kind == OWN else _peft(folder)


def _check_ignored(folder: Path, fields: Sequence[str]) -> None:
    """Raises for what a PEFT config has no such field to overlook."""
    try:
        known = json.loads((folder / _MARKS[PEFT]).read_text(encoding="utf-8"))
    except ValueError:
        return  # the reader of the folder says what is wrong
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=3) or sorted(known)
            raise ValueError(
                f"--ignore {field!r}: {str(folder / _MARKS[PEFT])!r} has no such "
                f"field; nearest: {', '.join(near)}."
            )


def _read(given: argparse.Namespace, folder: Path, kind: str, model, params):
    """The parameters with an adapter on them."""
    from jaxpeft import interop

    with stage(f"reading the adapter {folder}"):
        if kind == OWN:
            return interop.load_adapter(folder, params, check_base=not given.any_base)
        return interop.load_peft(
            folder, params, names=model.names, axes=model.axes, ignore=given.ignore
        )


def _check_whole(given: argparse.Namespace, model, adapted, name: str) -> None:
    if drawn := _drawn(model, adapted):
        raise ValueError(
            f"{', '.join(drawn)}: neither {given.base!r} nor {name!r} has "
            "this part of the head, and drawn at random it would not be the model that "
            "was trained. Name a base that has it, or leave the head out: --head none."
        )


def open_adapters(
    given: argparse.Namespace, folders: Mapping[str, Path], rows: Sequence[str]
):
    """Reads the base and puts several adapters beside it.

    Args:
        given: the parsed arguments.
        folders: the adapters, by name.
        rows: the name of each row's adapter; ``"__base__"`` for none.

    Returns:
        ``(the base's folder, model, parameters of which each row uses its own)``.
    """
    from jaxpeft import serving
    from jaxpeft.core._node import nodes
    from jaxpeft.core._products import not_low_rank
    from jaxpeft.serving._write import change_rank

    found = {name: _wanted(given, folder) for name, folder in folders.items()}
    sites: dict[str, list[int]] = {}
    for _, wanted in found.values():
        sites |= wanted.sites or {}
    heads = [wanted.head for _, wanted in found.values() if wanted.head]
    base, model, params = open_base(
        given, Wanted(heads[0] if heads else None, sites=sites or None)
    )
    trees = {
        name: _read(given, folders[name], kind, model, params)
        for name, (kind, _) in found.items()
    }
    each = [node for tree in trees.values() for node in nodes(tree)]
    paths = {node.site.path for node in each}
    slots = serving.slots(
        params,
        lambda path, leaf: path in paths,
        capacity=len(trees),
        # What has no rank is refused by name when it is loaded.
        rank=max([change_rank(n) for n in each if not not_low_rank(n)], default=1),
        axes=model.axes,
    )
    for name, tree in trees.items():
        slots = serving.load(slots, name, tree)
    _check_whole(given, model, slots.tree, ", ".join(map(str, folders.values())))
    return base, model, serving.with_rows(slots.tree, serving.rows(slots, rows))


def open_base(given: argparse.Namespace, wanted: Wanted):
    """``(folder, model, params)`` of the base that was named."""
    import jax

    from jaxpeft import models
    from jaxpeft.models._load import _find

    with stage(f"finding the base {given.base}"):
        folder = _find(given.base)
    settings = _settings(given, folder, wanted)
    settings["param_dtype"] = wanted.param_dtype
    with stage(f"reading the base {given.base}"):
        # What of a head the checkpoint lacks is drawn; an adapter brings its own.
        model, params = models.load(folder, key=jax.random.key(SEED), **settings)
    return folder, model, params


def _drawn(model, adapted) -> list[str]:
    """Kernels of the head that were drawn, and that no adapter has a value for."""
    import jax
    import numpy as np

    from jaxpeft import models
    from jaxpeft.core import AdaptedKernel, flat
    from jaxpeft.core._node import leaves_with_path
    from jaxpeft.models._build import draw_leaves

    if model.head is None:
        return []
    body = flat(models.abstract(model.clone(head=None)))
    waiting = {}
    for path, leaf in leaves_with_path(adapted):
        node = isinstance(leaf, AdaptedKernel)
        if node and leaf.adapter.peft is not None and leaf.adapter.peft.whole:
            continue
        value = leaf.base if node else leaf
        if path not in body and value.ndim > 1:
            waiting[path] = value
    places = dict.fromkeys(waiting)
    drawn = draw_leaves(model, jax.random.key(SEED), tuple(waiting), places)
    return [path for path, x in waiting.items() if np.array_equal(x, drawn[path])]


def _settings(given: argparse.Namespace, folder: Path, wanted: Wanted):
    """Head, number of labels and layout in which the adapter's sites are there."""
    from jaxpeft.models._load import _read_config

    config = _read_config(folder)
    name = next(iter(config.get("architectures") or ()), "")
    head = next((h for end, h in _BY_CLASS.items() if name.endswith(end)), None)
    head, labels = wanted.head or head, given.num_labels
    if given.head != "auto":
        head = None if given.head == "none" else given.head
    if labels is None and head == "classification":
        labels = wanted.labels
    settings = {"head": head, "num_labels": labels}
    if wanted.head == head and wanted.head is not None:
        _check_head(given, config, settings)
    if not wanted.sites:
        return settings
    return _fitting(config, settings, wanted.sites, free=given.head == "auto")


def _check_head(given: argparse.Namespace, config, settings: dict[str, Any]) -> None:
    """Says that it is the adapter which wants a head that the base cannot have."""
    from jaxpeft import models

    try:
        models.from_config(config, **settings)
    except ValueError as e:
        raise ValueError(
            f"{given.adapter!r} asks for the head {settings['head']!r}, which "
            f"{given.base!r} cannot have ({e}) Is it the right base? --head says "
            "another head."
        ) from e


def _fitting(config, first: dict[str, Any], sites: dict[str, list[int]], *, free: bool):
    """The first settings with which the model has every site, or else ``first``."""
    from jaxpeft import models
    from jaxpeft.core import flat

    tried = [first]
    if free:
        widths = dict.fromkeys(shape[-1] for shape in sites.values() if shape)
        labels = [first["num_labels"]] if first["num_labels"] else [None, *widths]
        if first["num_labels"] is None:  # or it would go unheard
            tried += [{"head": None, "num_labels": None}]
            tried += [{"head": "causal_lm", "num_labels": None}]
        tried += [{"head": "classification", "num_labels": n} for n in labels]
    for scan_layers in (False, True):
        for settings in tried:
            settings = settings | {"scan_layers": scan_layers}
            try:
                model = models.from_config(config, **settings)
            except ValueError:
                continue  # a family without this head
            shapes = {p: list(x.shape) for p, x in flat(models.abstract(model)).items()}
            if all(shapes.get(path) == shape for path, shape in sites.items()):
                return settings
    return first


def _own(folder: Path) -> Wanted:
    """What an adapter of our own says: the kernels that it sits on."""
    from jaxpeft import interop

    sites = interop.adapter_info(folder)["sites"]
    dtypes = {site["base"]["dtype"] for site in sites}
    return Wanted(
        sites={site["path"]: site["base"]["shape"] for site in sites},
        param_dtype=dtypes.pop() if len(dtypes) == 1 else None,
    )


def _peft(folder: Path) -> Wanted:
    """What a PEFT adapter says: the task, and the width of a head that it holds."""
    from jaxpeft.interop._tensors import TensorFile

    try:
        config = json.loads((folder / _MARKS[PEFT]).read_text(encoding="utf-8"))
        head = _BY_TASK.get(config.get("task_type"))
    except (ValueError, AttributeError):
        return Wanted()  # the reader of the folder says what is wrong
    file = folder / "adapter_model.safetensors"
    if head != "classification" or not file.is_file():
        return Wanted(head)
    shapes = TensorFile(file).shapes
    found = [shape[0] for name, shape in shapes.items() if _LABELS.search(name)]
    return Wanted(head, found[-1] if found else None)
