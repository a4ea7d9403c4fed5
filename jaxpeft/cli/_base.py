"""From the name of a base to a model with the head that an adapter needs."""

import argparse
from pathlib import Path
from typing import Any

from jaxpeft.cli._console import stage
from jaxpeft.cli._folders import Wanted

SEED = 0  # of what a checkpoint lacks
_BY_CLASS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForSequenceClassification": "classification",
}


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


def find_base(given: argparse.Namespace, wanted: Wanted) -> tuple[Path, str]:
    """The base's folder, and its name as it was given or is remembered."""
    from jaxpeft.models import find_checkpoint

    name, who = given.base or wanted.base, named_adapters(given)
    if not name:
        raise ValueError(
            "--base is needed"
            + (f": {who} does not say which model it belongs to." if who else ".")
        )
    with stage(f"finding the base {name}"):
        try:
            return find_checkpoint(name), name
        except ValueError as error:
            if given.base:
                raise
            raise ValueError(
                f"the base that {who} names, {name!r}, is not there: "
                f"{str(error).removeprefix('`folder_or_name` ')} If it lies elsewhere, "
                "write --base."
            ) from error


def named_adapters(given: argparse.Namespace) -> str:
    """The adapters of a command line as they were given; empty: there is none."""
    names = getattr(given, "adapter", None) or []
    return ", ".join(map(repr, names if isinstance(names, list) else [str(names)]))


def _with_other_head(model, params, settings: dict[str, Any], key):
    """A model of other classes than its checkpoint's, whose names are drawn anew."""
    from jaxpeft import models
    from jaxpeft.models import draw_leaves
    from jaxpeft.tree import flat, unflat

    labels = 1 if settings["head"] == "regression" else settings["num_labels"]
    model = model.clone(head=settings["head"], num_labels=labels)
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
    from jaxpeft.models import draw_leaves
    from jaxpeft.tree import AdaptedKernel, flat, leaves_with_path

    if model.head is None:
        return []
    body = flat(models.abstract(model.clone(head=None)))
    head = flat(models.abstract(model)).keys() - body.keys()
    waiting = {}
    for path, leaf in leaves_with_path(adapted):
        node = isinstance(leaf, AdaptedKernel)
        if node and leaf.adapter.where.leaf != "kernel":
            continue
        value = leaf.base if node else leaf
        if path in head and value.ndim > 1:
            waiting[path] = value
    places = dict.fromkeys(waiting)
    drawn = draw_leaves(model, jax.random.key(SEED), tuple(waiting), places)
    return [path for path, x in waiting.items() if np.array_equal(x, drawn[path])]


_READ_AS = ("param_dtype", "dtype", "quantise")  # when it was trained


def _settings(given: argparse.Namespace, folder: Path, wanted: Wanted):
    """How the model is read, so that the adapter's sites are there.

    Returns:
        ``(arguments of models.load, width of the checkpoint's own head where it is
        another one, else None)``.
    """
    from jaxpeft.models import count_labels, read_model_config

    config = read_model_config(folder)
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
    settings |= {name: getattr(wanted, name) for name in _READ_AS}
    heads = {"classification": settings["num_labels"], "regression": 1}
    asked = heads.get(settings["head"])
    return settings, own if None not in (own, asked) and own != asked else None


def _check_head(given: argparse.Namespace, config, settings: dict[str, Any]) -> None:
    """Says that it is the adapter which wants a head that the base cannot have."""
    from jaxpeft import models

    try:
        models.from_config(config, **settings)
    except ValueError as e:
        base = repr(given.base) if given.base else "the base that it names"
        raise ValueError(
            f"{named_adapters(given)} asks for the head {settings['head']!r}, which "
            f"{base} cannot have ({e}) Is it the right base? --head says another head."
        ) from e


def _fitting(config, first: dict[str, Any], sites: dict[str, list[int]], *, free: bool):
    """The first settings with which the model has every site, or else ``first``."""
    from jaxpeft import models
    from jaxpeft.interop import untied_for
    from jaxpeft.tree import flat

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
            plain = untied_for(models.abstract(model), model.names, sites)
            shapes = {path: list(x.shape) for path, x in flat(plain).items()}
            if all(shapes.get(path) == shape for path, shape in sites.items()):
                return settings
    return first
