"""Sources of rows: JSON, CSV and TSV, Parquet, TensorFlow Datasets."""

import difflib
import json
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from jaxpeft.console import optional
from jaxpeft.data._lines import bare_name, read_lines
from jaxpeft.data._records import read_records
from jaxpeft.data._task import Rows


def read_jsonl(
    path: str | PathLike, *, encoding: str | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON objects: one a line, or all in one array.

    Args:
      path: the file, which may be packed (.gz, .bz2, .xz, .zst). Blank lines are passed
        over; a file that begins with "[" is one array of objects.
      encoding: of the file; None: UTF-8, or what a byte-order mark says.

    Returns:
      One dict an object, in order.

    Raises:
      ValueError: if a line is not a JSON object, or not of the encoding; names it.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
      >>> _ = file.write_text('{"text": "fine", "label": 1}')
      >>> read_jsonl(file)
      [{'text': 'fine', 'label': 1}]
    """
    rows: list[dict[str, Any]] = []
    lines = read_lines(path, encoding)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not rows and line.lstrip().startswith("["):
            return _array(path, number, line + "".join(lines))
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}): {line[:60]!r}. "
                f"Each line must be one object, with no comma after it; or the whole "
                f"file one array of objects, [{{...}}, {{...}}]."
            ) from None
        rows.append(_object(row, f"{path}, line {number}"))
    return rows


def read_csv(
    path: str | PathLike,
    *,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> list[dict[str, str]]:
    r"""Returns the rows of a CSV or TSV file whose first line names the columns.

    Args:
      path: the file, which may be packed (.gz, .bz2, .xz, .zst).
      delimiter: what stands between columns; None: a tab where the file's name ends in
        .tsv or .tab, else a comma.
      quoting: whether ``"..."`` quotes a field that may hold delimiters and line ends,
        a mark inside it written twice. None: not between tabs, for TSV knows no
        quoting: a quotation mark there is a part of the text.
      encoding: of the file; None: UTF-8, or what a byte-order mark says.

    Returns:
      One dict a row, in order; every value is a str.

    Raises:
      ValueError: if there is no header, a column name repeats, a row has more or fewer
        fields than the header, a quotation mark is not closed, a field between tabs is
        quoted and `quoting` is not given, or a line is not of the encoding; names the
        line.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "rows.csv"
      >>> _ = file.write_text('text,label\n"well, fine",1\n')
      >>> read_csv(file)
      [{'text': 'well, fine', 'label': '1'}]

    References:
      RFC 4180 (CSV); IANA, text/tab-separated-values.
    """
    if delimiter is None:
        tabs = bare_name(path).suffix.lower() in (".tsv", ".tab")
        delimiter = "\t" if tabs else ","
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(
            f"`delimiter` must be one character, no quotation mark and no line end; "
            f"got {delimiter!r}."
        )
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for number, fields in read_records(path, delimiter, quoting, encoding):
        if not header:
            header = [sys.intern(name) for name in fields]
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise ValueError(f"{path} names a column twice: {repeated}.")
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {number} has {len(fields)} fields; the header has "
                f"{len(header)}: {header}. Check `delimiter` ({delimiter!r}) and the "
                f"quotation marks (`quoting`, {quoting})."
            )
        rows.append(dict(zip(header, fields, strict=True)))
    if not header:
        raise ValueError(f"{path} must begin with a line of column names.")
    return rows


def read_parquet(path: str | PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file.

    Args:
      path: the file.

    Returns:
      One dict a row, in order, with Python's values: str, numbers, lists, dicts, None.

    Raises:
      ValueError: it is no whole Parquet file.
      ImportError: the package that reads it is not installed.

    Example:
      >>> read_parquet("train-00000-of-00001.parquet")  # doctest: +SKIP
    """
    with optional("Parquet files"):
        import pyarrow.parquet
    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no whole Parquet file ({error}); copy it anew from where it "
            "was written."
        ) from error
    return rows


# What reads a file, and which arguments of ours it takes.
_DELIMITED = (read_csv, ("delimiter", "quoting", "encoding"))
READERS = {
    ".jsonl": (read_jsonl, ("encoding",)),
    ".json": (read_jsonl, ("encoding",)),
    ".csv": _DELIMITED,
    ".tsv": _DELIMITED,
    ".tab": _DELIMITED,
    ".parquet": (read_parquet, ()),
}


