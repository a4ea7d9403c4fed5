"""Which kind of machine a program is for."""

from typing import Any

import jax

TARGETS = ("cpu", "gpu", "tpu")


def target_of(tree: Any) -> str:
    """Returns the platform that a computation on some arrays is compiled for.

    A program may be compiled on one machine for another (a laptop, for a pod), so the
    arrays are asked, not the host: where they lie; in a trace, the mesh of their
    shardings or the one in context (``jax.set_mesh``). Only where none of these says
    anything is it JAX's default backend.

    Args:
        tree: arrays, concrete or traced, or a tree of them.

    Returns:
        ``"cpu"``, ``"gpu"`` or ``"tpu"``, or another platform's name.

    Example:
        >>> import jax.numpy as jnp
        >>> target_of(jnp.ones(2))
        'cpu'
    """
    for x in jax.tree.leaves(tree):
        if not isinstance(x, jax.Array):
            continue
        if not isinstance(x, jax.core.Tracer):
            return _name(next(iter(x.sharding.device_set)).platform)
        found = _of_mesh(getattr(jax.typeof(x).sharding, "mesh", None))
        if found:
            return found
    return _of_mesh(jax.sharding.get_abstract_mesh()) or _name(jax.default_backend())


def _of_mesh(mesh: Any) -> str | None:
    """The platform of a mesh of abstract devices, where it says which they are."""
    device = getattr(mesh, "abstract_device", None)
    platform = getattr(device, "platform", None)
    return _name(platform) if platform else None


def _name(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
