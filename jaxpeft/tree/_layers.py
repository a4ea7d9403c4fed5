"""Which layer a site is, for methods whose layers differ."""

import re

from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._lift import layer_methods, matrix_shape
from jaxpeft.tree._terms import BATCH


def site_methods(adapter: Adapter, by_path, roles) -> dict[str, Adapter]:
    """Returns each site's method.

    Args:
        adapter: what is attached.
        by_path: the leaves of the tree, by path.
        roles: the roles of the axes of each chosen site.

    Returns:
        ``{path: method}``: the adapter; where its layers differ and the site is not
        stacked, that of the layer whose number the path holds.

    Raises:
        ValueError: the layers of a site are not known, or do not divide as the
            adapter says.
    """
    methods = dict.fromkeys(roles, adapter)
    if adapter.where.layers is None:
        return methods
    for path, site_roles in roles.items():
        try:
            if BATCH in site_roles:
                layers = matrix_shape(by_path[path].shape, site_roles)[0]
                layer_methods(adapter, layers)
            else:
                number, layers = _layer_number(path, by_path)
                methods[path] = layer_methods(adapter, layers)[number]
        except ValueError as e:
            raise ValueError(f"site {path!r}: {e}") from e
    return methods


def _layer_number(path: str, paths) -> tuple[int, int]:
    """``(number of the layer, number of layers)``: the first number in a path."""
    found = re.search(r"(?<![^/_])\d+(?=/|$)", path)
    if found is None:
        raise ValueError(
            "its layers are to differ, but it is not stacked and its path has no "
            "number of a layer; give all of them one value, or attach to each group "
            "of layers in a call of its own"
        )
    before, after = path[: found.start()], path[found.end() :]
    like = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    numbers = [int(m[1]) for m in map(like.fullmatch, paths) if m]
    return int(found[0]), max(numbers) + 1
