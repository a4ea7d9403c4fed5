"""A check for NaN and infinities in kernels, before anything is made of them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tree._lift import axes_of
from jaxpeft.tree._node import is_abstract, is_traced
from jaxpeft.tree._paths import module_path
from jaxpeft.tree._places import on_mesh, replicated
from jaxpeft.tree._terms import BATCH


def check_finite(kernels: Mapping[str, Any], roles: Mapping[str, tuple]) -> None:
    """Raises if a kernel holds NaN or an infinity.

    One reduction a kernel, where it lies, whose results alone come to the host.

    Args:
        kernels: by path. Those without values, traced ones and shapes, are passed over.
        roles: of their axes, by path.

    Raises:
        ValueError: with the paths, and of a stack its layers.
    """
    with jax.ensure_compile_time_eval():  # in a trace, too, kernels may have values
        found = {
            # Of a quantised kernel the scales: codes are always finite.
            path: _finite(getattr(kernel, "scale", kernel), axes_of(roles[path], BATCH))
            for path, kernel in kernels.items()
            if not (is_abstract(kernel) or is_traced(kernel))
        }
    bad = {path: x for path, x in jax.device_get(found).items() if not np.all(x)}
    if bad:
        places = "; ".join(_place(path, each) for path, each in bad.items())
        raise ValueError(
            "`params` holds NaN or infinite values, of which an adapter would make "
            f"others, at: {places}. Load the weights again, or leave these "
            f"sites out with exclude={[module_path(path) for path in bad]!r}."
        )


def _place(path: str, finite: np.ndarray) -> str:
    layers = np.argwhere(~finite)
    layers = (layers[:, 0] if finite.ndim == 1 else layers).tolist()
    return f"{path!r}" + f", layers {layers}" * bool(finite.ndim)


def _finite(kernel, batch: tuple[int, ...]):
    """Whether each layer is finite, ``[*batch]``, on every device and process."""
    where = on_mesh(kernel)
    return _reduction(where and replicated(where))(kernel, batch)


@functools.cache
def _reduction(where):
    def finite(kernel, batch):
        rest = tuple(i for i in range(kernel.ndim) if i not in batch)
        return jnp.all(jnp.isfinite(kernel), rest)

    return jax.jit(finite, static_argnums=1, out_shardings=where)
