"""Sources of rows: JSON lines, CSV, TensorFlow Datasets."""

import csv
import difflib
import json
from os import PathLike
from pathlib import Path
from typing import Any

from jaxpeft.data._task import Rows


def read_jsonl(path: str | PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a file that has one JSON object a line (UTF-8).

    Args:
      path: the file. Blank lines are passed over.

    Returns:
      One dict a line, in order.

    Raises:
      ValueError: if a line is not a JSON object; names the line.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
      >>> _ = file.write_text('{"text": "fine", "label": 1}')
      >>> read_jsonl(file)
      [{'text': 'fine', 'label': 1}]
    """
    rows = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): {line[:60]!r}. "
                    f"Each line must be one object, with no comma after it."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number} must be a JSON object with a value for "
                    f"each column; got {type(row).__name__} {line[:60]!r}."
                )
            rows.append(row)
    return rows


def read_csv(
    path: str | PathLike,
    *,
    delimiter: str = ",",
    quoting: bool = True,
    encoding: str = "utf-8-sig",
) -> list[dict[str, str]]:
    r"""Returns the rows of a CSV file whose first line names the columns.

    Args:
      path: the file.
      delimiter: what stands between columns; a tab, "\t", for TSV files.
      quoting: whether ``"..."`` quotes a field that may hold delimiters and line ends;
        False takes quotation marks as they stand, as TSV files often mean them.
      encoding: of the file; the default also takes a byte-order mark.

    Returns:
      One dict a row, in order; every value is a str.

    Raises:
      ValueError: if there is no header, a column name repeats, or a row has more or
        fewer fields than the header; names the line.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "rows.csv"
      >>> _ = file.write_text('text,label\n"well, fine",1\n')
      >>> read_csv(file)
      [{'text': 'well, fine', 'label': '1'}]
    """
    with Path(path).open(encoding=encoding, newline="") as file:
        mode = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
        lines = csv.reader(file, delimiter=delimiter, quoting=mode)
        header = next(lines, None)
        if not header:
            raise ValueError(f"{path} must begin with a line of column names.")
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise ValueError(f"{path} names a column twice: {repeated}.")
        rows = []
        for fields in lines:
            if not fields:  # a blank line
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {lines.line_num} has {len(fields)} fields; the "
                    f"header has {len(header)}: {header}. Check `delimiter` "
                    f"({delimiter!r}) and the quotation marks."
                )
            rows.append(dict(zip(header, fields, strict=True)))
    return rows


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
