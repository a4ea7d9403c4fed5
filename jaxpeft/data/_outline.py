"""What a task's batches will be like, before any row is read."""

import inspect
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.data import tasks
from jaxpeft.data._mixed import MixedTask
from jaxpeft.data._task import near_misses
from jaxpeft.data._texts import TextTask


class TaskOutline(NamedTuple):
    """The form of a task.

    Attributes:
        head: of the model for it, as of ``Task.head``.
        num_labels: the width of a classification head; ``None`` where only the rows
            tell it, or there is no such head.
        packed: whether several rows share a sequence.
        mixed: whether it is several tasks as one.
    """

    head: str
    num_labels: int | None
    packed: bool
    mixed: bool

    def batch(
        self, rows: int, length: int, *, types: bool = False, num_labels: int = 2
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a training batch, as ``batches`` and a mesh make it.

        Args:
            rows: sequences.
            length: tokens of each.
            types: whether the tokenizer tells first from second texts.
            num_labels: the width of a classification head.
        """
        make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * types
        names += ["segment_ids", "positions"] * self.packed
        writes = self.head == "causal_lm"
        batch = {name: make(rows, length) for name in names + ["targets"] * writes}
        if writes:
            batch["target_weights"] = make(rows, length, dtype=jnp.float32)
        number = self.head == "regression"
        batch["label"] = make(rows, dtype=jnp.float32 if number else jnp.int32)
        if self.mixed:
            batch["task_id"] = make(rows)
            if self.head == "classification":
                batch["label_mask"] = make(rows, num_labels, dtype=jnp.bool_)
        return batch | {"weight": make(rows, dtype=jnp.float32)}


def outline(config: str | Mapping[str, Any] | Any, **options: Any) -> TaskOutline:
    """Returns the form of the task that ``task`` would return; reads no row.

    Args:
        config: as for ``task``.
        **options: as for ``task``.

    Returns:
        Its form. Of a task with classes that does not say them in its options, the
        width of the head is not known.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> outline("asdiv").head
        'causal_lm'
        >>> outline({"name": "files", "labels": ("bad", "good")}).num_labels
        2
    """
    if isinstance(config, str):
        config = {"name": config}
    plain = lambda value: value.to_dict() if hasattr(value, "to_dict") else value
    given = {**{name: plain(config[name]) for name in config}, **options}
    name = str(given.get("name")).partition("/")[0]
    names = [n for n, _ in inspect.getmembers(tasks, inspect.isfunction)]
    if name not in names:
        raise ValueError(f"`name` {name!r} is no task.{near_misses(name, names)}")
    function = getattr(tasks, name)
    kind = typing.get_type_hints(function)["return"]
    if kind is MixedTask:
        parts = given.get("tasks", ())
        parts = list(parts.values() if isinstance(parts, Mapping) else parts)
        shared = {k: v for k, v in given.items() if k in ("pack",)}
        each = [outline(part, **shared) for part in parts] or [outline("trec")]
        widths = [part.num_labels for part in each]
        width = None if None in widths else sum(widths)
        return each[0]._replace(num_labels=width, mixed=True)
    known = inspect.signature(function).parameters
    default = known["pack"].default if "pack" in known else False
    packed = bool(given.get("pack", default))
    if kind is TextTask:
        return TaskOutline("causal_lm", None, packed, False)
    if "labels" in given and given["labels"] is None:
        return TaskOutline("regression", 1, False, False)
    labels = given.get("labels")
    width = len(labels) if isinstance(labels, list | tuple) else None
    return TaskOutline("classification", width, False, False)
