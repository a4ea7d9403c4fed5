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

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class Rope(NamedTuple):
    """The rotary positions of one kind of layer.

    Attributes:
      theta: base of the frequencies.
      dims: how many of a head's features turn, from the first on; even.
      rope_type: one of ``KINDS``.
      factor: how many times longer the text may be than in pre-training.
      low: features that turn less often than this over a text of ``original`` tokens
        are stretched by ``factor``.
      high: those that turn more often than this stay.
      original: tokens of a text in pre-training.
      amplitude: what cosines and sines are multiplied by.
      truncate: whether YaRN's bounds are whole features.
      short: LongRoPE's divisor of every frequency, up to ``original`` tokens.
      long: the same beyond.
    """

    theta: float
    dims: int
    rope_type: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original: int = 0
    amplitude: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


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
    original = raw.get("original_max_position_embeddings")
    if original is None and model_type == "phi3":
        original = 4096
    if model_type == "gemma3_text":
        original = None  # its class looks for it among the others only
    return tuple(
        (kind, _read_one(values, model_type, head_dim, longest, original))
        for kind, values in (("full_attention", full), ("sliding_attention", local))
    )


def _read_one(
    values: Mapping[str, Any],
    model_type: str,
    head_dim: int,
    longest: int,
    original: int | None,
) -> Rope:
    rope_type = values.get("rope_type") or values.get("type") or "default"
    if model_type == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # as its early files call it
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
    plain = Rope(float(values["rope_theta"]), int(head_dim * part), rope_type)
    if rope_type == "default":
        return plain
    if original is None:
        original = values.get("original_max_position_embeddings") or longest
    if rope_type == "dynamic":
        original = longest
    plain = plain._replace(original=int(original))
    if rope_type == "longrope":
        return _read_longrope(values, plain, longest)
    factor = values.get("factor")
    if factor is None and rope_type == "yarn":
        factor = longest / original
    plain = plain._replace(factor=_number(values | {"factor": factor}, "factor"))
    if rope_type == "llama3":
        low, high = (_number(values, f"{end}_freq_factor") for end in ("low", "high"))
        return plain._replace(low=low, high=high)
    if rope_type == "yarn":
        return plain._replace(
            low=float(values.get("beta_slow") or 1),
            high=float(values.get("beta_fast") or 32),
            amplitude=_yarn_amplitude(values, plain.factor),
            truncate=bool(values.get("truncate", True)),
        )
    return plain if rope_type == "dynamic" else plain._replace(original=0)


def _number(values: Mapping[str, Any], name: str) -> float:
    if not isinstance(values.get(name), int | float):
        raise ValueError(
            f"`config` has rope_type {values.get('rope_type') or values.get('type')!r} "
            f"with {name!r} {values.get(name)!r}; write a number."
        )
    return float(values[name])


def _read_longrope(values: Mapping[str, Any], plain: Rope, longest: int) -> Rope:
    pairs, lists = plain.dims // 2, []
    for name in ("short_factor", "long_factor"):
        given = values.get(name)
        if not isinstance(given, list | tuple) or len(given) != pairs:
            raise ValueError(
                f"`config` has rope_type 'longrope' with {name!r} {given!r}; write a "
                f"list of {pairs} numbers, one for each pair of features."
            )
        lists.append(tuple(map(float, given)))
    factor, amplitude = values.get("factor"), values.get("attention_factor")
    factor = longest / plain.original if factor is None else float(factor)
    if amplitude is None:
        log = math.log(factor) / math.log(plain.original) if factor > 1 else 0.0
        amplitude = math.sqrt(1 + log)
    short, long = lists
    return plain._replace(
        factor=factor, amplitude=float(amplitude), short=short, long=long
    )


def _yarn_amplitude(values: Mapping[str, Any], factor: float) -> float:
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    above, below = values.get("mscale"), values.get("mscale_all_dim")
    if above and below:  # as DeepSeek writes it
        return (1 + above * log) / (1 + below * log)
    return 1 + log


