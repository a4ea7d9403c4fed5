"""Where what is beside a kernel lies, on a mesh that the compiler lays out."""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxpeft.transform._moved import Kernel


def scales_everywhere(w: Kernel) -> Kernel:
    """The kernel with the scales of its input and output whole on every device.

    They are made of the kernel and cut as it is, along axes that cut the rows of what
    they scale, too. Left alone the compiler may then lay out inputs and outputs anew,
    which are a thousand times as large.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or {*mesh.axis_types} != {AxisType.Auto}:
        return w

    def everywhere(x: Any) -> Any:
        return x if x is None else lax.with_sharding_constraint(x, PartitionSpec())

    c, o = map(everywhere, (w.c, w.o))
    return w.replace(factors=dataclasses.replace(w.factors, c=c, o=o))
