"""``jaxpeft predict``: what a model says of rows, with or without an adapter."""

import argparse
import contextlib
import csv
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.cli._console import note
from jaxpeft.cli._folders import Wanted, find_adapter
from jaxpeft.cli._open import (
    add_base,
    add_labels,
    check_template,
    need_tokenizer,
    open_adapter,
    open_alone,
)
from jaxpeft.cli._ranks import new_file
from jaxpeft.cli._types import whole

NAME = "predict"
SUMMARY = "classes, scores, texts or choices for rows of a file"
DESCRIPTION = """\
Asks a model about every row: classes with their probabilities, a score, a text that
goes on, or the likeliest of given choices, as the model's head and the adapter's task
have it. Rows are lines of text on standard input, or a file of a kind that training
reads, .jsonl or .csv, with the columns that the task was trained on. Texts are
tokenised as in training. Answers are written in the order of the rows.

Without an adapter the base is asked: a merged folder, or any model with a head.
"""
EXAMPLE = (
    "jaxpeft predict --adapter runs/quickstart --input questions.jsonl "
    "--out answers.csv"
)
READ = ("lines", "jsonl", "csv", "tsv")
WRITTEN = ("jsonl", "csv")
BATCH, NEW = 32, 64


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("--adapter", help="an adapter's folder, or that of a run")
    add_base(parser)
    add_labels(parser)
    add(
        "--input",
        default="-",
        metavar="FILE",
        help="rows: .jsonl, .csv or another file that training reads, or lines of text "
        "(default: -, standard input)",
    )
    add(
        "--input-format",
        choices=READ,
        help="of the input (default: by its name; of standard input and other files, "
        "lines)",
    )
    add("--out", metavar="FILE", help="a new file (default: standard output)")
    add(
        "--format",
        choices=WRITTEN,
        help="of the output (default: by its name; of standard output, jsonl)",
    )
    add("--task", metavar="NAME", help="of a mixture: which task a row is asked about")
    add(
        "--text",
        nargs="+",
        metavar="COLUMN",
        help="the column that is read, or a pair (default: as in the run)",
    )
    add(
        "--choices",
        metavar="COLUMN",
        help="the column of lists of choices, one of which is chosen (default: as in "
        "the run)",
    )
    add("--chat", action="store_true", help="rows are messages, lines those of a user")
    add(
        "--max-length",
        type=whole(1),
        metavar="T",
        help="tokens at which rows of classes, numbers and choices end (default: as in "
        "the run)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT_OR_TOKEN",
        help="end a text before this text or token, too; may be given again",
    )
    add(
        "--max-new-tokens",
        type=whole(1),
        metavar="N",
        help=f"of a text (default: {NEW})",
    )
    add(
        "--batch-size",
        type=whole(1),
        metavar="B",
        help=f"(default: as in the run's evaluation, or {BATCH})",
    )


def run(given: argparse.Namespace) -> None:
    """Runs the command."""
    out = given.out and new_file(given.out)
    form = _written_as(given)
    rows = _rows(given)
    asked = None
    if given.adapter is not None:  # before any weights are read
        asked = _kept_question(given, find_adapter(given.adapter)[2])
    elif given.task:
        raise ValueError("--task is one of an adapter's; add --adapter.")
    from jaxpeft import models, serving

    opened = open_alone(given) if given.adapter is None else open_adapter(given)
    model, folder, wanted = opened.model, opened.folder, opened.wanted
    if asked is None:
        asked = _question_of(given, model, folder, wanted)
    if given.labels:
        asked = asked._replace(labels=wanted.labels)
    asked = _columns(given, asked, rows)
    tokenizer = need_tokenizer(folder, given.adapter)
    if given.chat:
        check_template(tokenizer)
    config = wanted.run
    lengths = None if given.max_length else config.get("lengths")
    with _bar(f"predicting for {len(rows)} row{'s' * (len(rows) > 1)}") as advance:
        found = serving.predict(
            *(model, opened.adapted, tokenizer, rows, asked),
            batch_size=given.batch_size or config.get("eval_batch_size") or BATCH,
            max_length=given.max_length or config.get("max_length"),
            lengths=lengths and tuple(lengths),
            max_new_tokens=given.max_new_tokens or NEW,
            stop=[*models.stop_tokens(folder, tokenizer), *given.stop],
            advance=advance,
        )
    if out:
        with _new(out) as file:
            _write(found, form, file)
        note(f"{out}: {len(found)} rows")
    else:
        _write(found, form, sys.stdout)


# --- rows in


def _rows(given: argparse.Namespace) -> list[Mapping[str, Any]] | list[str]:
    from jaxpeft import data
    from jaxpeft.data import read_file

    source, kind = given.input, given.input_format
    if source != "-" and not Path(source).is_file():
        raise FileNotFoundError(f"--input {source!r} is no file.")
    if kind is None and data.is_file_name(source):
        return read_file(source, "--input")
    if kind in (None, "lines"):
        if source == "-":
            lines = list(sys.stdin)
        else:
            lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
        texts = [line.rstrip("\r\n") for line in lines]
        texts[:1] = [text.removeprefix("\ufeff") for text in texts[:1]]
        rows = [text for text in texts if text.strip()]
        if blank := len(texts) - len(rows):
            note(f"{blank} blank line{'s' * (blank > 1)} passed over")
    else:
        read = {
            "jsonl": data.read_jsonl,
            "csv": data.read_csv,
            "tsv": lambda path: data.read_csv(path, delimiter="\t"),
        }
        rows = read[kind]("/dev/stdin" if source == "-" else source)
    if not rows:
        name = "standard input" if source == "-" else f"--input {source!r}"
        raise ValueError(f"{name} has no rows.")
    return rows


