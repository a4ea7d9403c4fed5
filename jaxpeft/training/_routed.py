"""Models with routers: what they say of their tokens, beside what the model says."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.transform import adapt
from jaxpeft.tree import nodes, structure_of, with_call


def call_adapted(
    fn: Any, adapted: Any, batch: Any, *args: Any
) -> tuple[Any, dict[str, Any]]:
    """Calls ``adapt(fn)(adapted, *args)``; gathers sums where adapters have routers.

    Args:
        fn: the model, on a plain tree.
        adapted: the adapted tree.
        batch: routers see its tokens, ``"attention_mask"``; rows whose ``"weight"`` is
            0 count as padding.
        *args: the other arguments of ``fn``.

    Returns:
        ``(outputs, seen)``: what ``fn`` returns, and by site what its router says of
        the tokens of each row (``numerics.routing_sums``); empty without routers.
    """
    if not any(structure_of(node).experts for node in nodes(adapted)):
        return adapt(fn)(adapted, *args), {}
    mask = batch["attention_mask"] * (batch["weight"] > 0)[:, None].astype(jnp.int32)
    masked = with_call(adapted, mask=mask)
    outputs, seen = adapt(fn, taps="own")(masked, *args)
    return outputs, {site: found for site, found in seen.items() if found}


def sum_rows(seen: dict[str, Any]) -> dict[str, Any]:
    """Returns the sums over all rows of a batch, which become ``[*layers, 1, ...]``."""
    axis = {"tokens": -1, "entropy": -1, "z": -1}
    total = lambda name, x: (
        x if name == "active" else jnp.sum(x, axis.get(name, -2), keepdims=True)
    )
    return {
        site: {name: total(name, x) for name, x in found.items()}
        for site, found in seen.items()
    }


def add_sums(sums: Any, more: Any) -> Any:
    """Returns two batches' sums as one."""
    return more if sums is None else jax.tree.map(operator.add, sums, more)
