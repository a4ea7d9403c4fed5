"""What an adapter does to its kernel.

Merging, weighting, serving, exact cuts and files ask here whether a change is of low
rank, scales, reads the input, and so on.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.numerics import dense
from jaxpeft.tree._adapter import Adapter, Call
from jaxpeft.tree._lift import (
    PROBE,
    from_matrices,
    init_shapes,
    layer_leaves,
    shared_shapes,
    to_matrices,
)
from jaxpeft.tree._node import AdaptedKernel, working_dtype
from jaxpeft.tree._terms import Factors, Term


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of an original kernel ``W``.

    Attributes:
        factors: what is computed beside the kernel that is stored.
        folded: the terms that stand in the stored kernel already.
        reads: the entries of ``Call`` that ``factors`` asks for.
    """

    factors: Factors
    folded: tuple[Term, ...] = ()
    reads: frozenset[str] = dataclasses.field(
        default=frozenset(), metadata={"static": True}
    )

    @property
    def terms(self) -> tuple[Term, ...]:
        """All that is added to ``W``: the whole change, if nothing scales or gates."""
        return (*self.factors.terms, *self.folded)

    @property
    def reads_input(self) -> bool:
        """Whether the change depends on the input, so that no kernel has its effect."""
        return self.factors.reads_input

    @property
    def scales(self) -> bool:
        """Whether inputs or outputs are scaled, so that the change has full rank."""
        return self.factors.c is not None or self.factors.o is not None

    @property
    def only_adds(self) -> bool:
        """Whether the change is a sum of thin products, and nothing else."""
        return not (self.reads_input or self.scales or self.factors.kernel is not None)

    @property
    def drops(self) -> bool:
        """Whether a term drops entries of its input."""
        return any(term.drop for term in self.factors.terms)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that gates weigh, in the order of the gates."""
        gates = (term.gate for term in self.factors.terms if term.gate is not None)
        return sum((gate.names for gate in gates), ())


NO_CALL = Call()


class _Asked:
    """A call with no entries that notes which ones ``factors`` asks for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> None:
        if name not in Call._fields:
            raise AttributeError(f"a call has {', '.join(Call._fields)}, and no {name}")
        self.names.add(name)


def change(
    adapter: Adapter, kernel: Any, frozen: Any, trainable: Any, call: Any = NO_CALL
) -> Change:
    """What a method does to one layer's kernel.

    Args:
        adapter: the method.
        kernel: ``[d_in, d_out]``.
        frozen: one layer's frozen leaves, and those that sites share.
        trainable: one layer's trained leaves.
        call: what the call added.
    """
    folded = () if adapter.folded is None else adapter.folded(frozen)
    return Change(adapter.factors(kernel, frozen, trainable, call), folded)


@functools.cache
def structure(adapter: Adapter, rank: int | None) -> Change:
    """What a method does to any kernel, traced on the shapes of a large one.

    Its arrays are shapes; which terms, scales and gates there are is what counts.

    Args:
        adapter: the method.
        rank: its rank; ``None`` for methods without one.
    """
    dtype, asked = jnp.dtype(jnp.float32), _Asked()
    kernel = jax.ShapeDtypeStruct(PROBE, dtype)
    frozen, trainable = init_shapes(adapter, *PROBE, rank, dtype)
    frozen = frozen | shared_shapes(adapter, rank)
    made = lambda *arrays: change(adapter, *arrays, asked)
    found = jax.eval_shape(made, kernel, frozen, trainable)
    return dataclasses.replace(found, reads=frozenset(asked.names))


def structure_of(node: AdaptedKernel) -> Change:
    """What a site's method does to its kernel, whatever values its leaves have."""
    return structure(node.adapter, node.site.rank)


def refolded(node: AdaptedKernel, sign: float = 1.0):
    """The site's kernel with its folded terms added, or with -1 taken off.

    Computed in float32 (float64 over float64), and not cast back.
    """
    kernel = dense(to_matrices(node.base, node.roles), working_dtype(node.base.dtype))
    folded = node.adapter.folded
    # Leaves that sites share are not handed to it: `folded` reads a layer's own.
    for term in () if folded is None else jax.vmap(folded)(layer_leaves(node)[0]):
        product = jnp.matmul(term.a, term.b, precision="highest").astype(kernel.dtype)
        kernel = kernel + jnp.asarray(sign, kernel.dtype) * product
    return from_matrices(kernel, node.base.shape, node.roles)
