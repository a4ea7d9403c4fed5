"""Checks of the arguments of constructors; each error shows the call to write."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# What alpha is divided by, from the rank.
SCALINGS = {"alpha/r": lambda r: r, "alpha/sqrt_r": math.sqrt}


def check_options(
    name: str,
    *,
    rank: Any = 1,
    alpha: Any = None,
    dropout: Any = 0.0,
    counts: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    positive: Mapping[str, Any] | None = None,
    choices: Mapping[str, tuple[Any, Iterable[Any]]] | None = None,
) -> None:
    """Raises unless the arguments of a constructor are allowed.

    Args:
        name: the constructor's, for the call that an error shows.
        rank: a whole number from 1 up.
        alpha: a positive number, or ``None``.
        dropout: a probability in [0, 1).
        counts: ``{argument: value}`` of whole numbers from 1 up.
        weights: ``{argument: value}`` of weights of penalties, at least 0.
        positive: ``{argument: value}`` of numbers above 0.
        choices: ``{argument: (value, allowed values)}``.

    Raises:
        ValueError: a value outside of what is allowed.

    Example:
        >>> check_options("lora", rank=8, alpha=16, dropout=0.1)
        >>> check_options("lora", rank=0)
        Traceback (most recent call last):
        ...
        ValueError: `rank` must be a whole number from 1 up, got 0; write lora(rank=8).
    """
    for argument, (value, allowed) in (choices or {}).items():
        if value not in (allowed := tuple(allowed)):
            raise ValueError(
                f"`{argument}` must be one of {', '.join(map(str, allowed))}, got "
                f"{value!r}."
            )
    for argument, value in {"rank": rank, **(counts or {})}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"`{argument}` must be a whole number from 1 up, got {value!r}; "
                f"write {name}({argument}=8)."
            )
    if alpha is not None and not (_is_finite(alpha) and alpha > 0):
        raise ValueError(
            f"`alpha` must be positive, got {alpha!r}; write {name}(alpha={2 * rank})."
        )
    for argument, value in (weights or {}).items():
        if not (_is_finite(value) and value >= 0):
            raise ValueError(
                f"`{argument}` must be at least 0, got {value!r}; write "
                f"{name}({argument}=0) to leave the term out."
            )
    for argument, value in (positive or {}).items():
        if not (_is_finite(value) and value > 0):
            raise ValueError(f"`{argument}` of {name} must be positive, got {value!r}.")
    if not (_is_finite(dropout) and 0 <= dropout < 1):
        raise ValueError(
            f"`dropout` must be in [0, 1), got {dropout!r}; write {name}(dropout=0.1)."
        )


def _is_finite(value: Any) -> bool:
    """Whether a value is a plain number that is neither NaN nor infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_site_rank(rank: int, shape: tuple[int, int], most: int | None = None) -> None:
    """Raises unless a kernel ``[d_in, d_out]`` has room for ``rank`` components.

    Args:
        rank: the site's.
        shape: the kernel's.
        most: the largest rank that is possible; ``None`` means ``min(shape)``.

    Raises:
        ValueError: it has no room; ``attach`` adds the site's name.
    """
    k = min(shape)
    most = k if most is None else most
    if not 1 <= rank <= most:
        bound = f"at most {k}" if most == k else f"below {k}"
        raise ValueError(
            f"`rank` must be at least 1 and {bound}, the smaller side of the "
            f"kernel {list(shape)}, got {rank}; give this site another with "
            "rank_pattern, or leave it out with exclude."
        )


def scale_leaf(alpha: Any, rank: int, scaling: str, dtype: Any) -> jax.Array:
    """The scale of a low-rank part, ``alpha / r`` or ``alpha / sqrt(r)``, a scalar."""
    return jnp.asarray(alpha / SCALINGS[scaling](rank), dtype)
