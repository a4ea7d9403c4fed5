"""What a folder on a command line holds, and what its files say."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

OWN, PEFT, MODEL = "own", "peft", "model"
MARKS = {
    OWN: "adapter.json",
    PEFT: "adapter_config.json",
    MODEL: "config.json",
}
_BY_TASK = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "classification"}
_LABELS = re.compile(r"\.(score|classifier|classifier\.out_proj)\.weight$")


class Wanted(NamedTuple):
    """What an adapter's files say of the model that it belongs to, and of its task.

    Attributes:
        head: as in ``models.load``; ``None``: they do not say.
        width: classes of the head.
        labels: their names, in the head's order.
        sites: ``{path: shape}`` of leaves that the model must have.
        param_dtype: in which the model was read when it was trained.
        dtype: in which it computed then.
        quantise: as what its kernels were quantised then.
        base: the model's name or folder, as it was given then.
        metadata: what an own adapter keeps besides.
    """

    head: str | None = None
    width: int | None = None
    labels: tuple[str, ...] | None = None
    sites: dict[str, list[int]] | None = None
    param_dtype: str | None = None
    dtype: str | None = None
    quantise: str | None = None
    base: str | None = None
    metadata: Mapping[str, Any] = MappingProxyType({})

    @property
    def run(self) -> Mapping[str, Any]:
        """The config of the run that made it, where one did."""
        return self.metadata.get("config") or {}


def find(name: str | Path) -> tuple[Path, str]:
    """The folder that is meant, and what it holds: an adapter of a sort, or a model.

    Args:
        name: an adapter's folder, that of a run with one inside, or a model's.

    Raises:
        FileNotFoundError: it is no folder, or holds none of these.
    """
    from jaxpeft import interop

    folder = Path(name)
    try:
        place = interop.adapter_folder(name)
    except FileNotFoundError as error:
        file = folder / MARKS[MODEL]
        if not file.is_file():
            if not folder.is_dir():
                raise
            raise FileNotFoundError(
                f"{error} It has no {MARKS[MODEL]}: neither an adapter nor a model."
            ) from None
        if _is_run(file):
            raise FileNotFoundError(
                f"{str(folder)!r} holds a run that has left no adapter/ yet; the same "
                "train.py command goes on with it."
            ) from None
        return folder, MODEL
    found = [kind for kind in (OWN, PEFT) if (place / MARKS[kind]).is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{str(place)!r} holds both {MARKS[OWN]} and {MARKS[PEFT]}; keep one "
            "adapter a folder."
        )
    return place, found[0]


def _is_run(file: Path) -> bool:
    """Whether a ``config.json`` is of a run of train.py, and not of a model."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False  # the reader of models says what is wrong
    return isinstance(content, dict) and {"adapter", "model", "data"} <= set(content)


def find_adapter(name: str | Path) -> tuple[Path, str, Wanted]:
    """An adapter's folder, its sort, and what it says of its model and task.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a model's folder.
    """
    folder, kind = find(name)
    if kind == MODEL:
        raise ValueError(f"{str(folder)!r} holds a model, not an adapter.")
    return folder, kind, own(folder) if kind == OWN else peft(folder)


def own(folder: Path) -> Wanted:
    """What an adapter of our own says: the kernels that it sits on, and its run."""
    from jaxpeft import interop

    info = interop.adapter_info(folder)
    sites, metadata = info["sites"], info["metadata"]
    dtypes = {site["base"]["dtype"] for site in sites}
    kinds = {site["base"].get("quantised") for site in sites} - {None}
    labels, number = interop.head_info(folder)
    head = "regression" if number else "classification" if labels else None
    if head is None and metadata.get("questions"):
        head = "causal_lm"
    model = (metadata.get("config") or {}).get("model") or {}
    return Wanted(
        head,
        len(labels) if labels else None,
        labels,
        sites={site["path"]: site["base"]["shape"] for site in sites},
        param_dtype=dtypes.pop() if len(dtypes) == 1 else None,
        dtype=model.get("dtype"),
        quantise=kinds.pop() if len(kinds) == 1 else None,
        base=metadata.get("base") or model.get("name"),
        metadata=metadata,
    )


def peft(folder: Path) -> Wanted:
    """What a PEFT adapter says: base, task, and the width of a head that it holds."""
    from jaxpeft import interop
    from jaxpeft.interop import TENSORS, TensorFile

    try:
        config = json.loads((folder / MARKS[PEFT]).read_text(encoding="utf-8"))
        head = _BY_TASK.get(config.get("task_type"))
        base = config.get("base_model_name_or_path") or None
    except (ValueError, AttributeError):
        return Wanted()  # the reader of the folder says what is wrong
    labels, number = interop.head_info(folder)
    file = folder / TENSORS
    if head != "classification" or not file.is_file():
        return Wanted(head, labels=labels, base=base)
    shapes = TensorFile(file).shapes
    found = [shape[0] for name, shape in shapes.items() if _LABELS.search(name)]
    width = found[-1] if found else None
    if number or (width == 1 and number is None):  # one output is a number, in PEFT
        head = "regression"
    return Wanted(head, width, labels, base=base)
