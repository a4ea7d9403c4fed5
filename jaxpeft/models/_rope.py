"""Rotary positions: what a config says about them, and their angles.

Features j and j + n/2 of a head turn together ("half-split", as in Hugging Face's
checkpoints), by position times frequency j.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.models._parts import wide

KINDS = ("default", "linear", "llama3")


class Rope(NamedTuple):
    """The rotary positions of one kind of layer.

    Attributes:
      theta: base of the frequencies.
      dims: how many of a head's features turn, from the first on; even.
      rope_type: one of ``KINDS``.
      factor: how many times longer the text may be than in pre-training.
      low: wavelengths above original / low are stretched by ``factor``.
      high: wavelengths below original / high stay.
      original: tokens of a text in pre-training.
    """

    theta: float
    dims: int
    rope_type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original: int = 0


def read_rope(
    raw: Mapping[str, Any], model_type: str, head_dim: int, longest: int
) -> tuple[tuple[str, Rope], ...]:
    """Returns the rotary positions of full and of sliding layers.

    Both spellings are read: ``rope_parameters`` (transformers 5), and ``rope_theta``,
    ``rope_scaling``, ``rope_local_base_freq`` (version 4).

    Args:
      raw: the content of a ``config.json``.
      model_type: its family.
      head_dim: size of a head.
      longest: its ``max_position_embeddings``.

    Raises:
      ValueError: for a type or a fraction of the head that is not implemented.
    """
    given = dict(raw.get("rope_parameters") or {})
    nested = {"full_attention", "sliding_attention"} & set(given)
    if model_type == "gemma3_text":
        full = dict((given.get("full_attention") if nested else given) or {})
        full |= raw.get("rope_scaling") or {}
        local = dict(given.get("sliding_attention") or {})
        full.setdefault("rope_theta", raw.get("rope_theta") or 1e6)
        local.setdefault("rope_theta", raw.get("rope_local_base_freq") or 1e4)
    else:
        if nested:
            raise ValueError(
                "`config` field 'rope_parameters' differs by kind of layer, which is "
                f"not implemented for {model_type!r}."
            )
        full = dict(raw.get("rope_scaling") or given)
        full.setdefault("rope_theta", raw.get("rope_theta") or 1e4)
        if raw.get("partial_rotary_factor") is not None:
            full.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
        local = full
    return tuple(
        (kind, _read_one(values, model_type, head_dim, longest))
        for kind, values in (("full_attention", full), ("sliding_attention", local))
    )


def _read_one(
    values: Mapping[str, Any], model_type: str, head_dim: int, longest: int
) -> Rope:
    rope_type = values.get("rope_type") or values.get("type") or "default"
    if rope_type not in KINDS:
        raise ValueError(
            f"`config` has rope_type {rope_type!r}, which is not implemented; "
            f"known are {list(KINDS)}."
        )
    part = values.get("partial_rotary_factor", 1.0)
    if part != 1.0 and model_type != "phi3":
        raise ValueError(
            f"`config` field 'partial_rotary_factor' is {part!r}, which is not "
            f"implemented for {model_type!r}; only 1.0 is."
        )
    theta, dims = float(values["rope_theta"]), int(head_dim * part)
    if rope_type == "default":
        return Rope(theta, dims)
    if rope_type == "linear":
        return Rope(theta, dims, rope_type, float(values["factor"]))
    return Rope(
        theta,
        dims,
        rope_type,
        float(values["factor"]),
        float(values["low_freq_factor"]),
        float(values["high_freq_factor"]),
        int(values.get("original_max_position_embeddings", longest)),
    )


def frequencies(rope: Rope) -> np.ndarray:
    r"""Returns the frequencies of a head's pairs of features, [dims / 2], float32.

    .. math:: f_j = \theta^{-2j/n}

    Linear scaling divides all of them by the factor. Llama 3.1 divides those whose
    wavelength is above original / low, keeps those below original / high, and
    goes from one to the other linearly in original / wavelength.

    References:
        Su et al., RoFormer, arXiv 2104.09864, section 3.2.2; Chen et al., arXiv
        2306.15595 (linear); Llama Team, arXiv 2407.21783, section 3.2.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    plain = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.rope_type == "default":
        return plain
    stretched = plain / np.float32(rope.factor)
    if rope.rope_type == "linear":
        return stretched
    turns = rope.original * plain / np.float32(2 * math.pi)  # original / wavelength
    share = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    return (share * plain + (1 - share) * stretched).astype(np.float32)


def turns(rope: Rope, positions: Int[Array, "#batch tokens"]) -> tuple[Array, Array]:
    """Returns cosines and sines of every angle, each [batch, tokens, 1, dims / 2]."""
    steps = jnp.asarray(positions, jnp.float32)[:, :, None, None]
    angles = steps * jnp.asarray(frequencies(rope))[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def turn(
    x: Float[Array, "batch tokens heads h"], cosines: Array, sines: Array
) -> Float[Array, "batch tokens heads h"]:
    """Turns the first features of every head; computed in float32 at least."""
    half, dtype = cosines.shape[-1], wide(x.dtype)
    cosines, sines = cosines.astype(dtype), sines.astype(dtype)
    first = x[..., :half].astype(dtype)
    second = x[..., half : 2 * half].astype(dtype)
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    turned = [part.astype(x.dtype) for part in turned]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
