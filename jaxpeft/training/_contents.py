"""What a checkpoint holds, by name."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft.training._state import TrainState
from jaxpeft.tree import flat, is_node


def leaves_of(state: TrainState, frozen: Any, key_data: Any) -> dict[str, Any]:
    """Everything a checkpoint holds, by name."""
    named = {f"trainable/{n}": x for n, x in flat(state.trainable).items()}
    named |= {f"opt_state/{n}": x for n, x in flat(state.opt_state).items()}
    named |= {f"allocation/{n}": x for n, x in flat(state.allocation).items()}
    named |= {f"fixed/{n}": x for n, x in _fixed(frozen).items()}
    return {**named, "step": state.step, "key": key_data}


def below(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    start = prefix + "/"
    return {n.removeprefix(start): x for n, x in leaves.items() if n.startswith(start)}


def _fixed(frozen: Any) -> dict[str, Any]:
    """The adapters' own frozen leaves."""
    own = lambda x: x.replace(base=None, call=None) if is_node(x) else None
    return flat(jax.tree.map(own, frozen, is_leaf=is_node))


def base_of(frozen: Any) -> dict[str, Any]:
    """The frozen tree without the adapters' own leaves."""
    return flat(
        jax.tree.map(lambda x: x.base if is_node(x) else x, frozen, is_leaf=is_node)
    )


def manifest(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {n: f"{x.dtype}{list(x.shape)}" for n, x in leaves.items()}


def differences(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    show = lambda table, name: table.get(name, "absent")
    return [
        f"{what} {n}: {show(old, n)}, now {show(new, n)}"
        for n in sorted({*old, *new})
        if old.get(n) != new.get(n)
    ]
