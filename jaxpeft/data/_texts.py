"""Tasks of writing: texts, prompts and completions, messages, or choices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from jaxpeft.data._choices import CHOICE_METRICS, score_choices
from jaxpeft.data._task import Rows, check_parts
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
      columns: the columns of that: the text; prompt and completion; the messages;
        prompt, choices and answer.
      metrics: "perplexity", "token_accuracy", "exact_match"; of choices "accuracy",
        "accuracy_per_token"; the first decides which checkpoint is best.
      splits: rows by split, at least "train" and "validation".
      pack: whether several training rows share a sequence (`jaxpeft.data.pack`).
      facts: where the rows come from, JSON-able, for reports.
    """

    name: str
    form: str
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, Rows]
    pack: bool
    facts: Mapping[str, Any]

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
    choices: str | None = None,
    answer: str | None = None,
    metrics: Sequence[str] | None = None,
    pack: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> TextTask:
    """Returns the `TextTask` with these rows and columns, checked.

    Give `text`; or `prompt` and `completion`; or `messages`; or `prompt`, `choices`
    and `answer`.

    Args:
      name: short name, for reports and messages.
      splits: rows by split; "train" and "validation" must be there.
      text: the column of plain text; every token but the first is learnt.
      prompt: the column that is read.
      completion: the column to be written after it, with its own leading space where
        there is one; an end token is put behind.
      messages: the column of lists of {"role": ..., "content": ...}, which go through
        the tokenizer's chat template.
      choices: the column of lists of two or more different completions, each with its
        own leading space.
      answer: the column of the right one: its place in the list, from 0, or its text.
      metrics: out of "perplexity", "token_accuracy", "exact_match", with choices out of
        "accuracy", "accuracy_per_token"; the deciding one first; None: all, in this
        order.
      pack: whether several training rows share a sequence.
      facts: where the rows come from, JSON-able.

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
    given |= {"messages": messages, "choices": choices, "answer": answer}
    given = {k: v for k, v in given.items() if v is not None}
    forms = {
        ("text",): "text",
        ("prompt", "completion"): "completion",
        ("messages",): "chat",
        ("prompt", "choices", "answer"): "choice",
    }
    if tuple(given) not in forms:
        raise ValueError(
            f"Task {name!r} needs the columns `text`, or `prompt` and `completion`, or "
            f"`messages`, or `prompt`, `choices` and `answer`; got {given}."
        )
    form, columns = forms[tuple(given)], tuple(given.values())
    kind, allowed = "writing", TEXT_METRICS
    if form == "choice":
        kind, allowed = "multiple-choice", CHOICE_METRICS
    metrics = allowed if metrics is None else metrics
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    check_parts(name, kind, metrics, allowed, splits, columns)
    return TextTask(name, form, columns, metrics, splits, pack, dict(facts or {}))


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
    if task.form == "choice":
        return score_choices(task.name, task.metrics, losses, labels)
    with np.errstate(over="ignore"):
        scores = {
            "perplexity": float(np.exp(losses.sum() / counts.sum())),
            "token_accuracy": float(hits.sum() / counts.sum()),
            "exact_match": float(np.mean(hits == counts)),
        }
    return {name: scores[name] for name in task.metrics}