def read_file(path: str | PathLike, what: str, **options: Any) -> list[dict[str, Any]]:
    """Returns the rows of a file of any kind that is read.

    Args:
      path: the file; the end of its name says what it is, in upper or lower case.
      what: the file, as errors call it: "`train` file".
      **options: `delimiter`, `quoting`, `encoding`, as in the readers; None: not given.

    Returns:
      A dict a row, by column, in the order of the file.

    Raises:
      ValueError: the file is not there, of another kind, without rows or malformed, or
        an option is not for its kind.
    """
    path = Path(path)
    suffix = bare_name(path).suffix.lower()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if is_file_name(p))[:3]
        raise ValueError(
            f"{what} {str(path)!r} is a folder; name a file"
            + (f" in it: {', '.join(inside)}." if inside else ".")
        )
    if suffix not in READERS:
        raise ValueError(
            f"{what} {str(path)!r} must end in {', '.join(READERS)}, with .gz, .bz2, "
            ".xz or .zst behind it where it is packed."
        )
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} is not there.")
    reader, known = READERS[suffix]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise ValueError(
                f"`{name}` is not for {suffix} files; {what} {str(path)!r} is one. "
                f"Leave {name}={given[name]!r} out."
            )
    rows = reader(path, **given)
    if not rows:
        raise ValueError(
            f"{what} {str(path)!r} has no rows ({path.stat().st_size} bytes)."
        )
    return rows


def is_file_name(name: str | PathLike) -> bool:
    """Returns whether a name ends as that of a file of rows does: "a.csv", "B.JSON.gz".

    Args:
      name: with or without folders.

    Example:
      >>> is_file_name("rows.tsv.gz"), is_file_name("opinions/nyt")
      (True, False)
    """
    return bare_name(name).suffix.lower() in READERS


def _array(path: Any, first: int, text: str) -> list[dict[str, Any]]:
    """The objects of one JSON array, which begins on a line of the file."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {first - 1 + error.lineno} is not JSON: {error.msg}. A file "
            'that begins with "[" must be one array of objects, [{...}, {...}].'
        ) from None
    name = lambda i: f"{path}, entry {i} of its array"
    return [_object(row, name(i)) for i, row in enumerate(rows)]


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} must be a JSON object with a value for each column; got "
            f"{type(row).__name__} {str(row)[:60]!r}."
        )
    # One string for a column's name, not one a row.
    return {sys.intern(name): value for name, value in row.items()}


def read_tfds(
    name: str, *, split: str = "train", data_dir: str | PathLike | None = None
) -> Rows:
    """Returns one split of a TensorFlow Datasets data set, without TensorFlow.

    Args:
      name: of the data set, with its configuration: "glue/sst2", "imdb_reviews:1.0.0".
      split: "train", "test", "train[:10%]" and so on.
      data_dir: where prepared data sets lie; None is TFDS's own default. What is not
        there yet is downloaded and prepared, as array_record.

    Returns:
      Rows read on demand; text is bytes.

    Raises:
      ValueError: if the data set or the split does not exist (names those that do),
        or was prepared in a format that cannot be read at random without TensorFlow,
        or not in slices.

    Example:
      >>> read_tfds("glue/sst2", split="validation")  # doctest: +SKIP
    """
    with optional("Tasks of TensorFlow Datasets"):
        import tensorflow_datasets as tfds
        import tensorflow_datasets.text  # registers glue, gsm8k and others

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, n=3)
        raise ValueError(
            f"`name` {name!r} is no TFDS data set, and none is prepared under that "
            f"name in data_dir={str(data_dir)!r}. Nearest of the {len(known)}: {near}."
        ) from None
    if not builder.is_prepared():
        # TFDS would write tfrecord, which needs TensorFlow to write and to read.
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    try:
        rows = builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(
            f"{name!r} lies in {builder.data_path} in a format that only TensorFlow "
            f"reads. Give another data_dir: there it is prepared as array_record. "
            f"({error})"
        ) from error
    # TFDS 4.9.10 ignores slices of parquet: train[:90%] and train[90%:] would both be
    # the whole. Its own books say what should have come (they are empty for mock data).
    if builder.info.splits and len(rows) != builder.info.splits[split].num_examples:
        raise ValueError(
            f"TFDS read {len(rows)} rows for `split` {split!r} of {name!r}, which has "
            f"{builder.info.splits[split].num_examples}: it cannot slice the files in "
            f"{builder.data_path}. Take whole splits, or give another data_dir: there "
            f"it is prepared as array_record, which can be sliced."
        )
    return rows
