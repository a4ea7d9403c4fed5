"""Configs: one Python file a run, changed from the command line, kept as JSON."""

import ast
import contextlib
import difflib
import importlib.machinery
import inspect
import math
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxpeft.runs._arguments import check_arguments
from jaxpeft.runs._calls import CALLS, with_calls
from jaxpeft.runs._shipped import config_file, shipped_configs
from jaxpeft.training import flat_config, new_name, with_new_names
from jaxpeft.tree import Adapter, find_method, methods


def load_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    r"""Returns the locked config of a file, with some of its values replaced.

    Args:
        path: a Python file with a function ``get_config``. What follows a colon is
            given to that function: ``"configs/glue_kasa.py:task=rte,model=base"``
            calls ``get_config(task="rte", model="base")``. Or the name of a config that
            comes with the package, ``"quickstart"`` (``shipped_configs``).
        overrides: strings ``"adapter.rank=16"``. A field must exist, and the text is
            read as the type of the value it replaces (an int stays an int, a float may
            be written 8 or 1e-4, a bool is true or false, a tuple is written
            ``query,key``); where that value is None, as a Python literal or else text.
            ``adapter``, ``data``, ``ranks.before`` and ``ranks.during`` are replaced
            whole by a call: ``"adapter=bora(rank=16)"``.

    Returns:
        the config, locked: reading or writing a field it does not have raises. Fields
        that had another name before have that of now (``training.with_new_names``).

    Raises:
        ValueError: no such file, one that cannot be run (its line is named), no such
            field (near matches are named), an argument that ``get_config`` does not
            take, a value of another type.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "tiny.py"
        >>> _ = file.write_text(
        ...     "from ml_collections import ConfigDict\n"
        ...     "get_config = lambda: ConfigDict({'adapter': {'rank': 8}})"
        ... )
        >>> load_config(file, ["adapter.rank=16"]).adapter.rank
        16
    """
    name, _, argument = str(path).partition(":")
    name = str(config_file(name))
    get_config = _read_get_config(Path(name))
    allowed = list(inspect.signature(get_config).parameters)
    given = {}
    for item in filter(None, argument.split(",")):
        key, separator, value = item.partition("=")
        if not separator or key not in allowed:
            raise ValueError(
                f"`--config` {str(path)!r}: {item!r} is not an argument of its "
                f"get_config; allowed: {allowed or 'none'}."
                + (f" Write {name}:{allowed[0]}=VALUE." if allowed else "")
            )
        given[key] = value
    config = _from_file(Path(name), lambda: get_config(**given))
    if not _is_section(config):
        raise ValueError(
            f"`--config`: get_config() of {name!r} returned a {type(config).__name__}; "
            "it should return an ml_collections.ConfigDict, see configs/quickstart.py."
        )
    config = with_calls(with_new_names(config))
    for item in overrides:
        _override(config, item)
        with_calls(config)
    return config.lock()


def _read_get_config(path: Path) -> Callable[..., ml_collections.ConfigDict]:
    if not path.is_file():
        beside = sorted(str(file) for file in path.parent.glob("*.py"))
        if len(path.parts) == 1:
            with contextlib.suppress(FileNotFoundError):
                beside += [config.name for config in shipped_configs()]
        near = (
            near_names(str(path), beside) or beside or "no Python file in that folder"
        )
        raise ValueError(
            f"`--config`: there is no file {str(path)!r}; nearest: {near}. `jaxpeft "
            "configs` lists those that come with the package."
        )
    loader = importlib.machinery.SourceFileLoader(f"config_{path.stem}", str(path))
    module = types.ModuleType(loader.name)
    module.__file__ = str(path)
    _from_file(path, lambda: loader.exec_module(module))
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"`--config`: {str(path)!r} has no function get_config(); it should return "
            f"an ml_collections.ConfigDict, see configs/quickstart.py."
        )
    return module.get_config


