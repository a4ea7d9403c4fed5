"""What happens to a kernel where no rule follows it: an error, or its merged form."""

import dataclasses
import math
import warnings
from typing import Literal

from jaxpeft.transform import _compat
from jaxpeft.transform._moved import Kernel
from jaxpeft.transform._rule import Equation
from jaxpeft.tree import IN, OUT, materialise

_LEAVE_OUT = "leave the site out of `targets` (or name it in `exclude`)"
_BARE = (
    "It is a quantised kernel without an adapter, and jaxpeft.adapt has no rule for "
    "that. Two ways out: leave it out of the `targets` of jaxpeft.quantise, or write "
    'jaxpeft.adapt(fn, unsupported="materialise") to dequantise it there.'
)
_WAYS_OUT = (
    f"jaxpeft.adapt has no rule for that. Two ways out: {_LEAVE_OUT}, or write "
    'jaxpeft.adapt(fn, unsupported="materialise") to form the merged kernel there.'
)
_ONE_WAY_OUT = (
    "Its method depends on the input, so that no merged kernel could be materialised "
    f"there: {_LEAVE_OUT}, or attach a method that can be merged."
)


class UnsupportedError(NotImplementedError):
    """The model does something to an adapted kernel that ``adapt`` has no rule for."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Refuses, or forms merged kernels and warns.

    Attributes:
        unsupported: ``"error"`` or ``"materialise"``.
        ways_out: what the error advises.
        warned: places that were warned about in this call.
    """

    unsupported: Literal["error", "materialise"]
    ways_out: str = _WAYS_OUT
    warned: set = dataclasses.field(default_factory=set)

    def __call__(self, eqn: Equation, operands: list, reason: str) -> list:
        """The results of an equation without a rule, on merged kernels."""
        name, place = eqn.raw.primitive.name, _compat.place(eqn.uses.trail)
        arrays = [
            self.array(x, name, place, reason) if isinstance(x, Kernel) else x
            for x in operands
        ]
        return eqn.results(eqn.run(*arrays))

    def array(self, x: Kernel, primitive: str, place: str, reason: str):
        """The merged kernel where that was asked for; else the error.

        A kernel of which one row or column is left (one row of a table that was looked
        up, say) is as thin as its factors: in whatever follows it is an array.
        """
        one = min(math.prod(x.dims(IN)), math.prod(x.dims(OUT))) == 1
        if one and not x.reads_input:
            return materialise(x)
        what = f"site {x.path!r} reaches `{primitive}` at {place}: {reason}."
        if x.reads_input:
            raise UnsupportedError(f"{what} {_ONE_WAY_OUT}")
        if self.unsupported == "error":
            raise UnsupportedError(f"{what} {_BARE if x.is_bare else self.ways_out}")
        if what not in self.warned:
            self.warned.add(what)
            dropout = "" if x.key is None else ", without its dropout"
            warnings.warn(
                f"{what} Its merged kernel is formed there{dropout}.", stacklevel=2
            )
        return materialise(x)
