"""What a checkpoint holds, by name, and where two runs differ in it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpeft.training._config_json import config_differences, with_new_names
from jaxpeft.training._state import TrainState
from jaxpeft.tree import flat, grouped, is_node, is_whole, unflat


class Restored(NamedTuple):
    """What ``Checkpointer.restore`` returns.

    Attributes:
        state: the state, on the shardings of the one that was given.
        frozen: the frozen tree with the adapters' fixed leaves of the checkpoint.
        data_state: this process's ``data_state``, as it was saved.
        extra: ``extra``, as it was saved.
        scores: the scores at that step.
        step: the number of updates done.
    """

    state: TrainState
    frozen: Any
    data_state: Any
    extra: Any
    scores: dict[str, float]
    step: int


def leaves_of(state: TrainState, frozen: Any, key_data: Any) -> dict[str, Any]:
    """Everything a checkpoint holds, by name."""
    named = {f"trainable/{n}": x for n, x in flat(state.trainable).items()}
    named |= {f"opt_state/{n}": x for n, x in flat(state.opt_state).items()}
    named |= {f"allocation/{n}": x for n, x in flat(state.allocation).items()}
    named |= {f"fixed/{n}": x for n, x in _fixed(frozen).items()}
    return {**named, "step": state.step, "key": key_data}


def shapes_of(state: TrainState, frozen: Any) -> dict[str, Any]:
    """The same as shapes and shardings, by which they are read."""
    key = jax.eval_shape(jax.random.key_data, state.key)
    data = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.key.sharding)
    return {
        n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for n, x in leaves_of(state, frozen, data).items()
    }


def below(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    start = prefix + "/"
    return {n.removeprefix(start): x for n, x in leaves.items() if n.startswith(start)}


def _fixed(frozen: Any) -> dict[str, Any]:
    """The adapters' own frozen leaves."""
    own = lambda x: x.replace(base=None, call=None) if is_node(x) else None
    return flat(jax.tree.map(own, frozen, is_leaf=is_whole))


def base_of(frozen: Any) -> dict[str, Any]:
    """The frozen tree without the adapters' own leaves."""
    return flat(
        jax.tree.map(lambda x: x.base if is_node(x) else x, frozen, is_leaf=is_node)
    )


def restored(
    found: Mapping[str, Any],
    meta: Mapping[str, Any],
    state: TrainState,
    frozen: Any,
    *,
    data_state: Any,
) -> Restored:
    """The inverse of ``leaves_of``: what a checkpoint holds, as a run has it.

    Args:
        found: the leaves that were read, by name.
        meta: of the checkpoint.
        state: a state of the run, for its structure and shardings.
        frozen: the frozen tree of the run.
        data_state: this process's.
    """
    key = jax.random.wrap_key_data(found["key"], impl=meta["key"])
    names = ("trainable", "opt_state", "allocation", "fixed")
    parts = {n: below(n, found) for n in names}
    new_state = TrainState(
        trainable=unflat(state.trainable, parts["trainable"]),
        opt_state=unflat(state.opt_state, parts["opt_state"]),
        step=found["step"],
        key=jax.device_put(key, state.key.sharding),
        bad_step=jax.device_put(np.int32(-1), state.bad_step.sharding),
        allocation=unflat(state.allocation, parts["allocation"]),
    )
    kept = {n: x for n, x in flat(frozen).items() if n not in parts["fixed"]}
    return Restored(
        state=new_state,
        frozen=unflat(frozen, {**kept, **parts["fixed"]}),
        data_state=data_state,
        extra=meta["extra"],
        scores=meta["scores"],
        step=meta["step"],
    )


def manifest(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {n: f"{x.dtype}{list(x.shape)}" for n, x in leaves.items()}


def differences(
    meta: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    free: Sequence[str],
    leaves: Mapping[str, Any],
    key: Any,
    base: Callable[[], Mapping[str, int]],
) -> list[str]:
    """Returns a line for everything in which a checkpoint is not a run's.

    Args:
        meta: of the checkpoint.
        config: the run's.
        free: fields of it that may differ.
        leaves: the run's, by name.
        key: the run's.
        base: gives the checksums of the run's base, which costs a pass over it.
    """
    before = with_new_names(ConfigDict(meta["config"]))
    lines = config_differences(before, ConfigDict(config), free=free)
    lines = [f"config field {line}" for line in lines]
    old, new = meta["leaves"], manifest(leaves)
    show = lambda table, name: table.get(name, "absent")
    changed = [
        f"leaf {n}: {show(old, n)}, now {show(new, n)}"
        for n in sorted({*old, *new})
        if old.get(n) != new.get(n)
    ]
    implementation = str(jax.random.key_impl(key))
    if meta["key"] != implementation:
        lines.append(f"key implementation {meta['key']!r}, now {implementation!r}")
    if not lines and not changed:
        other = dict(set(base().items()) ^ set(meta["base"].items()))
        changed = [f"base leaf {n}: its values differ" for n in sorted(other)]
    return lines + ([grouped(changed)] if changed else [])
