"""Hidden states of our models, one vector a text and layer, made on the device."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import adapt
from jaxpeft.dimension import pool
from jaxpeft.models._decoder import Decoder

FINALS = ("pre_norm", "post_norm")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def pooled_states(
    model: nn.Module, *, how: str = "mean", final: str = "pre_norm"
) -> Callable[[Any, Mapping[str, Any]], Float[Array, "layers batch d"]]:
    """Returns a jitted function that gives pooled hidden states of a batch.

    Without head and dropout. Padding may be on either side and hold anything. Nothing
    with a token axis leaves the device.

    Args:
        model: of ``models.load``.
        how: how tokens become one vector: ``"mean"``, ``"last"`` or ``"first"``, of
            ``dimension.pool``.
        final: of a decoder, the last state: ``"pre_norm"``, as the last block gives
            it, or ``"post_norm"``, after the final norm, as transformers has it.

    Returns:
        ``(params, batch) -> [L + 1, batch, d]`` in float32: state 0 is what block 0
        reads, state i + 1 what block i gives. The parameters may be adapted. A batch
        has ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``; with
        the parameters bound, ``functools.partial(states, params)``, it is the ``step``
        of ``dimension.collect``.

    Raises:
        ValueError: ``final`` is unknown; when called, a batch of packed texts.

    Example:
        >>> model, params = models.load("minilm")  # doctest: +SKIP
        >>> pooled_states(model)(params, batch).shape  # doctest: +SKIP
        (7, 32, 384)
    """
    if final not in FINALS:
        raise ValueError(f"`final` must be one of {FINALS}, got {final!r}")
    bare, decoder = model.clone(head=None), isinstance(model, Decoder)
    wanted = "pre_norm" if decoder and final == "pre_norm" else True
    forward = adapt(
        lambda params, inputs: bare.apply(
            {"params": params}, **inputs, deterministic=True, hidden_states=wanted
        )
    )

    @jax.jit
    def run(params, inputs):
        if decoder:
            places = jnp.cumsum(inputs["attention_mask"].astype(jnp.int32), axis=1) - 1
            inputs = inputs | {"positions": jnp.maximum(places, 0)}
        _, states = forward(params, inputs)
        return pool(states, inputs["attention_mask"], how)

    def states(params, batch):
        if "segment_ids" in batch:
            raise ValueError(
                "`batch` holds packed texts; tokenise without packing: one text a row"
            )
        inputs = {name: np.asarray(batch[name]) for name in _INPUTS if name in batch}
        return run(params, inputs)

    return states
