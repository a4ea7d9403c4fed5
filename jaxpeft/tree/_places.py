"""Where the leaves of adapters lie: on the mesh of their kernel."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.tree._lift import leaf_entries
from jaxpeft.tree._node import AdaptedKernel, is_abstract, is_traced


def on_mesh(x) -> NamedSharding | None:
    """How an array lies on a mesh; ``None``: it lies on none, or has no values yet."""
    if is_traced(x) or is_abstract(x):
        return None
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def replicated(sharding: NamedSharding) -> NamedSharding:
    """All of an array on every device of the same mesh."""
    return sharding.update(spec=PartitionSpec())


def gathered(kernel):
    """A kernel in one piece, if it is on an explicit mesh: SVDs have no rule there."""
    if is_abstract(kernel):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kernel)
    where = on_mesh(kernel)
    if where is None or AxisType.Explicit not in where.mesh.axis_types:
        return kernel
    return jax.device_put(kernel, replicated(where))


def leaf_specs(node: AdaptedKernel, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """The spec of each leaf, by name, where its kernel has ``spec``."""
    full = (*spec, *(None,) * (node.base.ndim - len(spec)))
    return {
        name: PartitionSpec(*(None if i is None else full[i] for i in entry))
        for name, entry in leaf_entries(node).items()
    }


def place_like(node: AdaptedKernel, kernel) -> AdaptedKernel:
    """Puts each leaf where its kernel lies, sharded along the same axes."""
    where = on_mesh(kernel)
    if where is None:
        return node
    specs = leaf_specs(node, where.spec)
    return node.map_leaves(lambda n, x: jax.device_put(x, where.update(spec=specs[n])))
