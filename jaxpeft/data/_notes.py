"""What is to be known of a task before its scores are believed."""

from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import Task
from jaxpeft.data._texts import TextTask


def notes(task: Task | TextTask | MixedTask) -> list[str]:
    """Returns a line for each split that shares texts with the training rows.

    Args:
      task: the task; of a mixture, all of its parts are asked.

    Returns:
      The lines, out of the fact `also_in_train`, which tasks over files have.

    Example:
      >>> from jaxpeft.data import make_text_task
      >>> rows = [{"q": "2 + 2 =", "a": " 4"}]
      >>> task = make_text_task(
      ...     "sums",
      ...     {"train": rows, "validation": rows},
      ...     prompt="q",
      ...     completion="a",
      ...     facts={"also_in_train": {"validation": 1}},
      ... )
      >>> notes(task)
      ['sums: of the 1 rows of validation 1 read as a training row does']
    """
    parts = task.parts if isinstance(task, MixedTask) else {task.name: task}
    return [
        f"{name}: of the {len(part.splits[split]):,} rows of {split} {count:,} read as "
        "a training row does"
        for name, part in parts.items()
        for split, count in part.facts.get("also_in_train", {}).items()
        if count
    ]
