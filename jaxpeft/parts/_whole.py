"""Leaves that are trained themselves."""

from typing import Literal

from jaxpeft.tree import Adapter, Factors, Where


def whole_leaf(leaves: Literal["any", "bias"]) -> Adapter:
    """Returns the adapter that trains a copy of the leaf in its place.

    Args:
        leaves: which leaves it sits on, see ``Where.leaf``.

    Returns:
        An ``Adapter`` with one trainable leaf ``value`` of the leaf's own shape.
    """

    def init(key, kernel, rank, alpha):
        del key, rank, alpha
        return {}, {"value": kernel}

    def factors(kernel, frozen, trainable, call):
        del kernel, frozen, call
        return Factors(kernel=trainable["value"])

    return Adapter(init=init, factors=factors, where=Where(leaf=leaves))