# --- the question


def _kept_question(given: argparse.Namespace, wanted: Wanted):
    """What the adapter's task asks; ``None``: it does not say."""
    from jaxpeft import data

    kept = [
        data.Question.from_json(one) for one in wanted.metadata.get("questions") or ()
    ]
    names = [one.name for one in kept]
    if given.task is not None and given.task not in names:
        raise ValueError(
            f"--task {given.task!r} is none of the adapter's: "
            f"{', '.join(names) or 'it names none'}."
        )
    if given.task is None and len(kept) > 1:
        raise ValueError(
            f"the adapter was trained on several tasks; write --task with one of "
            f"{', '.join(names)}."
        )
    if len(kept) > 1 and given.labels:
        raise ValueError(
            "--labels are of the whole head, which several tasks share; leave them out."
        )
    found = [one for one in kept if given.task in (None, one.name)]
    return found[0] if found else None


def _question_of(given: argparse.Namespace, model, folder: Path, wanted: Wanted):
    """What can be asked of a model's head, where nothing says more."""
    from jaxpeft import data, interop
    from jaxpeft.models import read_model_config

    name = Path(given.adapter or given.base).name
    if model.head == "causal_lm":
        return data.Question(name, "completion", ("prompt",))
    if model.head == "regression":
        return data.Question(name, "number", ("text",))
    if model.head is None:
        raise ValueError(
            f"{given.adapter or given.base!r} has no head that would say anything of a "
            "row; --head names one, where the weights are there."
        )
    if read_model_config(folder).get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"{str(folder)!r} gives each class a probability of its own "
            "(problem_type 'multi_label_classification'); here one class is chosen."
        )
    labels = wanted.labels
    if labels is None and given.adapter is None:
        labels = interop.head_info(folder).labels
    if labels is not None and len(labels) != model.num_labels:
        labels = None  # what transformers assumes where a config names none
    return data.Question(name, "class", ("text",), labels)


def _columns(given: argparse.Namespace, asked, rows):
    """The question, about the columns that were named, and lines where they will do."""
    written = asked.form in ("text", "completion", "chat", "choice")
    for flag, value in (("--choices", given.choices), ("--chat", given.chat)):
        if value and not written:
            raise ValueError(f"{flag} is for language models; leave it out here.")
    if given.choices and given.chat:
        raise ValueError("--choices and --chat do not go together.")
    if given.chat:
        asked = asked._replace(form="chat", columns=("messages",), raw=None)
    if given.choices:
        if asked.form == "choice" and asked.raw is not None and not given.text:
            raise ValueError("--choices names another column; name the prompt's too.")
        columns = (asked.columns[0], given.choices)
        asked = asked._replace(form="choice", columns=columns, raw=None)
    if given.text:
        most = 1 if written else 2
        if len(given.text) > most:
            raise ValueError(
                f"--text {' '.join(given.text)}: {asked.form!r} reads "
                f"{'one column' if most == 1 else 'one or two columns'}."
            )
        if asked.raw is not None:
            raise ValueError("--text names another column; name --choices too.")
        choices = asked.columns[1:] if asked.form == "choice" else ()
        asked = asked._replace(columns=(*given.text, *choices))
    texts = asked.form in ("text", "completion", "chat")
    ends = {"--stop": given.stop, "--max-new-tokens": given.max_new_tokens}
    for flag, value in ends.items():
        if value and not texts:
            raise ValueError(f"{flag} is for texts that are written; leave it out.")
    if given.max_length and texts:
        raise ValueError(
            "--max-length is for classes, numbers and choices: what a text goes on "
            "from is never cut. Leave it out here."
        )
    pair = len(asked.columns) > 1 and asked.form != "chat"  # tools may be absent
    if isinstance(rows[0], str) and pair:
        raise ValueError(
            f"rows have the columns {', '.join(asked.columns)}, and lines of text have "
            "one: give --input FILE.jsonl, .csv or .tsv, or --input-format."
        )
    return asked


# --- answers out


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, from the first batch on."""
    from rich.console import Console
    from rich.progress import Progress

    with contextlib.ExitStack() as stack:
        bars: list[tuple[Progress, Any]] = []

        def advance(done: int, of: int) -> None:
            if not bars:
                bar = stack.enter_context(Progress(console=Console(stderr=True)))
                bars.append((bar, bar.add_task(title, total=of)))
            bar, task = bars[0]
            bar.update(task, completed=done)

        yield advance


def _written_as(given: argparse.Namespace) -> str:
    if given.format or not given.out:
        return given.format or WRITTEN[0]
    kind = Path(given.out).suffix.removeprefix(".")
    if kind not in WRITTEN:
        raise ValueError(
            f"--out {given.out!r} ends in neither .jsonl nor .csv; write --format too."
        )
    return kind


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Any]:
    """A file that appears whole or not at all, and in nobody's place."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with new.open("x", encoding="utf-8", newline="") as file:
            yield file
        new_file(str(path))  # another may have come in the meantime
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _write(found: Sequence[Mapping[str, Any]], form: str, file: Any) -> None:
    if form == "jsonl":
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    flat = [dict(_flat(row)) for row in found]
    header = dict.fromkeys(column for row in flat for column in row)
    table = csv.DictWriter(file, list(header), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Columns of an answer: ``probabilities/NAME``, ``log_likelihoods/0``."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}/{key}" if name else str(key))
