"""Models with routers: what they say of their tokens, beside what the model says."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.transform import adapt
from jaxpeft.tree import nodes, structure_of, with_call


class Routed(NamedTuple):
    """What a forward function returns where adapters have routers.

    Attributes:
        outputs: the model's, as without routers.
        sums: by site, over the tokens of each row (``numerics.routing_sums``).
    """

    outputs: Any
    sums: dict[str, Any]


def call_adapted(fn: Any, adapted: Any, batch: Any, *args: Any) -> Any:
    """Calls ``adapt(fn)(adapted, *args)``; gathers sums where adapters have routers.

    Args:
        fn: the model, on a plain tree.
        adapted: the adapted tree.
        batch: routers see its tokens, ``"attention_mask"``; rows whose ``"weight"`` is
            0 count as padding.
        *args: the other arguments of ``fn``.

    Returns:
        what ``fn`` returns, or ``Routed``.
    """
    if not any(structure_of(node).experts for node in nodes(adapted)):
        return adapt(fn)(adapted, *args)
    mask = batch["attention_mask"] * (batch["weight"] > 0)[:, None].astype(jnp.int32)
    seen = with_call(adapted, mask=mask)
    outputs, sums = adapt(fn, taps="own")(seen, *args)
    return Routed(outputs, {site: found for site, found in sums.items() if found})


def split_routed(outputs: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns the model's outputs, and the sums of its routers or ``None``."""
    return outputs if isinstance(outputs, Routed) else (outputs, None)


def sum_rows(sums: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the sums over all rows of a batch, which become ``[*layers, 1, ...]``."""
    if sums is None:
        return None
    axis = {"tokens": -1, "entropy": -1, "z": -1}
    total = lambda name, x: (
        x if name == "active" else jnp.sum(x, axis.get(name, -2), keepdims=True)
    )
    return {
        site: {name: total(name, x) for name, x in found.items()}
        for site, found in sums.items()
    }


def add_sums(sums: Any, more: Any) -> Any:
    """Returns two batches' sums as one."""
    return more if sums is None else jax.tree.map(operator.add, sums, more)
