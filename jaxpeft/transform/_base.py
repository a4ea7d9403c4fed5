"""How a contraction reads its base: an array, or codes and scales.

No stack of floats is made of a quantised base. Where its scale is the same along all
that is summed, the codes are contracted and the product is scaled. Where it is not, the
kernel is dequantised inside of the contraction; the backward pass begins again with
the codes, so that a scan over layers keeps codes and no stack of floats.

Compiled for v5e:2x2 (LoRA on all linears of a Llama of 8 layers, 2,048 wide, a row of
1,024 tokens a chip), temporaries of a step in MiB: plain base 217 with full
rematerialisation and 1,275 without; nf4 219 and 1,275; int8 1,282 without.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.numerics import KINDS, Quantised, is_quantised
from jaxpeft.tree import wider

# They hold every code exactly, and no sum of codes is too large for them.
_WIDE = ("bfloat16", "float32", "float64")


def contracted(
    run: Callable[[Any, Any], Any],
    x: Any,
    base: Any,
    summed: Collection[int],
    spread: Callable[[Any], Any],
) -> Any:
    """The model's own contraction of an input with a kernel's base.

    Args:
        run: ``run(x, array)`` computes it.
        x: the input.
        base: an array, or a quantised one; constant for differentiation in that case.
        summed: the base's axes that are summed.
        spread: lays an array with the base's other axes out to broadcast with the
            result.
    """
    if not is_quantised(base):
        return run(x, base)

    # `checkpoint`: what is kept for the backward pass are its arguments, and of the
    # input, which the gradient of a linear function does not need, nothing.
    @jax.checkpoint
    def product(x, base):
        base = lax.stop_gradient(base)
        if not _scales_after(base, summed):
            return run(x, base.dequantise())
        y = run(x, base.codes.astype(base.dtype))
        kept = [n for i, n in enumerate(base.scale.shape) if i not in summed]
        scale = spread(base.scale.reshape(kept))
        wide = wider(y.dtype, scale.dtype)
        return (y.astype(wide) * scale.astype(wide)).astype(y.dtype)

    return product(x, base)


def _scales_after(base: Quantised, summed: Collection[int]) -> bool:
    """Whether each entry of the product has one scale, and codes are their values."""
    if KINDS[base.kind].table is not None or base.dtype.name not in _WIDE:
        return False
    sides = enumerate(zip(base.scale.shape, base.shape, strict=True))
    return all(s == 1 if i in summed else s in (1, n) for i, (s, n) in sides)


def stand_in(base: Any) -> Any:
    """What a model is traced with in the place of a base: an array of its shape."""
    return base.codes.astype(base.dtype) if is_quantised(base) else base


def broadcast(base: Any, shape: Any) -> Any:
    """A base, repeated along axes of size one."""
    return (
        base.broadcast(shape) if is_quantised(base) else jnp.broadcast_to(base, shape)
    )


def along(base: Any, axis: int, f: Callable[[Any, int], Any]) -> Any:
    """``f(array, axis)``, which takes entries along one axis, of a base."""
    return base.along(axis, f) if is_quantised(base) else f(base, axis)


def scaled(base: Any, factor: Any, f: Callable[[Any, Any], Any]) -> Any:
    """A linear ``f(array, factor)`` of a base."""
    return base.scaled(factor, f) if is_quantised(base) else f(base, factor)


def carried(base: Any, f: Callable[[Any], Any]) -> Any:
    """``f``, which changes neither shape nor values, of a base; of codes and scale."""
    if not is_quantised(base):
        return f(base)
    return base.replace(codes=f(base.codes), scale=f(base.scale))


def placed(base: Any, f: Callable[[Any], Any]) -> Any:
    """``f``, which says where an array lies, of a base; a scale follows its codes."""
    return base.replace(codes=f(base.codes)) if is_quantised(base) else f(base)
