"""Hidden states of our models, one vector a text and layer, made on the device."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.dimension import pool
from jaxpeft.models._decoder import Decoder
from jaxpeft.transform import adapt

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
    forward = _states_of(model, final)

    @jax.jit
    def run(params, inputs):
        return pool(forward(params, inputs), inputs["attention_mask"], how)

    return lambda params, batch: run(params, _inputs(batch))


def prompt_states(
    model: nn.Module, *, final: str = "post_norm"
) -> Callable[..., tuple[Float[Array, "layers batch d"], Float[Array, "batch asked"]]]:
    """Returns a jitted function: states of prompts' last tokens, and what follows them.

    One forward pass for both. Logits are read out at the last token alone.

    Args:
        model: a decoder of ``models.load``, with ``head="causal_lm"``.
        final: as in ``pooled_states``; here by default as transformers has it.

    Returns:
        ``(params, batch, asked) -> (states [L + 1, batch, d], logits [batch, asked])``
        in float32: of each row the states of its last real token, and the logits of
        the tokens ``asked`` [batch, asked] as the next one. Parameters and batch as in
        ``pooled_states``.

    Raises:
        ValueError: the model writes no text, or ``final`` is unknown; when called, a
            batch of packed texts.

    Example:
        >>> model, params = models.load("smollm2", head="causal_lm")  # doctest: +SKIP
        >>> step = prompt_states(model)  # doctest: +SKIP
        >>> states, logits = step(params, batch, yes_and_no)  # doctest: +SKIP
    """
    if not isinstance(model, Decoder) or model.head != "causal_lm":
        head = getattr(model, "head", None)
        raise ValueError(
            f"`model` must be a decoder with head='causal_lm'; got "
            f"{type(model).__name__} with head={head!r}."
        )
    forward = _states_of(model, final, last=True)
    read_out = adapt(
        lambda params, h: model.apply({"params": params}, h, method="logits")
    )

    @jax.jit
    def run(params, inputs, asked):
        states, normed = forward(params, inputs)
        pooled = pool(states, inputs["attention_mask"], "last")
        last = pool(normed, inputs["attention_mask"], "last").astype(normed.dtype)
        logits = read_out(params, last).astype(jnp.float32)
        return pooled, jnp.take_along_axis(logits, asked, axis=1)

    return lambda params, batch, asked: run(params, _inputs(batch), jnp.asarray(asked))


def _states_of(model: nn.Module, final: str, *, last: bool = False):
    """``(params, inputs) -> states``; with ``last`` also what the head would read."""
    if final not in FINALS:
        raise ValueError(f"`final` must be one of {FINALS}, got {final!r}")
    bare, decoder = model.clone(head=None), isinstance(model, Decoder)
    wanted = "pre_norm" if decoder and final == "pre_norm" else True
    forward = adapt(
        lambda params, inputs: bare.apply(
            {"params": params}, **inputs, deterministic=True, hidden_states=wanted
        )
    )

    def states(params, inputs):
        if decoder:
            places = jnp.cumsum(inputs["attention_mask"].astype(jnp.int32), axis=1) - 1
            inputs = inputs | {"positions": jnp.maximum(places, 0)}
        normed, found = forward(params, inputs)
        return (found, normed) if last else found

    return states


def _inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if "segment_ids" in batch:
        raise ValueError(
            "`batch` holds packed texts; tokenise without packing: one text a row"
        )
    return {name: np.asarray(batch[name]) for name in _INPUTS if name in batch}
