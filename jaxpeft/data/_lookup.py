"""From a name in a config to a task."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxpeft.data import tasks
from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import Task, check_bad_rows, near_misses
from jaxpeft.data._texts import TextTask


def task(
    config: str | Mapping[str, Any] | Any, **options: Any
) -> Task | TextTask | MixedTask:
    """Returns the task of a name, or of a mapping with a "name" and its options.

    Args:
      config: a name out of `jaxpeft.data.tasks`; or a mapping (a ConfigDict too) whose
        "name" is one and whose other entries are the arguments of that function, or
        `bad_rows`, which all tasks take: "raise", the default, or "skip". What
        stands behind a "/" is its first argument, where it takes one without a name:
        "reasoning_gym/chain_sum", "tfds_texts/gsm8k".
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
      ValueError: `name` 'treck' is no task. Did you mean 'trec'? There is: alpaca, ...
    """
    if isinstance(config, str):
        config = {"name": config}
    # A ConfigDict inside another is no Mapping.
    plain = lambda value: value.to_dict() if hasattr(value, "to_dict") else value
    given = {**{name: plain(config[name]) for name in config}, **options}
    if "name" not in given:
        raise ValueError(
            f"`config` of a task must have a 'name'; got {sorted(given)}. "
            f'For example {{"name": "trec"}}.'
        )
    name, _, first = given.pop("name").partition("/")
    names = [n for n, _ in inspect.getmembers(tasks, inspect.isfunction)]
    if name not in names:
        raise ValueError(f"`name` {name!r} is no task.{near_misses(name, names)}")
    function = getattr(tasks, name)
    known = dict(inspect.signature(function).parameters)
    rest = [n for n, p in known.items() if p.kind is p.VAR_KEYWORD]  # takes any option
    if first:
        option, parameter = next(iter(known.items()))
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or option in given:
            reason = f"{option!r} is given" if option in given else "it takes none"
            raise ValueError(f"Task {name!r} cannot be given {first!r}: {reason}.")
        given[option] = first
    made = lambda given: function(**given)
    if "bad_rows" in given and "bad_rows" not in known and not rest:
        bad_rows = given.pop("bad_rows")
        check_bad_rows(bad_rows)
        made = lambda given: function(**given)._replace(bad_rows=bad_rows)
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
    return made(given)
