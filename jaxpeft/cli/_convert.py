"""``jaxpeft export``, ``import`` and ``convert``: an adapter in another file format."""

import argparse
from types import SimpleNamespace
from typing import Any

from jaxpeft.cli._console import note, stage
from jaxpeft.cli._folders import MODEL, OWN, PEFT, find
from jaxpeft.cli._open import (
    Opened,
    add_adapter,
    add_base,
    add_labels,
    add_push,
    changed_options,
    checked_push,
    new_folder,
    open_adapter,
    open_tokenizer,
)
from jaxpeft.cli._types import whole

FORMS = ("own", "peft", "native", "portable")
TASKS = (
    *("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS"),
    "FEATURE_EXTRACTION",
)
_TASK_OF = {
    "causal_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
}
_FORMS = """\
forms of HF PEFT's files:
  native     each method's own, to train on in PEFT
  portable   plain LoRA of one rank on the untouched base, for any loader
  peft       native where the file alone makes the function, else plain LoRA
"""


def _common(parser: argparse.ArgumentParser) -> None:
    add_adapter(parser)
    add_base(parser)
    add_labels(parser)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new or an empty folder"
    )
    add_push(parser)


def _of_peft(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank", type=whole(1), metavar="R", help="rank of plain LoRA (form portable)"
    )
    parser.add_argument(
        "--task-type",
        choices=TASKS,
        metavar="TASK",
        help=f"PEFT's word for what the head does: {', '.join(TASKS)} (default: by the "
        "model's head; none for portable)",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="what readers of the file shall load as the base (default: the base)",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write an adapter on an embedding that is also the output head, which "
        "PEFT will apply to the look-up alone",
    )


def convert(given: argparse.Namespace, form: str, needed: str | None = None) -> None:
    """Reads an adapter and writes it in another format.

    Args:
        given: the parsed arguments.
        form: a name in ``FORMS``.
        needed: the sort that the adapter must be of, ``None`` for any.
    """
    out = new_folder(given.out)
    push = checked_push(given)
    if form == "own":
        _refuse(given, "rank", "task_type", "base_model", "untie")
    elif form != "portable":
        _refuse(given, "rank")
    _, kind = find(given.adapter)
    if needed is not None and kind not in (needed, MODEL):
        other = "import" if kind == PEFT else "export"
        raise ValueError(
            f"{given.adapter!r} is {_named(kind)} already; `jaxpeft {other}` "
            "goes the other way, `jaxpeft convert` between PEFT's forms."
        )
    from jaxpeft import interop

    opened = open_adapter(given)
    # PEFT's classifiers bring their head along, which plain LoRA has no place for.
    task = None if form == "portable" else _TASK_OF.get(opened.model.head)
    tokenizer = open_tokenizer(opened.folder, given.adapter)
    with stage(f"writing {given.out}"):
        if form == "own":
            told = _task_metadata(opened) | {"from": given.adapter, "base": opened.base}
            if opened.kind == PEFT and tokenizer is not None:  # ours says it already
                told["tokenizer"] = changed_options(opened.folder, tokenizer)
            interop.save_adapter(opened.adapted, out, metadata=told)
            print(f"{out}: jaxpeft's own adapter")
            return push()
        saved = interop.save_peft(
            opened.adapted,
            out,
            names=opened.model.names,
            axes=opened.model.axes,
            form={"peft": "auto"}.get(form, form),
            rank=given.rank,
            base_model=given.base_model or opened.base,
            task_type=given.task_type or task,
            labels=opened.wanted.labels,
            untie=given.untie,
            tokenizer=tokenizer,
            metadata=opened.wanted.metadata,
        )
    for name, error in saved.errors.items():
        note(f"{name}: cut to rank {saved.rank}, {error:.1e} of its change is lost")
    rank = "" if saved.rank is None else f", rank {saved.rank}"
    whole = f", {len(saved.saved)} modules whole" if saved.saved else ""
    print(f"{out}: HF PEFT, {saved.form}, {len(saved.sites)} modules{rank}{whole}")
    push()


def _task_metadata(opened: Opened) -> dict[str, Any]:
    """What an own adapter says of its task, however it came to be."""
    kept = dict(opened.wanted.metadata)
    if opened.model.head in ("classification", "regression"):
        kept["regression"] = opened.model.head == "regression"
    labels = opened.wanted.labels
    return kept if labels is None else kept | {"labels": list(labels)}


def _refuse(given: argparse.Namespace, *names: str) -> None:
    """Nothing that was asked for is silently left out."""
    for name in names:
        if getattr(given, name, None):
            flag = "--" + name.replace("_", "-")
            where = "form portable" if name == "rank" else "HF PEFT's files"
            raise ValueError(f"{flag} is for {where}; leave it out here.")


def _named(kind: str) -> str:
    return "an adapter of jaxpeft's own" if kind == OWN else "an adapter of HF PEFT's"


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--form", choices=FORMS[1:], default="peft", help="see above (default: peft)"
    )
    _of_peft(parser)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--to", choices=FORMS, required=True, help="the new format")
    _of_peft(parser)


DIRECTIONS = (
    SimpleNamespace(
        NAME="export",
        SUMMARY="write one of our own adapters as HF PEFT's",
        DESCRIPTION="Writes an adapter of jaxpeft's own as a folder that HF PEFT loads."
        f"\n\n{_FORMS}",
        EXAMPLE="jaxpeft export runs/quickstart --out quickstart-peft",
        arguments=_export_arguments,
        run=lambda given: convert(given, given.form, OWN),
    ),
    SimpleNamespace(
        NAME="import",
        SUMMARY="write an adapter of HF PEFT's as one of our own",
        DESCRIPTION="Writes an adapter that HF PEFT saved as one of jaxpeft's own, to "
        "train on.",
        EXAMPLE="jaxpeft import from-peft --base path/to/llama --out my-adapter",
        arguments=_common,
        run=lambda given: convert(given, "own", PEFT),
    ),
    SimpleNamespace(
        NAME="convert",
        SUMMARY="write any adapter in any format",
        DESCRIPTION="Writes an adapter of either sort in another format: jaxpeft's "
        f"own\n(own), or a form of HF PEFT's.\n\n{_FORMS}",
        EXAMPLE="jaxpeft convert from-peft --base path/to/llama --to portable "
        "--rank 16 --out for-vllm",
        arguments=_convert_arguments,
        run=lambda given: convert(given, given.to),
    ),
)