def frequencies(rope: Rope, beyond: bool = False) -> np.ndarray:
    r"""Returns the frequencies of a head's pairs of features, [dims / 2], float32.

    .. math:: f_j = \theta^{-2j/n}

    Linear scaling divides all of them by the factor s. Llama 3.1 and YaRN divide those
    that turn less than ``low`` times in the original length, keep those that turn more
    than ``high`` times, and go from one to the other linearly, Llama in the number of
    turns, YaRN in j. LongRoPE has a divisor of its own for each, and others for texts
    beyond the original length. Dynamic scaling (``turns``) changes none up to there.

    Args:
      rope: what ``read_rope`` returned.
      beyond: whether the text is longer than the original length.

    References:
        Su et al., RoFormer, arXiv 2104.09864, section 3.2.2; Chen et al., arXiv
        2306.15595 (linear); Peng et al., YaRN, arXiv 2309.00071, sections 3.2 and
        3.3; Ding et al., LongRoPE, arXiv 2402.13753, section 3.2; Llama Team, arXiv
        2407.21783, section 3.2.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    plain = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.rope_type in ("default", "dynamic"):
        return plain
    if rope.rope_type == "longrope":
        divisors = rope.long if beyond else rope.short
        return plain / np.asarray(divisors, np.float32)
    stretched = plain / np.float32(rope.factor)
    if rope.rope_type == "linear":
        return stretched
    if rope.rope_type == "yarn":
        share = _yarn_share(rope)
    else:
        turns = rope.original * plain / np.float32(2 * math.pi)  # original / wavelength
        share = np.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    return (share * plain + (1 - share) * stretched).astype(np.float32)


def _yarn_share(rope: Rope) -> np.ndarray:
    """How much of each plain frequency stays: 1 at the first pairs, 0 at the last."""

    def pair(turns: float) -> float:  # the one that turns so often
        wavelength = rope.original / turns
        return (
            rope.dims
            * math.log(wavelength / (2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    first, last = pair(rope.high), pair(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    width = last - first or 1e-3
    places = np.arange(rope.dims // 2, dtype=np.float32)
    return 1 - np.clip((places - first) / width, 0, 1)


def grows(rope: Rope) -> bool:
    """Whether a text longer than the original length has other frequencies."""
    return rope.rope_type in ("dynamic", "longrope")


def turns(rope: Rope, positions: Int[Array, "#batch tokens"]) -> tuple[Array, Array]:
    r"""Returns cosines and sines of every angle, each [batch, tokens, 1, dims / 2].

    LongRoPE and dynamic scaling by a factor s look at the length N of the text: of
    the longest in the batch, as in transformers, the last of all ``positions`` and
    one. Above the original length M, dynamic scaling has another base:

    .. math:: \theta' = \theta\, (s N / M - s + 1)^{n / (n - 2)}

    References:
        Peng et al., YaRN, arXiv 2309.00071, appendix B.2 (dynamic scaling).
    """
    steps = jnp.asarray(positions, jnp.float32)[:, :, None, None]
    rates = jnp.asarray(frequencies(rope))
    if grows(rope):
        rates = _rates(rope, jnp.max(positions) + 1)
    angles = steps * rates[None, None, None]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    if rope.amplitude == 1:
        return cosines, sines
    return rope.amplitude * cosines, rope.amplitude * sines


def _rates(rope: Rope, tokens: Int[Array, ""]) -> Float[Array, " pairs"]:
    """``frequencies`` at a length that is known when the program runs."""
    if rope.rope_type == "longrope":
        short, long = (frequencies(rope, beyond) for beyond in (False, True))
        return jnp.where(tokens > rope.original, long, short)
    longer = jnp.maximum(tokens.astype(jnp.float32) / rope.original, 1.0)
    stretch = rope.factor * longer - (rope.factor - 1)
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    power = exponents * np.float32(rope.dims / (rope.dims - 2))
    return frequencies(rope) * stretch**-power


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