def _from_file(path: Path, do: Callable[[], Any]) -> Any:
    """What a config's code gives; what it raises, with its line, is a ValueError."""
    try:
        return do()
    except (Exception, SystemExit) as error:  # anything: the code is the user's
        where = str(path)
        if isinstance(error, SyntaxError) and error.filename == where:
            raise ValueError(
                f"`--config` {where!r}, line {error.lineno}: {error.msg}."
            ) from error
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == where
        ]
        line = f", line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"`--config` {where!r}{line}: {kind}{error}") from error


def _override(config: ml_collections.ConfigDict, item: str) -> None:
    """Sets one ``dotted.name=value`` in place."""
    name, separator, text = item.partition("=")
    if not separator:
        raise ValueError(
            f"`--config.{name}` has no value; write --config.{name}=VALUE."
        )
    if now := new_name(name):
        raise ValueError(f"`--config.{name}` is `--config.{now}` now; write that.")
    known = flat_config(config)
    *parents, last = name.split(".")
    holder = config
    for parent in parents:
        holder = holder.get(parent) if _is_section(holder) else None
    if not _is_section(holder) or last not in holder:
        raise ValueError(
            f"`--config.{name}`: the config has no such field; "
            f"nearest: {near_names(name, known) or sorted(known)}."
        )
    old = holder[last]
    if _is_section(old) and name not in CALLS:
        raise ValueError(
            f"`--config.{name}` is a section, not a value; set one of its fields: "
            f"{sorted(key for key in known if key.startswith(name + '.'))}."
        )
    try:
        kind = str if name in CALLS and text != "None" else holder.get_type(last)
        new = _parse(text, kind)
    except ValueError as error:
        kind = holder.get_type(last).__name__
        raise ValueError(
            f"`--config.{name}` is of type {kind} (now {old!r}) and cannot be {text!r}."
        ) from error
    with holder.ignore_type():
        holder[last] = new


def _is_section(value: Any) -> bool:
    return isinstance(value, ml_collections.ConfigDict)


def _parse(text: str, kind: type) -> Any:
    """Reads ``text`` as ``kind``; raises ValueError where it is something else."""
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if kind in (int, float):
        return kind(text)
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = tuple(text.split(",")) if kind in (tuple, list) else text
    if kind in (tuple, list):
        return kind(value) if isinstance(value, tuple | list) else kind([value])
    return value


