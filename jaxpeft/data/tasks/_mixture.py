"""A mixture of tasks that have names."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.data._mixed import MixedTask, mix


def mixture(
    tasks: Mapping[str, Any] | Sequence[str],
    *,
    temperature: float = 1.0,
    cap: int | None = None,
    only: Sequence[str] | None = None,
    **options: Any,
) -> MixedTask:
    """Returns several tasks as one.

    Args:
      tasks: names of tasks; or a mapping from a name of your choice to a task, as
        `jaxpeft.data.task` takes it: `{"nyt": "opinions/nyt", "trec": "trec"}`.
      temperature: as in `jaxpeft.data.mix`.
      cap: as in `jaxpeft.data.mix`.
      only: as in `jaxpeft.data.mix`.
      **options: of every task, such as `pack=True`.

    Returns:
      The task.

    Raises:
      ValueError: a name given twice; and as `jaxpeft.data.task`, `jaxpeft.data.mix`.

    Example:
      >>> mixture(["trec", "sms"]).num_labels  # doctest: +SKIP
      8
    """
    from jaxpeft.data._lookup import task  # which looks its names up in this package

    if not isinstance(tasks, Mapping):
        if isinstance(tasks, str) or len(set(tasks)) < len(tasks):
            raise ValueError(f"`tasks` must be different names; got {tasks!r}.")
        tasks = {name: name for name in tasks}
    parts = {name: task(config, **options) for name, config in tasks.items()}
    return mix(parts, temperature=temperature, cap=cap, only=only)
