"""From a name in a config to a task."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxpeft.data import tasks
from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import Task, near_misses
from jaxpeft.data._texts import TextTask


def task(
    config: str | Mapping[str, Any] | Any, **options: Any
) -> Task | TextTask | MixedTask:
    """Returns the task of a name, or of a mapping with a "name" and its options.

    Args:
      config: a name out of `jaxpeft.data.tasks`; or a mapping (a ConfigDict too) whose
        "name" is one and whose other entries are the arguments of that function.
      **options: further arguments, before those of the mapping.

    Returns:
      The task.

    Raises:
      ValueError: if the name or an option is unknown, naming near misses, or an option
        is missing; and whatever the task itself raises.

    Example:
      >>> task("trec", progress=False)  # doctest: +SKIP
      >>> task("treck")
      Traceback (most recent call last):
      ValueError: `name` 'treck' is no task. Did you mean 'trec'? There is: asdiv, ...
    """
    if isinstance(config, str):
        config = {"name": config}
    given = {**{name: config[name] for name in config}, **options}
    if "name" not in given:
        raise ValueError(
            f"`config` of a task must have a 'name'; got {sorted(given)}. "
            f'For example {{"name": "trec"}}.'
        )
    name = given.pop("name")
    names = [n for n, _ in inspect.getmembers(tasks, inspect.isfunction)]
    if name not in names:
        raise ValueError(f"`name` {name!r} is no task.{near_misses(name, names)}")
    function = getattr(tasks, name)
    known = dict(inspect.signature(function).parameters)
    rest = [n for n, p in known.items() if p.kind is p.VAR_KEYWORD]  # takes any option
    for option in given:
        if option not in known and not rest:
            near = near_misses(option, known)
            raise ValueError(f"Task {name!r} has no option {option!r}.{near}")
    for option, parameter in known.items():
        required = parameter.default is parameter.empty and option not in rest
        if required and option not in given:
            raise ValueError(
                f"Task {name!r} needs the option {option!r}; given: {sorted(given)}."
            )
    return function(**given)
