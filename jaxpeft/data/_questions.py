"""What a task asks of a model about a row, as plain data that travels with a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import Task
from jaxpeft.data._texts import TextTask

FORMS = ("class", "number", "text", "completion", "chat", "choice")
# How many columns of a row each form reads, without what is to be answered.
_READ = {"class": (1, 2), "number": (1, 2), "chat": (1, 2), "choice": (2,)}


class Question(NamedTuple):
    """What a row is asked: the columns that are read, and what an answer may be.

    It needs no rows, so it can be asked about new ones (``jaxpeft.serving.predict``).

    Attributes:
      name: of the task.
      form: "class" or "number" (of a model with a head for it); of a language model
        "text" (goes on with a text), "completion" (answers a prompt), "chat" (answers
        messages) or "choice" (which of some completions is likeliest).
      columns: those that are read: one text or a pair; the text; the prompt; the
        messages, and maybe the tools; the prompt and the choices. Those of a language
        model's texts may be templates.
      labels: of a class, the names, in the order of the head.
      first: of a class, the column of the head that the first of them has; the columns
        of others belong to other tasks of a mixture.
      width: of a class, how many columns the head has in all; None: that of `labels`.
      per_token: of a choice, whether the mean over its tokens decides, and not their
        sum.
      raw: of a choice, how rows as they stand in the files become a prompt and
        choices: the arguments "prompt" (a template), "choices" and "lead" of
        `jaxpeft.data.tasks.choices`; None: they have these columns already.
    """

    name: str
    form: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    first: int = 0
    width: int | None = None
    per_token: bool = False
    raw: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns it as what JSON can hold."""
        return self._asdict()

    @classmethod
    def from_json(cls, given: Any) -> "Question":
        """Returns what `to_json` gave, read again.

        Raises:
          ValueError: it is damaged, or of a form that this version does not know.
        """
        try:
            values = dict(given)
            values["columns"] = tuple(values["columns"])
            if values.get("labels") is not None:
                values["labels"] = tuple(values["labels"])
            found = cls(**values)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"`question` is damaged: {given!r} ({error!r})") from None
        if found.form not in FORMS:
            raise ValueError(
                f"`question` has the form {found.form!r}; known are {', '.join(FORMS)}."
            )
        if len(found.columns) not in _READ.get(found.form, (1,)):
            raise ValueError(
                f"`question` of the form {found.form!r} reads "
                f"{' or '.join(map(str, _READ.get(found.form, (1,))))} columns; got "
                f"{found.columns}."
            )
        return found


def questions(task: Task | TextTask | MixedTask) -> tuple[Question, ...]:
    """Returns what a task asks about a row; of a mixture, each of its tasks in order.

    Args:
      task: the task.

    Returns:
      The questions, in the order of their classes in the model's head.

    Example:
      >>> from jaxpeft.data import make_task, mix
      >>> rows = [{"text": "a", "label": 0}]
      >>> toy = make_task(
      ...     "toy",
      ...     {"train": rows, "validation": rows},
      ...     text="text",
      ...     label="label",
      ...     labels=["no", "yes"],
      ... )
      >>> [(q.name, q.first) for q in questions(mix({"one": toy, "other": toy}))]
      [('one', 0), ('other', 2)]
    """
    if isinstance(task, MixedTask):
        starts = [task.classes(name).start for name in task.parts]  # 0 without classes
        return tuple(
            _question(part)._replace(name=name, first=start, width=task.num_labels)
            for (name, part), start in zip(task.parts.items(), starts, strict=True)
        )
    return (_question(task),)


def head_labels(asked: Sequence[Question]) -> tuple[str, ...] | None:
    """Returns the names of all classes of a head, in its order.

    Args:
      asked: from `questions`.

    Returns:
      The names; those of several tasks with the task's before them, "trec/HUM". None:
      there are no classes.

    Example:
      >>> pair = [Question(n, "class", ("text",), ("no", "yes")) for n in "ab"]
      >>> head_labels(pair[:1]), head_labels(pair)
      (('no', 'yes'), ('a/no', 'a/yes', 'b/no', 'b/yes'))
    """
    if any(one.labels is None for one in asked):
        return None
    if len(asked) == 1:
        return asked[0].labels
    return tuple(f"{one.name}/{label}" for one in asked for label in one.labels or ())


def task_metadata(task: Task | TextTask | MixedTask) -> dict[str, Any]:
    """Returns what an adapter's file says of the task that it was trained on.

    Args:
      task: the task.

    Returns:
      JSON-able: "questions", see `Question`; "regression", whether the head gives a
      number; and of a head with classes "labels", their names in its order.

    Example:
      >>> from jaxpeft.data import make_task
      >>> rows = [{"text": "a", "label": 0}]
      >>> toy = make_task(
      ...     "toy",
      ...     {"train": rows, "validation": rows},
      ...     text="text",
      ...     label="label",
      ...     labels=["no", "yes"],
      ... )
      >>> task_metadata(toy)["labels"], task_metadata(toy)["regression"]
      (['no', 'yes'], False)
    """
    asked = questions(task)
    labels = head_labels(asked)
    found: dict[str, Any] = {} if labels is None else {"labels": list(labels)}
    found["regression"] = task.head == "regression"
    return found | {"questions": [one.to_json() for one in asked]}


def _question(task: Task | TextTask) -> Question:
    if isinstance(task, Task):
        form = "number" if task.regression else "class"
        return Question(task.name, form, task.text, task.labels)
    read = 1 if task.form == "completion" else 2
    per_token = task.form == "choice" and task.metrics[0] == "accuracy_per_token"
    return Question(
        task.name,
        task.form,
        task.columns[:read],
        per_token=per_token,
        raw=task.raw,
    )
