"""Biases that a kernel's adapter scales as well: ``(x W + bias) o``."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.tree._lift import lifted_factors
from jaxpeft.tree._node import AdaptedKernel, is_node, leaves_with_path, wider
from jaxpeft.tree._paths import BIASES, module_path


def scaled_biases(tree: Any) -> dict[str, AdaptedKernel]:
    """Finds the biases that a kernel's adapter scales.

    Args:
        tree: any pytree with adapted kernels.

    Returns:
        ``{path of the bias: the kernel's node}``.

    Raises:
        ValueError: such a bias has not the shape of the kernel's output.
    """
    by_path, found = dict(leaves_with_path(tree)), {}
    for path, node in by_path.items():
        if not is_node(node) or node.adapter.where.bias != "scaled":
            continue
        module = module_path(path)
        beside = [f"{module}/{name}" for name in BIASES if module != path]
        for bias in (p for p in beside if p in by_path and p != path):
            scale = jax.eval_shape(lifted_factors, node).o
            if scale is None:
                continue
            if tuple(by_path[bias].shape) != scale.shape:
                raise ValueError(
                    f"{node.adapter.name!r} at site {path!r} scales the bias beside "
                    f"it, but {bias!r} has shape {tuple(by_path[bias].shape)} and the "
                    f"kernel's output {scale.shape}; leave the site out with `exclude`"
                )
            found[bias] = node
    return found


def scale_bias(bias, node: AdaptedKernel):
    """A bias times its kernel's output scale, in the bias's dtype."""
    scale = lifted_factors(node).o
    wide = wider(bias.dtype, scale.dtype)
    return (jnp.asarray(bias).astype(wide) * scale.astype(wide)).astype(bias.dtype)
