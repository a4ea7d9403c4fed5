"""Prompts of a task: records of an input and an output, and demonstrations of them."""

import hashlib
import json
import random
import string
from collections.abc import Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any, NamedTuple

from jaxpeft.data._bad_rows import good_rows
from jaxpeft.data._choices import choices_of
from jaxpeft.data._labels import label_reader, text_of
from jaxpeft.data._lines import bare_name
from jaxpeft.data._prompt_forms import CHOICES, FORMS
from jaxpeft.data._sources import read_file
from jaxpeft.data._splits import row_key
from jaxpeft.data._task import Task, near_misses
from jaxpeft.data._templates import read_text
from jaxpeft.data._texts import TextTask

DEMONSTRATIONS = ("official", "nested", "disjoint")


class Record(NamedTuple):
    """A question and its answer.

    Attributes:
      input: what is asked, without a line end.
      output: what is to be answered.
    """

    input: str
    output: str

    @property
    def combined(self) -> str:
        """Both, a line each."""
        return f"{self.input}\n{self.output}"


class PromptSet(NamedTuple):
    """A task as records, for prompts.

    Attributes:
      name: of the task.
      train: records to demonstrate and to train with.
      validation: records to watch training with; there may be none.
      evaluated: records that are asked; none of the others.
      labels: all outputs that there are; None: any text may be one.
      facts: template, words, seed and where the records come from, JSON-able.
    """

    name: str
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    evaluated: tuple[Record, ...]
    labels: tuple[str, ...] | None
    facts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A hash of everything in it but the facts."""
        parts = [self.train, self.validation, self.evaluated, self.labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def prompt_set(
    task: Task | TextTask,
    *,
    train: int = 1000,
    validation: int = 200,
    evaluated: int = 5000,
    seed: int = 42,
    template: str | None = None,
    words: Sequence[str] | None = None,
) -> PromptSet:
    r"""Returns a task's rows as records of an input and an output.

    Of a task with classes the output is the word of the class, of multiple choice a
    letter, of prompts and completions the completion. The training split is shuffled;
    its first rows are `train`. Rows of "test" (where there is none, of "validation")
    are `evaluated`, and where these are too few, training rows beyond the first, but
    for those that say what one of the first says.

    Args:
      task: the task.
      train: records to demonstrate and to train with, at most.
      validation: records to watch training with, at most: of "validation", and where
        there is no "test", training rows beyond the first.
      evaluated: records that are asked, at most.
      seed: of the shuffling.
      template: how a row reads, its columns in braces, "{text}\nGood or bad?"; None:
        our own wording, where there is one for the task.
      words: what the classes are called, in their order; None: as in our wording, else
        the names of the classes.

    Returns:
      The records.

    Raises:
      ValueError: a row cannot be read (unless the task says bad_rows="skip": `facts`
        count it), the task has no prompts (numbers, plain text, chats), no wording and
        no `template` either, or a template or words that do not fit it.

    Example:
      >>> from jaxpeft.data import make_task
      >>> rows = [{"text": t, "mood": "bad"} for t in ("oh", "no", "hm")]
      >>> splits = {"train": rows[:2], "validation": rows[2:]}
      >>> task = make_task(
      ...     "moods", splits, text="text", label="mood", labels=["bad", "good"]
      ... )
      >>> found = prompt_set(task, train=1, template="{text}\nGood or bad?")
      >>> found.evaluated[0].combined
      'hm\nGood or bad?\nbad'
    """
    sizes = {"train": (train, 1), "evaluated": (evaluated, 1)}
    for name, (size, least) in (sizes | {"validation": (validation, 0)}).items():
        if size < least:
            raise ValueError(f"`{name}` must be at least {least}; got {size}.")
    read, labels, facts = _reader(task, template, words)
    order = {split: list(range(len(rows))) for split, rows in task.splits.items()}
    for numbers in order.values():
        random.Random(seed).shuffle(numbers)
    good = {split: good_rows(task, split) for split in task.splits}
    of = lambda split, numbers: tuple(
        record for _, record in good[split].read(numbers, read)
    )
    first, rest = order["train"][:train], order["train"][train:]
    columns = task.text if isinstance(task, Task) else task.columns[:1]

    def key(i: int) -> str | int:
        row, where = task.splits["train"][i], f"Task {task.name!r}, train, row {i}"
        try:
            return row_key(row, columns, where)
        except ValueError:
            if task.bad_rows == "raise":
                raise
            return i  # equal to no other; it is left out when it is read

    used = set(map(key, first))
    new = (i for i in rest if key(i) not in used)  # none asks what was shown
    held_out = "test" if "test" in order else "validation"
    if held_out == "test":
        watched = of("validation", order["validation"][:validation])
    else:
        watching = list(islice(new, validation))
        watched = of("train", watching)
        used.update(map(key, watching))
    asked = order[held_out][:evaluated]
    more = list(islice(new, evaluated - len(asked)))
    shown, held, added = of("train", first), of(held_out, asked), of("train", more)
    if bad := {split: rows.facts() for split, rows in good.items() if rows.bad}:
        facts |= {"bad_rows": bad}
        if not shown or not held + added:
            raise ValueError(f"`task` {task.name!r} has too few good rows: {bad}.")
    facts |= {
        "seed": seed,
        "evaluated_from": {held_out: len(held), "train": len(added)},
    }
    return PromptSet(
        name=task.name,
        train=shown,
        validation=watched,
        evaluated=held + added,
        labels=labels,
        facts=facts,
    )


def prompt_files(
    train: str | PathLike,
    evaluated: str | PathLike,
    *,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    delimiter: str | None = None,
    quoting: bool | None = None,
    encoding: str | None = None,
) -> PromptSet:
    """Returns the records of two files of {"input": ..., "output": ...}.

    Args:
      train: file of records to demonstrate with, in order: .jsonl or another kind that
        `jaxpeft.data.tasks.files` reads.
      evaluated: file of records that are asked.
      labels: all outputs that there are; None: those of both files, in the order of
        the alphabet.
      name: of the set; None: the name of `train`.
      delimiter: of .csv and .tsv files, as in `jaxpeft.data.read_csv`; so is
      quoting: whether marks quote in them; None: not in .tsv files.
      encoding: of the files; None: UTF-8, or what a byte-order mark says.

    Returns:
      The records.

    Raises:
      ValueError: a file is empty or malformed, a record has no such column, or an
        output is not among `labels`.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "moods.jsonl"
      >>> _ = path.write_text('{"input": "hm", "output": "bad"}')
      >>> prompt_files(path, path).labels
      ('bad',)
    """
    reading = dict(delimiter=delimiter, quoting=quoting, encoding=encoding)
    found = {}
    for argument, path in (("train", train), ("evaluated", evaluated)):
        rows = read_file(path, f"`{argument}` file", **reading)
        found[argument] = tuple(
            Record(*(text_of(row, c, f"{path}, record {i}") for c in Record._fields))
            for i, row in enumerate(rows)
        )
    outputs = sorted({record.output for rows in found.values() for record in rows})
    if labels is not None and (other := sorted(set(outputs) - set(labels))):
        raise ValueError(
            f"`labels` {tuple(labels)} lack the output {other[0]!r} of the files."
        )
    labels = tuple(outputs if labels is None else labels)
    facts = {"files": {"train": str(train), "evaluated": str(evaluated)}}
    name = bare_name(train).stem if name is None else name
    return PromptSet(name, found["train"], (), found["evaluated"], labels, facts)


def draw_demonstrations(
    count: int, pool: int, k: int, how: str = "official", *, seed: int = 42
) -> list[tuple[int, ...]]:
    """Returns which training records each question is shown.

    Args:
      count: questions.
      pool: training records.
      k: how many for each.
      how: "official", k out of all for one question after the other, as the study's own
        code draws them; "nested", a permutation for each question, of which it is shown
        the first k: another k changes nothing but the end; "disjoint", none is shown
        twice.
      seed: of the draws.

    Returns:
      For each question numbers of records, in the order of their showing.

    Raises:
      ValueError: `how` is unknown, or there are too few records.

    Example:
      >>> draw_demonstrations(2, 1000, 2)
      [(654, 114), (25, 759)]

    References:
      Janapati and Ji, A comparative study of learning paradigms in large language
      models via intrinsic dimension, arXiv 2412.06245; its official code.
    """
    if how not in DEMONSTRATIONS:
        raise ValueError(f"`demos` must be one of {DEMONSTRATIONS}; got {how!r}.")
    needed = count * k if how == "disjoint" else k
    if not 0 <= needed <= pool:
        raise ValueError(
            f"`shots` {k} of `demos` {how!r} need {needed} training records for "
            f"{count} questions; there are {pool}."
        )
    if how == "official":
        draws = random.Random(seed)
        return [tuple(draws.sample(range(pool), k)) for _ in range(count)]
    if how == "disjoint":
        drawn = random.Random(seed).sample(range(pool), pool)
        return [tuple(drawn[i * k : i * k + k]) for i in range(count)]
    return [_first(pool, k, random.Random(f"{seed}/{q}")) for q in range(count)]


def write_prompt(query: Record, shown: Sequence[Record] = ()) -> str:
    r"""Returns the text that asks a question, behind its demonstrations.

    Args:
      query: what is asked; its output is not in the text.
      shown: the demonstrations, first to last.

    Returns:
      Each demonstration with an empty line behind it, then the input and a line end.

    Example:
      >>> write_prompt(Record("2 + 2?", "4"), [Record("1 + 1?", "2")])
      '1 + 1?\n2\n\n2 + 2?\n'
    """
    return "".join(f"{one.combined}\n\n" for one in shown) + f"{query.input}\n"


def _first(pool: int, k: int, draws: random.Random) -> tuple[int, ...]:
    """The first k of a permutation, the same whatever k is: Fisher and Yates."""
    moved: dict[int, int] = {}
    found = []
    for i in range(k):
        j = draws.randrange(i, pool)
        found.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return tuple(found)


def _reader(task: Any, template: str | None, words: Sequence[str] | None):
    """Returns ``((row, where, notes) -> Record, labels, facts)`` of a task."""
    if not isinstance(task, Task | TextTask):
        raise ValueError(
            f"`task` {getattr(task, 'name', task)!r} is none of one kind of rows; a "
            "mixture has no prompts. Give one of its tasks."
        )
    if isinstance(task, Task) and task.labels is not None:
        return _classes(task, template, words)
    if isinstance(task, Task) or task.form not in ("choice", "completion"):
        kind = "numbers" if isinstance(task, Task) else f"the form {task.form!r}"
        raise ValueError(
            f"`task` {task.name!r} is of {kind} and has no prompts; give one with "
            "classes, choices, or prompts and completions."
        )
    if template is not None or words is not None:
        raise ValueError(
            f"`template` and `words` are for tasks with classes; {task.name!r} is of "
            f"the form {task.form!r}, and has its own prompts."
        )
    if task.form == "completion":
        prompt, completion = task.columns

        def written(row: Any, where: str, _: Any) -> Record:
            texts = (read_text(row, column, where) for column in (prompt, completion))
            return Record(*(text.strip() for text in texts))

        return written, None, {}

    def count(row: Any, where: str, _: Any) -> int:
        return len(choices_of(row, task.columns, where)[1])

    counts = [
        number
        for split, rows in task.splits.items()
        for _, number in good_rows(task, split).read(range(len(rows)), count)
    ]
    most = max(counts, default=0)  # without a good row, who reads them says so
    letters = tuple(string.ascii_uppercase[:most])

    def lettered(row: Any, where: str, _: Any) -> Record:
        prompt, choices, right = choices_of(row, task.columns, where)
        if len(choices) > len(letters):
            raise ValueError(
                f"{where}: it has {len(choices)} choices, and there are "
                f"{len(letters)} letters to call them by."
            )
        prompt = prompt.strip().removesuffix("Answer:").strip()
        options = [f"{a}. {b.strip()}" for a, b in zip(letters, choices, strict=False)]
        text = CHOICES.format(prompt=prompt, options="\n".join(options))
        return Record(text, letters[right])

    return lettered, letters, {"template": CHOICES}


def _classes(task: Task, template: str | None, words: Sequence[str] | None):
    known = FORMS.get(task.name) or FORMS.get(task.name.partition("/")[0])
    if template is None:
        if known is None:
            raise ValueError(
                f"`task` {task.name!r} has no wording of ours; those that have: "
                f"{', '.join(FORMS)}. Give a template, its columns in braces: "
                f"{'{' + task.text[0] + '}'} and a question."
            )
        template = known[0]
    fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    for field in filter(None, fields):
        if field not in task.text:
            near = near_misses(field, task.text)
            raise ValueError(f"`template` asks for the column {field!r}.{near}")
    if not any(fields):
        raise ValueError(
            f"`template` {template!r} must have the task's columns in braces, "
            f"{', '.join(task.text)}."
        )
    if words is None:
        words = known[1] if known else task.labels
    words = tuple(words)
    if not len(words) == len(set(words)) == len(task.labels):
        raise ValueError(
            f"`words` must be a different one for each of the classes "
            f"{', '.join(task.labels)}; got {words}."
        )

    label_of = label_reader(task)

    def read(row: Any, where: str, _: Any) -> Record:
        texts = {column: text_of(row, column, where) for column in task.text}
        return Record(template.format(**texts), words[label_of(row, where)])

    return read, words, {"template": template, "words": list(words)}
