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
      tasks: names of tasks, "opinions/nyt" is called "nyt" from here on; or a mapping
        from a name of your choice to a task, as `jaxpeft.data.task` takes it, put in
        alphabetic order, for configs keep no other. The order is that of the classes
        in the model's head.
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

    if isinstance(tasks, Mapping):
        tasks = {name: tasks[name] for name in sorted(tasks)}
    else:
        short = [] if isinstance(tasks, str) else [n.rpartition("/")[2] for n in tasks]
        if len(set(short)) < max(len(short), 2):
            raise ValueError(
                f"`tasks` must be two or more names that differ; got {tasks!r}. Other "
                f'names can be given: tasks={{"one": "trec", "other": "trec"}}.'
            )
        tasks = dict(zip(short, tasks, strict=True))
    parts = {name: task(config, **options) for name, config in tasks.items()}
    return mix(parts, temperature=temperature, cap=cap, only=only)
