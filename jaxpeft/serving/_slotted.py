"""Kernels with slots: many adapters beside one kernel, a different one for each row.

The pairs of all adapters lie in slots of fixed size. Slot 0 stands for the base alone.
"""

import jax
import jax.numpy as jnp

from jaxpeft.transform import in_slots
from jaxpeft.tree import Adapter, Factors, Rows, Term, Where, cached

WAYS = ("gather", "ragged")  # to compute what each row adds, see ``Rows``


@cached
def slotted(slots: int, rank: int, how: str, dtype: str | None = None) -> Adapter:
    """Returns the method of a kernel with slots: all of them empty, none trained.

    Args:
        slots: S, with slot 0, which stands for the base alone.
        rank: r, the most that an adapter may have.
        how: one of ``WAYS``, or ``"taken"``, with a slot for each row.
        dtype: of the pairs; ``None``: the working dtype of the kernel.

    Returns:
        An ``Adapter`` with the frozen leaves of a term with ``Rows``; what each row of
        a batch takes comes with the call.
    """

    def init(key, kernel, rank, alpha):
        del key, alpha
        d_in, d_out = kernel.shape
        own = kernel.dtype if dtype is None else dtype
        return {
            "a": jnp.zeros((slots, d_in, rank), own),
            "b": jnp.zeros((slots, rank, d_out), own),
            "scale": jnp.zeros((slots,), kernel.dtype),
        }, {}

    def factors(kernel, frozen, trainable, call):
        del kernel, trainable
        unknown = jnp.zeros((0,), jnp.int32)  # what each row takes has not been said
        rows = Rows(unknown if call.rows is None else call.rows, frozen["scale"], how)
        return Factors((Term(frozen["a"], frozen["b"], rows=rows),))

    return Adapter(init=init, factors=factors, where=Where(rank=rank))


def is_slotted(node) -> bool:
    """Whether an adapted kernel has slots."""
    return node.adapter.name == slotted.__name__


def is_taken(node) -> bool:
    """Whether a node with slots holds one for each row of a batch."""
    return node.adapter.options["how"] == "taken"


@jax.jit
def take_rows(node, index: jax.Array):
    """The node with each row's own pair in place of the slots."""
    frozen, axis = node.frozen, node.frozen["scale"].ndim - 1
    taken = {name: jnp.take(frozen[name], index, axis, mode="clip") for name in "ab"}
    own = lambda scale: in_slots(scale, index)[1]
    taken["scale"] = jnp.apply_along_axis(own, axis, frozen["scale"])
    options = dict(node.adapter.options) | {"slots": index.shape[0], "how": "taken"}
    return node.replace(adapter=slotted(**options), frozen=frozen | taken)
