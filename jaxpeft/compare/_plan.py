"""What a comparison asks for: a row for each task, method, point of the grid, seed."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from jaxpeft.adapters import lora
from jaxpeft.runs import (
    FREE_SECTIONS,
    call,
    check_fields,
    config_file,
    flat_config,
    load_config,
    make_adapter,
    stage_config,
    with_calls,
)
from jaxpeft.training import adamw
from jaxpeft.tree import attach, partition

# A method changes what it is, and how it is optimised. All else is the task's, so that
# every method sees the same rows in the same order for the same number of steps.
OF_METHODS = (
    *("adapter", "targets", "exclude", "rank_pattern", "alpha_pattern", "head"),
    *("ranks", "optimizer", "stage", "stages", "stage_changes", "start", "clip_norm"),
)
# Fields that are replaced whole: their options belong to one name.
WHOLE = ("adapter", "data", "before", "during")
FIELDS = ("tasks", "methods", "grid", "seeds", "choose_with", "reference", "budget")


class Row(NamedTuple):
    """One run of a comparison.

    Attributes:
        task: its name in the comparison.
        method: likewise.
        point: of the grid, ``{"optimizer.learning_rate": 1e-3}``.
        seed: the run's.
        config: of the run, locked.
    """

    task: str
    method: str
    point: dict[str, Any]
    seed: int
    config: ml_collections.ConfigDict

    @property
    def at(self) -> str:
        """The point in one word: ``"learning_rate=0.001"``; ``"as-given"``: no grid."""
        return point_name(self.point)

    @property
    def name(self) -> str:
        """``"trec/lora/learning_rate=0.001/seed=0"``; also the place of its files."""
        return f"{self.task}/{self.method}/{self.at}/seed={self.seed}"


class Comparison(NamedTuple):
    """What is compared.

    Attributes:
        rows: by task and method, in the order in which they are run: what the choice
            needs first.
        seeds: of the rows of the table.
        choose_with: the seeds that choose a point of the grid, some of ``seeds``.
        reference: the method from which differences are taken.
        budget: ``{"trainable": n, "tolerance": share}`` of what adapters train, or
            empty.
    """

    rows: dict[tuple[str, str], list[Row]]
    seeds: tuple[int, ...]
    choose_with: tuple[int, ...]
    reference: str
    budget: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(task for task, _ in self.rows))

    @property
    def methods(self) -> list[str]:
        """Names of the methods, the reference first."""
        names = dict.fromkeys(method for _, method in self.rows)
        return [self.reference, *(name for name in names if name != self.reference)]

    def of(self, methods: Sequence[str]) -> "Comparison":
        """The same with some of the methods alone.

        Raises:
            ValueError: one is unknown, or the reference is not among them.
        """
        if unknown := [name for name in methods if name not in self.methods]:
            raise ValueError(
                f"`methods` {unknown[0]!r} is none of {', '.join(self.methods)}."
            )
        if self.reference not in methods:
            raise ValueError(
                f"`methods` {', '.join(methods)} lack {self.reference!r}, from which "
                "differences are taken."
            )
        rows = {key: rows for key, rows in self.rows.items() if key[1] in methods}
        return self._replace(rows=rows)


def point_name(point: Mapping[str, Any]) -> str:
    """A point of a grid in one word, for tables and folders.

    Example:
        >>> point_name({"optimizer.learning_rate": 1e-3, "adapter.alpha": 16.0})
        'learning_rate=0.001,alpha=16.0'
    """
    parts = [f"{field.split('.')[-1]}={value}" for field, value in point.items()]
    return re.sub(r"[^\w.=,+-]+", "-", ",".join(parts)) or "as-given"


def read_comparison(path: str | Path) -> Comparison:
    """Reads a comparison, and makes the config of every row.

    Args:
        path: a Python file, or the name of one that comes with the package, whose
            ``get_config()`` returns a ``ConfigDict`` with

            * ``tasks``: ``{name: dict(config=..., changes=...)}``: a file of a run,
              relative to this one, and fields that differ;
            * ``methods``: ``{name: dict(changes=..., grid=...)}``: the fields of a
              method (``adapter``, ``optimizer``, ``head``, ...; sections may be calls,
              ``"kasa(rank=8)"``), and a grid of its own in place of the one for all;
            * ``grid``: fields with a tuple of values each, nested as in a config; the
              points are all their combinations; empty: none;
            * ``seeds``, and ``choose_with``: those that choose the point;
            * ``reference``: the method that others are compared with;
            * ``budget``: ``dict(trainable=..., tolerance=...)`` or empty.

    Returns:
        The comparison.

    Raises:
        ValueError: a field is missing, unknown or does not fit; a method changes what
            is the task's; a name that cannot be a folder's; two rows of one name.
    """
    config = load_config(path)
    missing = [name for name in FIELDS if name not in config]
    unknown = [name for name in config if name not in FIELDS]
    if missing or unknown:
        raise ValueError(
            f"`--config` {str(path)!r} is no comparison: missing {missing}, unknown "
            f"{unknown}; get_config() returns {', '.join(FIELDS)}."
        )
    seeds, choose_with = tuple(config.seeds), tuple(config.choose_with)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`config.seeds` must be different numbers, got {seeds}.")
    if not choose_with or set(choose_with) - set(seeds):
        raise ValueError(
            f"`config.choose_with` must be some of the seeds {seeds}, got "
            f"{choose_with}."
        )
    if config.reference not in config.methods:
        raise ValueError(
            f"`config.reference` {config.reference!r} is none of the methods "
            f"{list(config.methods)}."
        )
    for name in (*config.tasks, *config.methods):
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(
                f"`config`: {name!r} names a folder of results; write letters, digits, "
                "'_', '.', '+' and '-'."
            )
    order = (*choose_with, *(seed for seed in seeds if seed not in choose_with))
    rows: dict[tuple[str, str], list[Row]] = {}
    for task, asked in config.tasks.items():
        base = _base(config_file(path).parent, task, asked)
        for method, given in config.methods.items():
            _check_method(method, given)
            points = list(_points(given.get("grid", config.grid)))
            try:
                rows[task, method] = [
                    Row(task, method, at, seed, _row_config(base, given, at, seed))
                    for seed in order
                    for at in points
                ]
            except ValueError as error:
                raise ValueError(f"method {method!r} on {task!r}: {error}") from error
    names = [row.name for each in rows.values() for row in each]
    if same := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"`config`: {len(names)} rows have {len(set(names))} names, {same[0]!r} is "
            "that of several; the values of a grid must differ, and the last words of "
            "its fields, too."
        )
    budget = dict(config.budget)
    if budget and set(budget) != {"trainable", "tolerance"}:
        raise ValueError(
            "`config.budget` is dict(trainable=100_000, tolerance=0.05) or dict(), got "
            f"{budget}."
        )
    return Comparison(rows, seeds, choose_with, config.reference, budget)


def _base(folder: Path, task: str, asked: Any) -> ml_collections.ConfigDict:
    """The config that all rows of a task start from."""
    if not set(asked) <= {"config", "changes"} or "config" not in asked:
        raise ValueError(
            f"`config.tasks.{task}` is dict(config='quickstart.py', changes=dict(...)),"
            f" got {list(asked)}."
        )
    base = load_config(folder / asked["config"])
    base = _changed(base, asked.get("changes", {}), f"tasks.{task}.changes")
    check_fields(base)
    return base


def _check_method(method: str, given: Any) -> None:
    changes = given.get("changes", {})
    if unknown := [name for name in given if name not in ("changes", "grid")]:
        raise ValueError(
            f"`config.methods.{method}` has {unknown}; allowed: changes, grid."
        )
    if foreign := [name for name in changes if name not in OF_METHODS]:
        raise ValueError(
            f"`config.methods.{method}.changes` has {foreign}, which is for tasks to "
            f"say, so that all methods see the same; of methods: "
            f"{', '.join(OF_METHODS)}."
        )


def _points(grid: Any) -> Iterator[dict[str, Any]]:
    """All combinations of a grid's values, each as ``{field: value}``."""
    fields = flat_config(ml_collections.ConfigDict(grid))
    for field, values in fields.items():
        if not isinstance(values, tuple | list) or not values:
            raise ValueError(
                f"`config.grid.{field}` must be a tuple of values, got {values!r}."
            )
    for values in itertools.product(*fields.values()):
        yield dict(zip(fields, values, strict=True))


