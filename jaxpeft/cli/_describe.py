"""``jaxpeft describe``: what a folder holds."""

import argparse
import collections
import json
import math
import re
from pathlib import Path

from jaxpeft.cli._base import open_base
from jaxpeft.cli._folders import MODEL, OWN, Wanted, find
from jaxpeft.cli._open import add_base, open_adapter

NAME = "describe"
SUMMARY = "say what an adapter or a model is"
DESCRIPTION = """\
Says what a folder holds: an adapter of either sort, or a model. With --base an adapter
is put on it, and every site is listed with its method, rank and count.
"""
EXAMPLE = "jaxpeft describe runs/quickstart/adapter"

_LAYER = re.compile(r"(?<=[./_])\d+(?=[./])")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "adapter", metavar="FOLDER", help="an adapter, a run with one, or a model"
    )
    add_base(parser, "none: an adapter is shown by itself")


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    folder, kind = find(given.adapter)
    if given.base is None:
        of_model = (given.head != "auto", given.num_labels is not None)
        of_adapter = (given.any_base, bool(given.ignore))
        if any(of_adapter) or (kind != MODEL and any(of_model)):
            raise ValueError(
                "--head, --num-labels, --any-base and --ignore say how an adapter goes "
                "onto a base: write --base too."
            )
    if given.base is not None:
        from jaxpeft.tree import describe

        print(describe(open_adapter(given, whole=False).adapted))
    elif kind == MODEL:
        _model(given)
    elif kind == OWN:
        _own(folder)
    else:
        _peft(folder)


def _own(folder: Path) -> None:
    from jaxpeft import interop

    info = interop.adapter_info(folder)
    print(f"{folder}: an adapter of jaxpeft's own, by jaxpeft {info['jaxpeft']}")
    for i, method in enumerate(info["methods"]):
        options = ", ".join(f"{k}={v!r}" for k, v in method["options"].items())
        sites = [site for site in info["sites"] if site["method"] == i]
        print(f"\n{method['name']}({options})")
        rows = [
            (site["path"], f"{_dims(site['base']['shape'])} {_ranks(site['ranks'])}")
            for site in sites
        ]
        _table(rows)
    if info["metadata"]:
        text = json.dumps(info["metadata"], indent=1, sort_keys=True)
        print(f"\nmetadata {text}")


def _ranks(ranks) -> str:
    if ranks is None:
        return ""
    distinct = sorted(set(ranks))
    return "rank " + (f"{distinct[0]}" if len(distinct) == 1 else f"{ranks}")


def _peft(folder: Path) -> None:
    from jaxpeft.interop import PEFT_CONFIG as CONFIG
    from jaxpeft.interop import PREFIX, TENSORS, TensorFile

    try:
        given = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{folder / CONFIG} is damaged or no PEFT config: {e}") from e
    version = given.get("peft_version", "(unknown)")
    print(f"{folder}: an adapter of HF PEFT's, by peft {version}\n")
    for name in sorted(given):
        if given[name] not in (None, False, [], {}, "") or name in ("r", "lora_alpha"):
            print(f"  {name}: {json.dumps(given[name])}")
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {TENSORS}.")
    shapes = TensorFile(folder / TENSORS).shapes
    print()
    _table((name.removeprefix(PREFIX), _dims(s)) for name, s in shapes.items())
    total = sum(math.prod(shape) for shape in shapes.values())
    print(f"\n{total:,} values in {len(shapes)} tensors")


def _model(given: argparse.Namespace) -> None:
    from jaxpeft.tree import flat

    given.base = given.adapter
    _, model, params = open_base(given, Wanted())
    leaves = flat(params)
    config = model.config
    print(f"{given.adapter}: {config.model_type}, head {model.head or 'none'}\n")
    _table((path, f"{_dims(x.shape)} {x.dtype}") for path, x in leaves.items())
    total = sum(x.size for x in leaves.values())
    print(f"\n{total:,} parameters")


def _dims(shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _table(rows) -> None:
    """Prints rows; those that differ in the number of a layer alone are one."""
    rows = [(_LAYER.sub("{i}", name), text) for name, text in rows]
    counts = collections.Counter(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for (name, text), count in counts.items():
        times = f"  ({count} layers)" if count > 1 else ""
        print(f"  {name.ljust(width)}  {text.strip()}{times}")
