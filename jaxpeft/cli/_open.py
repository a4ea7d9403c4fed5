"""From names on a command line to a model and an adapted tree."""

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli._base import check_whole, open_base
from jaxpeft.cli._console import stage
from jaxpeft.cli._folders import MARKS, MODEL, OWN, PEFT, Wanted, find_adapter
from jaxpeft.cli._types import whole

HEADS = ("auto", "none", "causal_lm", "classification", "regression")


class Opened(NamedTuple):
    """A base model with an adapter on it, or alone.

    Attributes:
        model: the Linen module.
        adapted: its parameters, adapted.
        kind: which sort of folder the adapter was in, ``"own"`` or ``"peft"``;
            ``"model"``: there is none.
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
        "adapter",
        metavar="ADAPTER",
        help="an adapter's folder, that of a run, or a name on the hub",
    )


def add_push(parser: argparse.ArgumentParser) -> None:
    """Adds the way to the hub, of a command that writes a folder."""
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub"
    )


def checked_push(given: argparse.Namespace) -> Callable[[], None]:
    """What uploads ``--out`` where ``--push`` says so; its name is looked at now."""
    from jaxpeft import interop

    if given.push is None:
        return lambda: None
    interop.check_hub_name(given.push)
    return lambda: print(interop.push(given.out, given.push))


def add_base(
    parser: argparse.ArgumentParser, default: str = "the one that the adapter names"
) -> None:
    """Adds what says which base model is meant; ``default`` is a text for the help."""
    parser.add_argument(
        "--base",
        help="the base model: a folder, a packaged model, or a name on the hub "
        f"(default: {default})",
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


def open_tokenizer(base: Path, adapter: str | Path | None = None):
    """The tokenizer of a base, as an adapter was trained with it; None: there is none.

    An own adapter says what was changed, a PEFT one has a tokenizer of its own beside
    it or none.
    """
    from jaxpeft import models
    from jaxpeft.models import has_tokenizer

    options: dict[str, Any] = {}
    if adapter is not None:
        folder, kind, wanted = find_adapter(adapter)
        if kind == PEFT and has_tokenizer(folder):
            return models.tokenizer(folder)
        options = wanted.metadata.get("tokenizer") or {}
    return models.tokenizer(base, **options) if has_tokenizer(base) else None


def changed_options(base: Path, tokenizer) -> dict[str, str]:
    """The options of ``models.tokenizer`` in which a tokenizer differs from a base's.

    Tokens that the base's does not have are left out: its model has no row for them.
    """
    from jaxpeft import models
    from jaxpeft.models import has_tokenizer, read_tokenizer

    if not has_tokenizer(base):
        return {}
    plain = read_tokenizer(base)
    before, vocabulary = models.tokenizer_options(plain), plain.get_vocab()
    return {
        name: value
        for name, value in models.tokenizer_options(tokenizer).items()
        if value not in (None, before[name])
        and (name == "chat_template" or value in vocabulary)
    }


def need_tokenizer(base: Path, adapter: str | Path | None = None):
    """The same as ``open_tokenizer``, and an error where there is none."""
    found = open_tokenizer(base, adapter)
    if found is None:
        raise ValueError(f"{str(base)!r} has no tokenizer, and text needs one.")
    return found


def check_template(tokenizer) -> None:
    """Refuses ``--chat`` where nothing says how a chat is written."""
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat: the base's tokenizer has no chat template. An adapter that was "
            "trained with one (config.tokenizer.chat_template) brings it along."
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


def open_alone(given: argparse.Namespace) -> Opened:
    """Reads a base without an adapter; a head that it lacks is refused."""
    for flag, said in (("--any-base", given.any_base), ("--ignore", given.ignore)):
        if said:
            raise ValueError(
                f"{flag} says how an adapter goes onto the base: write --adapter too."
            )
    folder, model, params = open_base(given, Wanted())
    check_whole(model, params, given.base)
    wanted = Wanted(labels=labels_of(given, model, Wanted()))
    return Opened(model, params, MODEL, folder, given.base, wanted)


def labels_of(
    given: argparse.Namespace, model, wanted: Wanted
) -> tuple[str, ...] | None:
    """What the classes are called: what was said, or what the adapter says."""
    from jaxpeft.interop import checked

    said = getattr(given, "labels", None)
    if model.head == "classification":
        labels = said or wanted.labels
        who = "--labels" if said else f"what {str(given.adapter)!r} calls its classes"
        return labels and checked(labels, model.num_labels, who)
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
            return interop.load_adapter(
                folder, params, check_base=not given.any_base, names=model.names
            )
        return interop.load_peft(
            folder, params, names=model.names, axes=model.axes, ignore=given.ignore
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
    from jaxpeft.interop import untied_for
    from jaxpeft.lowrank import not_low_rank
    from jaxpeft.serving import change_rank
    from jaxpeft.tree import nodes

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
    one = lambda values: values.pop() if len(values) == 1 else None
    asked = Wanted(
        heads[0] if heads else None,
        sites=sites or None,
        param_dtype=one({each.param_dtype for *_, each in found.values()} - {None}),
        dtype=one({each.dtype for *_, each in found.values()} - {None}),
        quantise=one({each.quantise for *_, each in found.values()} - {None}),
        base=one(bases),
    )
    base, model, params = open_base(given, asked)
    trees = {
        name: _read(given, folder, kind, model, params)
        for name, (folder, kind, _) in found.items()
    }
    each = [node for tree in trees.values() for node in nodes(tree)]
    paths = {node.site.path for node in each}
    slots = serving.slots(
        untied_for(params, model.names, paths),
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
