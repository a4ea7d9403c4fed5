"""Tasks out of TensorFlow Datasets, GLUE among them, without TensorFlow."""

from collections.abc import Mapping, Sequence
from os import PathLike

from jaxpeft.data._sources import read_tfds
from jaxpeft.data._task import Task, make_task

# Table 1 of the paper: the columns in TFDS, the classes in TFDS's order (None:
# regression), and the metrics; where there are two, the one reported for KaSA (arXiv
# 2412.06071, table 1) comes first.
GLUE = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": (("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": (
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "qqp": (
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "stsb": (("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "mnli": (
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
    ),
    "qnli": (
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        ("accuracy",),
    ),
    "rte": (
        ("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
        ("accuracy",),
    ),
    "wnli": (
        ("sentence1", "sentence2"),
        ("not_entailment", "entailment"),
        ("accuracy",),
    ),
}


def tfds(
    dataset: str,
    *,
    text: str | Sequence[str],
    label: str,
    labels: Sequence[str | int] | None,
    splits: Mapping[str, str],
    metrics: Sequence[str] | None = None,
    bad_rows: str = "raise",
    data_dir: str | PathLike | None = None,
) -> Task:
    """Returns a task over any TensorFlow Datasets data set that has text and a label.

    Args:
      dataset: its name with its configuration, as "imdb_reviews" or "glue/sst2".
      text: the column the model reads, or a pair of columns.
      label: the column it predicts.
      labels: class names in the order of their ids; None for regression.
      splits: our split to TFDS's; slices too: {"train": "train[:90%]",
        "validation": "train[90%:]", "test": "test"}.
      metrics: names out of `jaxpeft.data.metrics`, the deciding one first; None as in
        `jaxpeft.data.make_task`.
      bad_rows: "raise" or "skip", as for `jaxpeft.data.make_task`.
      data_dir: where prepared data sets lie; None is TFDS's own default.

    Returns:
      The task; its rows are read from disk on demand.

    Raises:
      ValueError: as `jaxpeft.data.read_tfds` and `jaxpeft.data.make_task`.

    Example:
      >>> task = tfds(
      ...     "imdb_reviews",
      ...     text="text",
      ...     label="label",
      ...     labels=["negative", "positive"],
      ...     splits={"train": "train", "validation": "test"},
      ... )  # doctest: +SKIP
    """
    return make_task(
        dataset,
        {
            ours: read_tfds(dataset, split=theirs, data_dir=data_dir)
            for ours, theirs in splits.items()
        },
        text=text,
        label=label,
        labels=labels,
        metrics=metrics,
        bad_rows=bad_rows,
        facts={"tfds": dataset, "splits": dict(splits)},
    )


def cola(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns CoLA of GLUE: is a sentence good English? Scored by Matthews."""
    return _glue("cola", data_dir)


def sst2(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns SST-2 of GLUE: is a phrase of a movie review positive?"""
    return _glue("sst2", data_dir)


def mrpc(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns MRPC of GLUE: do two sentences say the same? Scored by accuracy, F1."""
    return _glue("mrpc", data_dir)


def qqp(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns QQP of GLUE: do two questions ask the same? Scored by accuracy, F1."""
    return _glue("qqp", data_dir)


def stsb(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns STS-B of GLUE: how alike are two sentences, from 0 to 5? Regression."""
    return _glue("stsb", data_dir)


def mnli(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns MNLI of GLUE: does the premise entail the hypothesis? Three classes.

    The split "validation" is the matched one; "validation_mismatched" is there too.
    """
    return _glue("mnli", data_dir)


def qnli(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns QNLI of GLUE: does the sentence hold the answer to the question?"""
    return _glue("qnli", data_dir)


def rte(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns RTE of GLUE: does the first sentence entail the second?"""
    return _glue("rte", data_dir)


def wnli(*, data_dir: str | PathLike | None = None) -> Task:
    """Returns WNLI of GLUE: does the second sentence resolve the first's pronoun?"""
    return _glue("wnli", data_dir)


def _glue(name: str, data_dir: str | PathLike | None) -> Task:
    """Returns a GLUE task with its own splits, less the test split (no labels).

    Rows are kept as published, repeated ones too, so that scores compare.

    References:
      Wang et al., GLUE, arXiv 1804.07461, table 1.
    """
    text, labels, metrics = GLUE[name]
    splits = {"train": "train", "validation": "validation"}
    if name == "mnli":
        splits["validation"] = "validation_matched"
        splits["validation_mismatched"] = "validation_mismatched"
    return tfds(
        f"glue/{name}",
        text=text,
        label="label",
        labels=labels,
        splits=splits,
        metrics=metrics,
        data_dir=data_dir,
    )._replace(name=name)
