"""Multiple-choice tasks out of files and out of TensorFlow Datasets."""

import string
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.data._labels import text_of
from jaxpeft.data._sources import read_tfds
from jaxpeft.data._task import value_of
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._files import read_file

COLUMNS = {"prompt": "prompt", "choices": "choices", "answer": "answer"}


def choices(
    *,
    train: str | Path,
    validation: str | Path,
    test: str | Path | None = None,
    prompt: str,
    choices: str | Sequence[str],
    answer: str,
    answers: Sequence[str | int] | None = None,
    lead: str = " ",
    metrics: Sequence[str] | None = None,
    pack: bool = False,
) -> TextTask:
    r"""Returns a multiple-choice task over .jsonl files (.csv, .tsv: by column).

    Args:
      train: file of the training rows.
      validation: file of the validation rows.
      test: file of the test rows; None: no test split.
      prompt: what is read, columns in braces: "{question}\nAnswer:".
      choices: the column of lists of choices; or the columns, a choice each.
      answer: the column of the right one: its place, from 0, or its text.
      answers: what the column says instead, for each place: ("A", "B", "C", "D").
      lead: put before each choice, as a part of it.
      metrics: out of "accuracy", "accuracy_per_token", the deciding one first; None:
        both, in this order (`jaxpeft.data.score`).
      pack: whether several training rows share a sequence.

    Returns:
      The task, rows in order. A "/" in the name of a column goes into one of several
      parts: "question/stem".

    Raises:
      ValueError: on a file that is not there, of another kind or malformed, a column
        that is not there, and as `jaxpeft.data.make_text_task`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "capitals.jsonl"
      >>> row = '{"q": "Capital of Mali?", "c": ["Bamako", "Oslo"], "a": "B"}'
      >>> _ = path.write_text(row)
      >>> task = choices(
      ...     train=path,
      ...     validation=path,
      ...     prompt="{q}\nAnswer:",
      ...     choices="c",
      ...     answer="a",
      ...     answers=("A", "B"),
      ... )
      >>> task.splits["train"][0]["choices"], task.splits["train"][0]["answer"]
      ([' Bamako', ' Oslo'], 1)
    """
    paths = {"train": train, "validation": validation, "test": test}
    paths = {split: Path(path) for split, path in paths.items() if path is not None}
    read = {split: read_file(path, split) for split, path in paths.items()}
    name = Path(train).stem
    return make_text_task(
        name,
        _rows(name, read, prompt, choices, answer, answers, lead),
        **COLUMNS,
        metrics=metrics,
        pack=pack,
        facts={"files": {split: str(path) for split, path in paths.items()}},
    )._replace(raw=_raw(prompt, choices, lead))


def tfds_choices(
    dataset: str,
    *,
    splits: Mapping[str, str],
    prompt: str,
    choices: str | Sequence[str],
    answer: str,
    answers: Sequence[str | int] | None = None,
    lead: str = " ",
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    data_dir: str | PathLike | None = None,
) -> TextTask:
    r"""Returns a multiple-choice task over a TensorFlow Datasets data set.

    Args:
      dataset: its name with its configuration, as "piqa".
      splits: our split to TFDS's; slices too.
      prompt: as for `choices`, with the following.
      choices: the column of choices, or the columns.
      answer: the column of the right one.
      answers: what it says for each place.
      lead: put before each choice.
      metrics: as for `choices`.
      pack: as for `choices`.
      data_dir: where prepared data sets lie; None is TFDS's own default.

    Returns:
      The task; its rows are held in memory.

    Raises:
      ValueError: as `jaxpeft.data.read_tfds` and `choices`.

    Example:
      >>> task = tfds_choices(
      ...     "piqa",
      ...     splits={"train": "train", "validation": "validation"},
      ...     prompt="{goal}\nAnswer:",
      ...     choices=("sol1", "sol2"),
      ...     answer="label",
      ... )  # doctest: +SKIP
    """
    read = {
        ours: read_tfds(dataset, split=theirs, data_dir=data_dir)
        for ours, theirs in splits.items()
    }
    return make_text_task(
        dataset,
        _rows(dataset, read, prompt, choices, answer, answers, lead),
        **COLUMNS,
        metrics=metrics,
        pack=pack,
        facts={"tfds": dataset, "splits": dict(splits)},
    )._replace(raw=_raw(prompt, choices, lead))


def _raw(prompt: str, choices: str | Sequence[str], lead: str) -> dict[str, Any]:
    columns = choices if isinstance(choices, str) else list(choices)
    return {"prompt": prompt, "choices": columns, "lead": lead}


def _rows(
    name: str,
    splits: Mapping[str, Any],
    prompt: str,
    choices: str | Sequence[str],
    answer: str,
    answers: Sequence[str | int] | None,
    lead: str,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of any columns as rows of a prompt, choices and an answer."""
    pieces = pieces_of(prompt)
    found: dict[str, list[dict[str, Any]]] = {}
    for split, rows in splits.items():
        found[split] = []
        for number in range(len(rows)):
            row = rows[number]
            where = f"Task {name!r}, split {split!r}, row {number}"
            read = read_choices(row, pieces, choices, lead, where)
            right = _inside(row, answer, where)
            if answers is not None:
                right = _place(right, answers, f"{where}: column {answer!r}")
            found[split].append({**read, "answer": right})
    return found


def read_choices(
    row: Mapping[str, Any],
    pieces: Sequence[tuple[str, str]],
    choices: str | Sequence[str],
    lead: str,
    where: str,
) -> dict[str, Any]:
    """A row of any columns as a prompt and choices, without the answer.

    Args:
      row: the row.
      pieces: the prompt's template, from `pieces_of`.
      choices: as in `choices`, with the following.
      lead: put before each choice.
      where: names the row in errors.
    """
    texts = {
        field: text_of({field: _inside(row, field, where)}, field, where)
        for _, field in pieces
        if field
    }
    if isinstance(choices, str):
        listed = _inside(row, choices, where)
    else:
        listed = [_inside(row, column, where) for column in choices]
    if isinstance(listed, str | bytes | Mapping):
        raise ValueError(
            f"{where}: column {choices!r} must be a list of texts; got "
            f"{listed!r}. Of columns of a choice each, give all names."
        )
    read = [text_of({"choices": text}, "choices", where) for text in listed]
    return {
        "prompt": "".join(text + texts.get(f, "") for text, f in pieces),
        "choices": [lead + text for text in read],
    }


def pieces_of(prompt: str) -> list[tuple[str, str]]:
    """A template's literal texts, and the column behind each; "" behind the last."""
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"`prompt` {prompt!r} is no template: {error}.") from None
    if not any(field for _, field, _, _ in parts) or any(
        field == "" or spec or conversion for _, field, spec, conversion in parts
    ):
        raise ValueError(
            f"`prompt` {prompt!r} must have columns in braces, and no more than their "
            "names: '{question}'."
        )
    return [(text, field or "") for text, field, _, _ in parts]


def _inside(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column in row:
        return value_of(row, column, where)
    first, _, rest = column.partition("/")
    value = value_of(row, first if rest else column, where)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: column {first!r} has no parts, as {column!r} asks.")
    return _inside(value, rest, where)


def _place(value: Any, answers: Sequence[str | int], where: str) -> int:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    said = [str(answer) for answer in answers]
    if str(value) not in said:
        raise ValueError(
            f"{where} must be one of `answers` {tuple(said)}; got {value!r}."
        )
    return said.index(str(value))