def _row_config(base, given, point, seed) -> ml_collections.ConfigDict:
    config = _changed(base, given.get("changes", {}), "methods")
    config = _changed(config, _nested(point), "grid")
    with config.unlocked():
        config.seed = seed
    check_fields(config)
    for stage in range(len(config.stages)):
        check_fields(stage_config(config, stage, Path()))
    make_adapter(config)
    # A typing error in a rate is said now, not by the row that meets it hours later.
    options = config.optimizer.to_dict()
    call(adamw, options, "optimizer", trainable=_any_adapter(), total_steps=1)
    return config


@functools.cache
def _any_adapter() -> Any:
    """Something small to train, on which an optimiser's arguments are tried."""
    params = {"any": {"kernel": np.zeros((2, 2), np.float32)}}
    adapted = attach(params, lora(rank=1), targets="all-linear", key=jax.random.key(0))
    return partition(adapted)[0]


def _nested(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a grid as a config has it: ``{"optimizer": {"b1": 0.9}}``."""
    nested: dict[str, Any] = {}
    for field, value in point.items():
        *parents, last = field.split(".")
        holder = nested
        for parent in parents:
            holder = holder.setdefault(parent, {})
        holder[last] = value
    return nested


def _changed(base, changes: Any, where: str) -> ml_collections.ConfigDict:
    """A copy of a config with some fields changed, sections field by field.

    A grid's values are options of what a section names; other changes name it anew.
    """
    whole = () if where == "grid" else WHOLE
    config = base.copy_and_resolve_references().unlock()

    def change(holder, changes, path):
        for name, value in changes.items():
            if name not in holder and path.removesuffix(".") not in FREE_SECTIONS:
                raise ValueError(
                    f"`config.{where}`: a run has no field {path}{name!r}; there are "
                    f"{sorted(holder)}."
                )
            section = isinstance(holder.get(name), ml_collections.ConfigDict)
            if isinstance(value, Mapping | ml_collections.ConfigDict):
                if section and name not in whole:
                    change(holder[name], value, f"{path}{name}.")
                    continue
                value = ml_collections.ConfigDict(value)
            with holder.ignore_type():
                holder[name] = value

    change(config, changes, "")
    return with_calls(config).lock()
