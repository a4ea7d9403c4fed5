"""Multiple-choice tasks out of files and out of TensorFlow Datasets."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from jaxpeft.data._bad_rows import good_splits
from jaxpeft.data._labels import plain, text_of
from jaxpeft.data._lines import bare_name
from jaxpeft.data._sources import read_tfds
from jaxpeft.data._splits import also_in_train
from jaxpeft.data._task import check_bad_rows
from jaxpeft.data._templates import inside, pieces, read_text
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._files import read_splits, settle

COLUMNS = {"prompt": "prompt", "choices": "choices", "answer": "answer"}


def choices(
    *,
    train: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    prompt: str,
    choices: str | Sequence[str],
    answer: str,
    answers: Sequence[str | int] | None = None,
    lead: str = " ",
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    bad_rows: str = "raise",
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> TextTask:
    r"""Returns a multiple-choice task over files, as `files` reads them.

    In .csv and .tsv files the choices have a column each.

    Args:
      train: file of the training rows.
      validation: file of the validation rows. None cuts a tenth off `train`, chosen by
        the hash of the prompt, so that none is in both.
      test: file of the test rows; None: no test split.
      prompt: what is read, columns in braces: "{question}\nAnswer:".
      choices: the column of lists of choices; or the columns, a choice each.
      answer: the column of the right one: its place, from 0, or its text.
      answers: what the column says instead, for each place: ("A", "B", "C", "D").
      lead: put before each choice, as a part of it.
      metrics: out of "accuracy", "accuracy_per_token", the deciding one first; None:
        both, in this order (`jaxpeft.data.score`).
      pack: whether several training rows share a sequence.
      bad_rows: "raise" or "skip", as for `jaxpeft.data.make_text_task`.
      delimiter: as in `files`, with the following.
      quoting: whether marks quote in .csv and .tsv files.
      encoding: of the files.

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
    paths = {split: path for split, path in paths.items() if path is not None}
    reading = dict(delimiter=delimiter, quoting=quoting, encoding=encoding)
    read = read_splits(paths, **reading)
    name = bare_name(train).stem
    rows, bad = _rows(name, read, prompt, choices, answer, answers, lead, bad_rows)
    splits, shared = settle(rows, [COLUMNS["prompt"]], train, bad_rows)
    return make_text_task(
        name,
        splits,
        **COLUMNS,
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
        facts={
            "files": {split: str(path) for split, path in paths.items()},
            **shared,
            **bad,
        },
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
    bad_rows: str = "raise",
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
      bad_rows: as for `choices`.
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
    rows, bad = _rows(dataset, read, prompt, choices, answer, answers, lead, bad_rows)
    return make_text_task(
        dataset,
        rows,
        **COLUMNS,
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
        facts={
            "tfds": dataset,
            "splits": dict(splits),
            "also_in_train": also_in_train(rows, [COLUMNS["prompt"]], bad_rows),
            **bad,
        },
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
    bad_rows: str,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Rows of any columns as rows of a prompt, choices and an answer; the bad ones."""
    check_bad_rows(bad_rows)
    pieces(prompt, "prompt")  # a template, and no column
    places = None if answers is None else _places(answers)

    def one(row: Mapping[str, Any], where: str, _: Any) -> dict[str, Any]:
        read = read_choices(row, prompt, choices, lead, where)
        right = inside(row, answer, where)
        if places is not None:
            right = _place(right, places, f"{where}: column {answer!r}")
        return {**read, "answer": right}

    return good_splits(name, splits, one, bad_rows)


def read_choices(
    row: Mapping[str, Any],
    prompt: str,
    choices: str | Sequence[str],
    lead: str,
    where: str,
) -> dict[str, Any]:
    """A row of any columns as a prompt and choices, without the answer.

    Args:
      row: the row.
      prompt: as in `choices`, with the following.
      choices: the column of lists, or the columns.
      lead: put before each choice.
      where: names the row in errors.
    """
    if isinstance(choices, str):
        listed = inside(row, choices, where)
    else:
        listed = [inside(row, column, where) for column in choices]
    if isinstance(listed, str | bytes | Mapping):
        raise ValueError(
            f"{where}: column {choices!r} must be a list of texts; got "
            f"{listed!r}. Of columns of a choice each, give all names."
        )
    read = [text_of({"choices": text}, "choices", where) for text in listed]
    return {
        "prompt": read_text(row, prompt, where),
        "choices": [lead + text for text in read],
    }


def _places(answers: Sequence[str | int]) -> dict[str, int]:
    """The place that each of `answers` stands for."""
    said = [str(answer) for answer in answers]
    if len(set(said)) < len(said):
        raise ValueError(f"`answers` must differ, a place each; got {tuple(said)}.")
    return {answer: place for place, answer in enumerate(said)}


def _place(value: Any, places: Mapping[str, int], where: str) -> int:
    value = plain(value)
    if str(value) not in places:
        raise ValueError(
            f"{where} must be one of `answers` {tuple(places)}; got {value!r}."
        )
    return places[str(value)]
