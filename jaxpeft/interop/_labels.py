"""What the outputs of a classifier are called, beside its weights."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.interop import _format
from jaxpeft.interop.peft import _config as _peft_config

# Beside PEFT's files, which have no field for it. A config.json in that place would
# make transformers take the folder for a whole model.
LABELS = "labels.json"
MODEL = "config.json"
SINGLE, MULTI = "single_label_classification", "multi_label_classification"
REGRESSION = "regression"
# Modules whose outputs are the classes, and what lies before them in the same head.
_HEAD = re.compile(r"(^|\.)(classifier|score)(\.|$)")


class HeadInfo(NamedTuple):
    """What a folder says of the outputs of its head.

    Attributes:
        labels: names of the classes in the head's order; ``None``: it does not say.
        regression: whether the output is a number; ``None``: it does not say.
    """

    labels: tuple[str, ...] | None = None
    regression: bool | None = None


def head_info(folder: str | Path) -> HeadInfo:
    """Reads what the outputs of a classifier are called.

    Args:
        folder: an adapter of ours (``metadata["labels"]``, ``metadata["regression"]``
            of ``save_adapter``) or of HF PEFT's (what ``save_peft`` put beside it), or
            a model's folder (``id2label`` and ``problem_type`` of ``config.json``).

    Returns:
        The names, as far as the folder has them.

    Raises:
        ValueError: the names in the file are no names.

    Example:
        >>> import tempfile, jax, jaxpeft as jp
        >>> from jaxpeft import interop
        >>> params = {"classifier": {"kernel": jax.numpy.ones((4, 2))}}
        >>> key = jax.random.key(0)
        >>> adapted = jp.attach(params, jp.full(), ["classifier"], key=key)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     folder = interop.save_adapter(
        ...         adapted, folder, metadata={"labels": ["no", "yes"]}
        ...     )
        ...     head_info(folder).labels
        ('no', 'yes')
    """
    folder = Path(folder)
    if (folder / _format.CONFIG).is_file():
        metadata = _format.adapter_info(folder)["metadata"]
        labels, number = metadata.get("labels"), metadata.get("regression")
        where = f"metadata in {folder / _format.CONFIG}"
    else:
        peft = (folder / _peft_config.CONFIG).is_file()
        file = folder / (LABELS if peft else MODEL)
        if not file.is_file():
            return HeadInfo()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            ids = content.get("id2label") or {}
            by_id = {int(i): label for i, label in ids.items()}
        except (ValueError, AttributeError) as e:
            raise ValueError(f"{file} is damaged: {e!r}") from e
        kind = content.get("problem_type")
        number = None if kind is None else kind == REGRESSION
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError(f"{file} has id2label for {sorted(by_id)}, not 0, 1, ...")
        labels = None if number else [by_id[i] for i in range(len(by_id))] or None
        where = str(file)
    if labels is not None:
        labels = checked(labels, None, where)
    return HeadInfo(labels, number)


def checked(labels: Any, width: int | None, name: str = "`labels`") -> tuple[str, ...]:
    """Names of classes, all different, as many as the head has columns.

    Args:
        labels: the names.
        width: of the head; ``None``: not known here.
        name: what to call them in an error.

    Raises:
        ValueError: they are none.
    """
    listed = isinstance(labels, Sequence) and not isinstance(labels, str)
    names = listed and all(isinstance(x, str) for x in labels)
    if not names or len(set(labels)) < len(labels):
        raise ValueError(
            f"{name} must be different names of classes, a str each, in the head's "
            f"order; got {labels!r}."
        )
    if width is not None and len(labels) != width:
        raise ValueError(
            f"{name} has {len(labels)} names, {list(labels)}; the head has {width} "
            "classes, and each needs one."
        )
    return tuple(labels)


def named_head(
    content: Mapping[str, Any],
    count: int | None,
    labels: Sequence[str] | None,
    *,
    number: bool,
    trained: bool,
) -> dict[str, Any]:
    """A ``config.json`` whose names are those of this head, and never another's.

    Args:
        content: the base's, or the model's own.
        count: width of the head; ``None``: there is none for classes or a number.
        labels: what was said of it.
        number: whether the head gives a number to regress on.
        trained: whether the head is another than the base's: then the base's names
            are not its.

    Raises:
        ValueError: ``labels`` do not fit the head.
    """
    kept = dict(content)
    if labels is not None and (count is None or number):
        raise ValueError(
            f"`labels` {list(labels)} are for a classifier, and this head "
            f"{'gives a number' if number else 'has no classes'}; leave them out."
        )
    if count is None:
        return kept
    if labels is None:
        kind = REGRESSION if number else kept.get("problem_type")
        same = len(kept.get("id2label") or ()) == count
        if same and (number or not (trained or kind == REGRESSION)):
            return kept | ({"problem_type": kind} if number else {})
        labels = [f"LABEL_{i}" for i in range(count)]  # transformers' own word for none
        if not number:
            kind = MULTI if kind == MULTI else SINGLE
    else:
        labels, kind = checked(labels, count), SINGLE
    if kind == SINGLE and count == 1:  # transformers refuses that
        kind = None
    kept |= {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_labels": count,
        "problem_type": kind,
    }
    return {n: x for n, x in kept.items() if n != "problem_type" or x is not None}


def head_fields(labels: Sequence[str] | None, width: int | None) -> dict[str, Any]:
    """What a base must be loaded with to have a head of these outputs.

    Args:
        labels: names of the classes, where they are known.
        width: of the head; ``None``: there is none.

    Returns:
        Entries of a ``config.json``; none where nothing is known. One output without
        a name is a number, as transformers has it.

    Raises:
        ValueError: ``labels`` do not fit the head.
    """
    if labels is None and width != 1:
        return {}
    number = labels is None
    return named_head({}, width, labels, number=number, trained=True)


def is_head(module: str) -> bool:
    """Whether a module, by its name in the checkpoint, is of a classifier's head."""
    return _HEAD.search(module) is not None
