"""From names on a command line to a model and an adapted tree."""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli._console import stage
from jaxpeft.cli._folders import MARKS, OWN, PEFT, Wanted, find_adapter
from jaxpeft.cli._types import whole

HEADS = ("auto", "none", "causal_lm", "classification", "regression")
SEED = 0  # of what a checkpoint lacks
_BY_CLASS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "classification",
}


class Opened(NamedTuple):
    """A base model with an adapter on it.

    Attributes:
        model: the Linen module.
        adapted: its parameters, adapted.
        kind: which sort of folder the adapter was in, ``"own"`` or ``"peft"``.
        folder: the base's folder.
        base: the base, as it was named.
        wanted: what the adapter's files say; its labels are those of ``--labels``,
            where they are given.
    """

    model: Any
    adapted: Any
    kind: str
    folder: Path
    base: str
    wanted: Wanted


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds the one adapter of a command."""
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="an adapter's folder, or that of a run"
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds what says which base model is meant."""
    parser.add_argument(
        "--base",
        help="the base model: a folder, a packaged model, or a name on the hub "
        "(default: the one that the adapter names)",
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


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Adds what the classes of the head are called."""
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="NAME",
        help="what the classes are called, in the head's order (default: what the "
        "adapter says)",
    )


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
    folder, kind, wanted = _wanted(given, given.adapter)
    base, model, params = open_base(given, wanted)
    adapted = _read(given, folder, kind, model, params)
    name = given.base or wanted.base
    if whole:
        check_whole(model, adapted, name, given.adapter)
    wanted = wanted._replace(labels=labels_of(given, model, wanted))
    return Opened(model, adapted, kind, base, name, wanted)


def labels_of(
    given: argparse.Namespace, model, wanted: Wanted
) -> tuple[str, ...] | None:
    """What the classes are called: what was said, or what the adapter says."""
    from jaxpeft.interop._labels import checked

    said = getattr(given, "labels", None)
    if model.head == "classification":
        labels = said or wanted.labels
        return labels and checked(labels, model.num_labels, "--labels")
    if said:
        raise ValueError(
            f"--labels {' '.join(said)}: the head is {model.head or 'none'} and has no "
            "classes; leave --labels out."
        )
    return None


def _wanted(given: argparse.Namespace, name: str | Path) -> tuple[Path, str, Wanted]:
    """An adapter's folder, its sort, and what it says of its model."""
    folder, kind, wanted = find_adapter(name)
    if kind == PEFT and given.any_base:
        raise ValueError("--any-base is for jaxpeft's own adapters; PEFT names none.")
    if kind == PEFT and given.ignore:
        _check_ignored(folder, given.ignore)
    if kind == OWN and given.ignore:
        raise ValueError("--ignore is for PEFT's configs, and this adapter has none.")
    return folder, kind, wanted


def _check_ignored(folder: Path, fields: Sequence[str]) -> None:
    """Raises for what a PEFT config has no such field to overlook."""
    try:
        known = json.loads((folder / MARKS[PEFT]).read_text(encoding="utf-8"))
    except ValueError:
        return  # the reader of the folder says what is wrong
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=3) or sorted(known)
            raise ValueError(
                f"--ignore {field!r}: {str(folder / MARKS[PEFT])!r} has no such "
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


def check_whole(model, adapted, base: str, name: str | None = None) -> None:
    """Refuses a head a part of which is in no file, and would be drawn at random."""
    if drawn := _drawn(model, adapted):
        raise ValueError(
            f"{', '.join(drawn)}: "
            + (f"neither {base!r} nor {name!r} has " if name else f"{base!r} lacks ")
            + "this part of the head, and drawn at random it would not be the model "
            "that was trained. Name a base that has it, or leave the head out: "
            "--head none."
        )


def open_adapters(
    given: argparse.Namespace, names: Mapping[str, Path], rows: Sequence[str]
):
    """Reads the base and puts several adapters beside it.

    Args:
        given: the parsed arguments.
        names: the adapters' folders, or those of runs, by name.
        rows: the name of each row's adapter; ``"__base__"`` for none.

    Returns:
        ``(the base's folder, model, parameters of which each row uses its own)``.
    """
    from jaxpeft import serving
    from jaxpeft.core._node import nodes
    from jaxpeft.core._products import not_low_rank
    from jaxpeft.serving._write import change_rank

    found = {name: _wanted(given, folder) for name, folder in names.items()}
    sites: dict[str, list[int]] = {}
    for _, _, wanted in found.values():
        sites |= wanted.sites or {}
    heads = [wanted.head for *_, wanted in found.values() if wanted.head]
    bases = {wanted.base for *_, wanted in found.values()} - {None}
    if given.base is None and len(bases) > 1:
        raise ValueError(
            f"--base is needed: the adapters name several, {', '.join(sorted(bases))}."
        )
    asked = Wanted(
        heads[0] if heads else None, sites=sites or None, base=next(iter(bases), None)
    )
    base, model, params = open_base(given, asked)
    trees = {
        name: _read(given, folder, kind, model, params)
        for name, (folder, kind, _) in found.items()
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
    name = given.base or asked.base
    check_whole(model, slots.tree, name, ", ".join(map(str, names.values())))
    return base, model, serving.with_rows(slots.tree, serving.rows(slots, rows))


def open_base(given: argparse.Namespace, wanted: Wanted):
    """``(folder, model, params)`` of the base that was named, or that is remembered."""
    import jax

    from jaxpeft import models

    folder, name = find_base(given, wanted)
    settings, width = _settings(given, folder, wanted)
    key = jax.random.key(SEED)
    with stage(f"reading the base {name}"):
        # What of a head the checkpoint lacks is drawn; an adapter brings its own.
        if width is None:
            return folder, *models.load(folder, key=key, **settings)
        asked = {"head": "classification", "num_labels": width}
        model, params = models.load(folder, key=key, **settings | asked)
    return folder, *_with_other_head(model, params, settings, key)


def open_tokenizer(folder: Path, wanted: Wanted) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a base, as in the run, and the tokens that end its texts."""
    from jaxpeft import models

    tokenizer = models.tokenizer(folder, **(wanted.run.get("tokenizer") or {}))
    return tokenizer, models.stop_tokens(folder, tokenizer)


def find_base(given: argparse.Namespace, wanted: Wanted) -> tuple[Path, str]:
    """The base's folder, and its name as it was given or is remembered."""
    from jaxpeft.models._load import _find

    name = given.base or wanted.base
    if not name:
        who = getattr(given, "adapter", None)
        raise ValueError(
            "--base is needed"
            + (f": {who!r} does not say which model it belongs to." if who else ".")
        )
    with stage(f"finding the base {name}"):
        try:
            return _find(name), name
        except ValueError as error:
            if given.base:
                raise
            raise ValueError(
                f"the base that {str(given.adapter)!r} names, {name!r}, is not there: "
                f"{error} If it lies elsewhere, write --base."
            ) from error


def _with_other_head(model, params, settings: dict[str, Any], key):
    """A model of other classes than its checkpoint's, whose names are drawn anew."""
    from jaxpeft import models
    from jaxpeft.core import flat, unflat
    from jaxpeft.models._build import draw_leaves

    model = model.clone(head=settings["head"], num_labels=settings["num_labels"])
    leaves = flat(params)
    shapes = {path: leaf.shape for path, leaf in flat(models.abstract(model)).items()}
    other = tuple(path for path in shapes if leaves[path].shape != shapes[path])
    leaves |= draw_leaves(model, key, other, dict.fromkeys(other))
    return model, unflat(params, leaves)


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
    """How the model is read, so that the adapter's sites are there.

    Returns:
        ``(arguments of models.load, width of the checkpoint's own head where it is
        another one, else None)``.
    """
    from jaxpeft.models._config import count_labels
    from jaxpeft.models._load import _read_config

    config = _read_config(folder)
    name = next(iter(config.get("architectures") or ()), "")
    head = next((h for end, h in _BY_CLASS.items() if name.endswith(end)), None)
    own = count_labels(config) if head == "classification" else None
    if own == 1 or (own and config.get("problem_type") == "regression"):
        head = "regression"
    head, labels = wanted.head or head, given.num_labels
    if given.head != "auto":
        head = None if given.head == "none" else given.head
    if labels is None and head == "classification":
        labels = wanted.width
    settings = {"head": head, "num_labels": labels}
    if wanted.head == head and wanted.head is not None:
        _check_head(given, config, settings)
    if wanted.sites:
        free = given.head == "auto" and wanted.head is None
        settings = _fitting(config, settings, wanted.sites, free=free)
    settings["param_dtype"] = wanted.param_dtype
    settings["dtype"] = (wanted.run.get("model") or {}).get("dtype")
    heads = {"classification": settings["num_labels"], "regression": 1}
    asked = heads.get(settings["head"])
    return settings, own if None not in (own, asked) and own != asked else None


def _check_head(given: argparse.Namespace, config, settings: dict[str, Any]) -> None:
    """Says that it is the adapter which wants a head that the base cannot have."""
    from jaxpeft import models

    try:
        models.from_config(config, **settings)
    except ValueError as e:
        base = given.base or "the base that it names"
        raise ValueError(
            f"{given.adapter!r} asks for the head {settings['head']!r}, which "
            f"{base!r} cannot have ({e}) Is it the right base? --head says "
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
