"""Meshes over slices of TPUs, which a slower network joins."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def over_slices(
    sizes: Mapping[str, int], allowed: Sequence[str], slices: int, devices: list[Any]
) -> np.ndarray:
    """Arranges the devices of several slices, one axis alone going over all of them.

    Args:
        sizes: of all axes, the outermost first.
        allowed: axes that may, the first choice first.
        slices: how many there are.
        devices: of all slices.

    Returns:
        The devices, in the shape of the mesh.

    Raises:
        ValueError: none of these axes is a multiple of the slices.
    """
    axis = next((name for name in allowed if sizes[name] % slices == 0), None)
    if axis is None:
        raise ValueError(
            f"the devices are {slices} slices, joined by a slower network: "
            f"{' or '.join(f'`{name}`' for name in allowed)} must be a multiple of "
            f"{slices}, got {', '.join(f'{name}={sizes[name]}' for name in allowed)}"
        )
    outer = {name: slices if name == axis else 1 for name in sizes}
    inner = [size // outer[name] for name, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(
        inner,
        tuple(outer.values()),
        devices=devices,
        allow_split_physical_axes=True,  # as jax.make_mesh
    )
