"""Leaves that are trained themselves."""

from typing import Literal

from jaxpeft.parts._peft import PeftForm
from jaxpeft.tree import Adapter, Factors


def whole_leaf(leaves: Literal["any", "bias"]) -> Adapter:
    """Returns the adapter that trains a copy of the leaf in its place.

    Args:
        leaves: which leaves it sits on, see ``Adapter``.

    Returns:
        An ``Adapter`` with one trainable leaf ``value`` of the leaf's own shape.
    """

    def init(key, kernel, rank, alpha):
        del key, rank, alpha
        return {}, {"value": kernel}

    def factors(kernel, frozen, trainable):
        del kernel, frozen
        return Factors(kernel=trainable["value"])

    return Adapter(init=init, factors=factors, leaves=leaves, peft=PeftForm(whole=True))
