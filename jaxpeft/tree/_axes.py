"""What a model does with each axis of its kernels, and with each kernel."""

from collections.abc import Mapping

# What a leaf is used for. If a model uses it in several ways, the first here counts.
USES = ("tied", "contracted", "looked up", "added", "other")


class Axes(dict[str, str]):
    """Roles of kernels' axes by path, as ``attach(..., axes=)`` takes them.

    Attributes:
        uses: ``{path: use}`` of every leaf with two axes or more, whether its roles
            are known or not. ``"contracted"``: the model multiplies an input with it.
            ``"looked up"``: the model picks entries of it by number. ``"tied"``: both,
            as with an embedding that is also the output head. ``"added"``: it is added
            to something. ``"other"``: all else.
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
    # The uses may have been read off a whole variable dict, {"params": ...}.
    return uses.get(path, uses.get(f"params/{path}"))
