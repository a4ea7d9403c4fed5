"""Tasks of writing: texts, prompts and completions, messages, or choices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from jaxpeft.data._choices import CHOICE_METRICS, score_choices
from jaxpeft.data._task import Rows, check_parts, near_misses
from jaxpeft.data._templates import is_template, pieces, read_text
from jaxpeft.data.metrics._direction import metric_mode

TEXT_METRICS = ("perplexity", "token_accuracy", "exact_match")


class TextTask(NamedTuple):
    """A task for a language model: what to read, and which of its tokens to learn.

    Make one with `jaxpeft.data.task`, or from rows of your own with
    `jaxpeft.data.make_text_task`, which checks it.

    Attributes:
      name: short name, for reports and messages.
      form: "text" (all of it is learnt), "completion" (a prompt, which is only read,
        and what follows it), "chat" (what the assistant says is learnt) or "choice"
        (the right one of some completions is learnt; held-out rows are scored by which
        of them the model finds likeliest).
      columns: the columns of that: the text; prompt and completion; the messages,
        and maybe the tools; prompt, choices and answer. Texts, prompts and completions
        may be templates over columns.
      metrics: "perplexity", "token_accuracy", "exact_match"; of choices "accuracy",
        "accuracy_per_token"; the first decides which checkpoint is best.
      splits: rows by split, at least "train" and "validation".
      pack: whether several training rows share a sequence (`jaxpeft.data.pack`).
      facts: where the rows come from, JSON-able, for reports.
      bad_rows: "raise": a row that is not as it should be is an error; "skip": it is
        left out and counted (`facts` of `jaxpeft.data.tokenize`).
      raw: of choices, how rows of other columns have become these (`data.Question`).
    """

    name: str
    form: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, Rows]
    pack: bool
    facts: Mapping[str, Any]
    bad_rows: str = "raise"
    raw: Mapping[str, Any] | None = None

    @property
    def head(self) -> str:
        """The head of the model for it."""
        return "causal_lm"

    @property
    def best(self) -> dict[str, str]:
        """The score that says which checkpoint is best, and whether by max or min."""
        return {"metric": self.metrics[0], "mode": metric_mode(self.metrics[0])}

    @property
    def num_labels(self) -> None:
        """None: there are no classes."""
        return None


def make_text_task(
    name: str,
    splits: Mapping[str, Rows],
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    tools: str | None = None,
    choices: str | None = None,
    answer: str | None = None,
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    facts: Mapping[str, Any] | None = None,
    bad_rows: str = "raise",
) -> TextTask:
    r"""Returns the `TextTask` with these rows and columns, checked.

    Give `text`; or `prompt` and `completion`; or `messages`; or `prompt`, `choices`
    and `answer`. The text, the prompt and the completion are columns, or templates
    with columns in braces, "Q: {question}\nA:".

    A prompt and what is behind it are tokenised as one text (`jaxpeft.models.joint`).
    Of a chat each turn of the assistant is learnt behind what the model sees when it
    says it, as the tokenizer's chat template writes it: where the template rewrites
    what was said before, each turn is a sequence of its own. Where the template marks
    what is generated ({% generation %}), just that is learnt, and else what is said
    and the end token behind it.

    Args:
      name: short name, for reports and messages.
      splits: rows by split; "train" and "validation" must be there.
      text: the column of plain text; every token but the first is learnt.
      prompt: the column that is read.
      completion: the column to be written after it, with its own leading space where
        there is one; an end token is put behind.
      messages: the column of lists of {"role": ..., "content": ...}, or, as in
        ShareGPT's files, of {"from": ..., "value": ...}, which go through the
        tokenizer's chat template with all else that they have (`tool_calls`, `name`).
        Content may be in parts of text; what is null is not there.
      tools: the column of the tools that a chat may call, a list or JSON of one, for
        the chat template; may be absent from a row.
      choices: the column of lists of two or more different completions, each with its
        own leading space.
      answer: the column of the right one: its place in the list, from 0, or its text.
      metrics: out of "perplexity", "token_accuracy", "exact_match", with choices out of
        "accuracy", "accuracy_per_token"; the deciding one first; None: all, in this
        order.
      pack: whether several training rows share a sequence.
      facts: where the rows come from, JSON-able.
      bad_rows: "raise", the first row without its columns, or with what cannot be
        read, is an error; "skip", such rows are left out and counted.

    Returns:
      The task.

    Raises:
      ValueError: if the columns are of no form or of several, a column or split is not
        there or empty, or a metric is unknown.

    Example:
      >>> rows = [{"q": "2 + 2 =", "a": " 4"}]
      >>> task = make_text_task(
      ...     "sums", {"train": rows, "validation": rows}, prompt="q", completion="a"
      ... )
      >>> task.form, task.columns
      ('completion', ('q', 'a'))
    """
    given = {"text": text, "prompt": prompt, "completion": completion}
    given |= {
        "messages": messages,
        "tools": tools,
        "choices": choices,
        "answer": answer,
    }
    given = {k: v for k, v in given.items() if v is not None}
    forms = {
        ("text",): "text",
        ("prompt", "completion"): "completion",
        ("messages",): "chat",
        ("messages", "tools"): "chat",
        ("prompt", "choices", "answer"): "choice",
    }
    if tuple(given) not in forms:
        raise ValueError(
            f"Task {name!r} needs the columns `text`, or `prompt` and `completion`, or "
            f"`messages` (and maybe `tools`), or `prompt`, `choices` and `answer`; got "
            f"{given}."
        )
    form, columns = forms[tuple(given)], tuple(given.values())
    kind, allowed = "writing", TEXT_METRICS
    if form == "choice":
        kind, allowed = "multiple-choice", CHOICE_METRICS
    metrics = allowed if metrics is None else metrics
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    templates = {
        argument: column
        for argument, column in given.items()
        if argument in ("text", "prompt", "completion") and is_template(column)
    }
    needed = [c for a, c in given.items() if a not in templates and a != "tools"]
    check_parts(name, kind, metrics, allowed, splits, needed, bad_rows)
    for argument, template in templates.items():
        pieces(template, argument)
        for split, rows in splits.items() if bad_rows == "raise" else ():
            read_text(rows[0], template, f"task {name!r}, split {split!r}, row 0")
    if tools and not any(tools in row for row in _each(splits["train"])):
        near = near_misses(tools, splits["train"][0])
        raise ValueError(
            f"Task {name!r}: no training row has the column `tools` {tools!r}.{near}"
        )
    facts = dict(facts or {})
    return TextTask(name, form, columns, metrics, splits, pack, facts, bad_rows)


def _each(rows: Rows) -> Iterator[Mapping[str, Any]]:
    return (rows[number] for number in range(len(rows)))


def score_texts(
    task: TextTask,
    outputs: Shaped[ndarray, " n *width"],
    labels: Shaped[ndarray, " n *columns"],
) -> dict[str, float]:
    """Returns the task's metrics; `jaxpeft.data.score` says which they are."""
    if outputs.ndim != 2 or outputs.shape[1] != 3 or not len(outputs):
        raise ValueError(
            f"`outputs` must be [n, 3] for task {task.name!r}: summed losses, tokens, "
            f"hits; got {outputs.shape}."
        )
    losses, counts, hits = outputs.astype(np.float64).T
    wanted = labels[:, 0] if task.form == "choice" and labels.ndim == 2 else labels
    if not np.array_equal(counts, wanted):
        raise ValueError(
            f"`outputs` of task {task.name!r} count {counts.sum():.0f} learnt tokens, "
            f"`labels` {np.sum(wanted)}: they are not of the same rows."
        )
    if not counts.sum():
        raise ValueError(f"`outputs` of task {task.name!r} have no learnt token.")
    if task.form == "choice":
        return score_choices(task.name, task.metrics, losses, labels)
    with np.errstate(over="ignore"):
        scores = {
            "perplexity": float(np.exp(losses.sum() / counts.sum())),
            "token_accuracy": float(hits.sum() / counts.sum()),
            "exact_match": float(np.mean(hits == counts)),
        }
    return {name: scores[name] for name in task.metrics}