def near_names(name: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """Up to three known names that look like ``name``, the nearest first."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    same_end = [key for key in known if key.split(".")[-1] == name.split(".")[-1]]
    return list(dict.fromkeys(same_end + near))[:3]


def count_steps(text: str, steps_per_epoch: int, *, field: str) -> int:
    """Returns the number of steps in a length such as "200 steps" or "1.5 epochs".

    Args:
        text: a number and its unit; fractions of an epoch are rounded up.
        steps_per_epoch: steps in one pass over the training rows.
        field: where ``text`` stands in the config, for messages: ``"train_for"``.

    Returns:
        the number of steps, at least 1.

    Raises:
        ValueError: something else, or not above zero.

    Example:
        >>> count_steps("200 steps", 30, field="train_for")
        200
        >>> count_steps("1.5 epochs", 30, field="train_for")
        45
    """
    found = re.fullmatch(r"([0-9.]+) (step|epoch)s?", text.strip())
    units = {"step": 1, "epoch": steps_per_epoch}
    try:
        steps = math.ceil(float(found[1]) * units[found[2]]) if found else 0
    except ValueError:
        steps = 0
    if steps < 1:
        raise ValueError(
            f"`config.{field}` is {text!r}; write a length above zero with its unit: "
            f"'200 steps' or '3 epochs'."
        )
    return steps


def call_named(
    namespace: Any,
    fields: ml_collections.ConfigDict,
    section: str,
    *,
    leave: str = "",
    **known: Any,
) -> Any:
    """Calls the function that ``fields.name`` names, with the other fields.

    Args:
        namespace: a package whose public names may be asked for, such as
            ``jaxpeft.allocate``.
        fields: a section of a config: ``name`` and that function's arguments.
        section: where it stands in the config, for messages: ``"ranks.during"``.
        leave: a field that is not for the function.
        **known: arguments that the run knows by itself, such as ``total_steps``.

    Returns:
        what the function returns.

    Raises:
        ValueError: no such name, or an argument the function does not take; both say
            what there is.

    Example:
        >>> import textwrap
        >>> fields = {"name": "indent", "text": "quoted", "prefix": "> "}
        >>> call_named(textwrap, ml_collections.ConfigDict(fields), "quote")
        '> quoted'
    """
    arguments = {n: value for n, value in fields.to_dict().items() if n != leave}
    name = arguments.pop("name")
    names = [
        n
        for n, value in vars(namespace).items()
        if not n.startswith("_") and inspect.isfunction(value)
    ]
    if name not in names:
        raise ValueError(
            f"`config.{section}.name` {name!r}: {namespace.__name__} has "
            f"{', '.join(names)}; nearest: {near_names(name, names) or 'none'}."
        )
    return call(getattr(namespace, name), arguments, section, **known)


def make_adapter(config: ml_collections.ConfigDict) -> Adapter:
    """Returns the adapter of a config: a method by its name, and its options.

    A method of any package will do once its module is imported; a config is Python,
    and imports it at its top.

    Args:
        config: the config, of which ``adapter`` is ``dict(name=..., and options)``.

    Raises:
        ValueError: no method of that name is known, or it does not take an option.

    Example:
        >>> fields = {"adapter": {"name": "lora", "rank": 4}}
        >>> make_adapter(ml_collections.ConfigDict(fields)).where.rank
        4
    """
    options = config.adapter.to_dict()
    name = options.pop("name")
    try:
        constructor = find_method(name)
    except ValueError as error:
        raise ValueError(
            f"`config.adapter.name`: {error}, at the top of the config; nearest: "
            f"{near_names(name, methods()) or 'none'}."
        ) from None
    return call(constructor, options, "adapter")


def call(
    function: Callable[..., Any], arguments: Mapping[str, Any], section: str, **known
) -> Any:
    """Calls a function with the fields of a section of a config, checked by name.

    Args:
        function: what is called.
        arguments: its arguments that the config has.
        section: where they stand in the config, for messages: ``"optimizer"``.
        **known: arguments that the run knows by itself, such as ``total_steps``.

    Returns:
        what the function returns.

    Raises:
        ValueError: an argument the function does not take, one it needs, or a value of
            another type; and whatever the function itself objects to.

    Example:
        >>> import textwrap
        >>> call(textwrap.indent, {"text": "quoted", "prfix": "> "}, "quote")
        Traceback (most recent call last):
        ...
        ValueError: `config.quote.prfix`: indent takes no such argument; nearest: \
['prefix'], all: text, prefix, predicate.
    """
    name = function.__name__
    parameters = inspect.signature(function).parameters
    allowed = [
        key
        for key, parameter in parameters.items()
        if key not in known and parameter.kind is not parameter.VAR_KEYWORD
    ]
    for key in arguments:
        if key not in allowed:
            raise ValueError(
                f"`config.{section}.{key}`: {name} takes no such argument; nearest: "
                f"{near_names(key, allowed) or 'none'}, all: {', '.join(allowed)}."
            )
    for key in allowed:
        needed = parameters[key].default is inspect.Parameter.empty
        if needed and key not in arguments:
            raise ValueError(f"`config.{section}.{key}` is missing; {name} needs it.")
    check_arguments(function, arguments, f"`config.{section}.{{}}`".format)
    try:
        return function(**arguments, **known)
    except ValueError as error:
        raise ValueError(f"`config.{section}`: {error}") from error


@contextlib.contextmanager
def said_of(field: str) -> Iterator[None]:
    """Puts the name of a config's field before what an error says.

    Args:
        field: as it stands in the config, ``"head"``.

    Raises:
        ValueError: the one that was raised inside, with the name.

    Example:
        >>> with said_of("start"):
        ...     raise ValueError("there is no such folder.")
        Traceback (most recent call last):
        ...
        ValueError: `config.start`: there is no such folder.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"`config.{field}`: {error}") from error
