"""Predictions against labels."""

from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxpeft.data import metrics as _metrics
from jaxpeft.data._task import Task
from jaxpeft.data._texts import TextTask, score_texts


def score(
    task: Task | TextTask,
    outputs: Shaped[Any, " n *width"],
    labels: Shaped[Any, " n *columns"],
) -> dict[str, float]:
    """Returns the task's metrics of predictions against labels.

    Args:
      task: the task; its `metrics` says which.
      outputs: what the model's head gives, [n, num_labels]; or predictions, [n]: class
        ids, for regression scores. Of a writing task, [n, 3]: of every row, minus the
        log-probability of its learnt tokens summed up, their number, and of how many
        the model has a higher opinion than of any other (`training.causal_forward`).
      labels: the true ones, [n]; of a writing task, the numbers of learnt tokens; of a
        multiple-choice task, [n, 5], all choices of every question in any order
        (`jaxpeft.data.Encoded`). Leave padding rows out.

    Returns:
      One float a metric, by name, in the order of `task.metrics`. Of a writing task:

      - perplexity: exp of the mean over all learnt tokens of minus the
        log-probability; infinite where that overflows.
      - token_accuracy: of all learnt tokens, the share that the model would write
        given those before it.
      - exact_match: the share of rows whose learnt tokens all are so: writing
        greedily, the model writes them as they stand, end token and all.

      Of a multiple-choice task, whose tokens are those of a choice, without an end:

      - accuracy: the share of questions whose right choice has the highest sum of its
        tokens' log-probabilities, given the prompt; of equal ones the first counts.
      - accuracy_per_token: the same with their mean in place of the sum.

    Raises:
      ValueError: if the two differ in length, are empty, hold a NaN or infinity, or the
        head has another width than the task, or the tokens are not those of `labels`,
        or a question lacks a choice.

    Example:
      >>> from jaxpeft.data import make_task
      >>> rows = [{"text": "a", "label": 0}]
      >>> task = make_task(
      ...     "toy",
      ...     {"train": rows, "validation": rows},
      ...     text="text",
      ...     label="label",
      ...     labels=["no", "yes"],
      ... )
      >>> score(task, np.array([0, 1]), np.array([0, 0]))
      {'accuracy': 0.5}
      >>> score(task, np.array([[2.0, -1.0], [0.0, 3.0]]), np.array([0, 0]))
      {'accuracy': 0.5}
    """
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if isinstance(task, TextTask):
        return score_texts(task, outputs, labels)
    if outputs.ndim == 2:
        if outputs.shape[1] != task.num_labels:
            raise ValueError(
                f"`outputs` has shape {outputs.shape}; for task {task.name!r} its "
                f"width is {task.num_labels}."
            )
        if not np.all(np.isfinite(outputs)):
            row = int(np.flatnonzero(~np.isfinite(outputs).all(1))[0])
            raise ValueError(f"`outputs` must be finite; row {row} is {outputs[row]}.")
        outputs = outputs[:, 0] if task.regression else np.argmax(outputs, axis=1)
    return {name: getattr(_metrics, name)(outputs, labels) for name in task.metrics}
