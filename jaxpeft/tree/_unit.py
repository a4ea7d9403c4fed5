"""The scale that a method makes of alpha, and the alpha that a scale comes from."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree._adapter import Adapter


def is_scale(name: str) -> bool:
    """Whether a frozen leaf is proportional to alpha, by its name."""
    return name.startswith("scale")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scales(adapter: Adapter, rank: int, alphas):
    """The leaves that are proportional to alpha, for several alphas."""

    def one(alpha):
        # Larger than the rank, and of a size that blocks and groups divide.
        kernel = jnp.eye(math.lcm(2 * rank, 48), dtype=alphas.dtype)
        frozen, _ = adapter.init(jax.random.key(0), kernel, rank, alpha)
        return {name: x for name, x in frozen.items() if is_scale(name)}

    return jax.lax.map(one, alphas)


@functools.cache
def unit_scale(adapter: Adapter, rank: int, leaf: str = "scale") -> float:
    """The scale that a method makes of alpha 1; 1 without one, 0 at rank 0."""
    if not rank:
        return 0.0
    with jax.ensure_compile_time_eval():
        found = _scales(adapter, rank, np.ones(1, np.float32))
        return float(found[leaf][0]) if leaf in found else 1.0


def alpha_of(adapter: Adapter, rank: int, scale: np.floating) -> float:
    """The shortest decimal from which a method makes this scale, but for rounding.

    A compiler may divide by a constant in more than one way, such as by multiplying.
    """
    if not np.isfinite(scale):
        return float(scale)
    about = float(scale) / unit_scale(adapter, rank)
    # From few digits to many; 17 give every float64 back.
    tries = [float(f"{about:.{digits}g}") for digits in range(1, 18)]
    with jax.ensure_compile_time_eval():
        scales = _scales(adapter, rank, np.asarray(tries, scale.dtype))["scale"]
        given = np.asarray(scales)
    near = np.abs(given - scale) <= 2 * np.spacing(np.abs(scale))
    fits = [x for x, it_is in zip(tries, near, strict=True) if it_is]
    return fits[0] if fits else about  # a scale that no alpha gives, say an average
