"""What a model does with each axis of its kernels, and with each kernel."""

from collections.abc import Mapping

# What a leaf is used for. Of several uses the first in this order counts.
USES = ("tied", "contracted", "looked up", "added", "other")


class Axes(dict[str, str]):
    """Roles of kernels' axes by path, as ``attach(..., axes=)`` takes them.

    Attributes:
        uses: ``{path: use}`` of every leaf with two axes or more, whether its roles
            are known or not: ``"contracted"`` where it meets an input; ``"tied"`` where
            its rows are picked by numbers, too, as those of an embedding that is also
            the output head; ``"looked up"`` where they are only picked; ``"added"``
            where it is added to something; ``"other"`` for all else.
    """

    def __init__(self, axes: Mapping[str, str], uses: Mapping[str, str]):
        super().__init__(axes)
        self.uses = dict(uses)

    def __or__(self, other: Mapping[str, str]) -> "Axes":
        """With some roles replaced or added, and the same uses."""
        return Axes({**self, **other}, self.uses)


def use_of(axes: Mapping[str, str] | None, path: str) -> str | None:
    """What a leaf is used for, where the axes were read off the model."""
    uses = getattr(axes, "uses", {})
    # A path speaks also where it was read off a whole variable dict.
    return uses.get(path, uses.get(f"params/{path}"))
