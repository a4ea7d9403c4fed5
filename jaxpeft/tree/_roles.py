"""What the axes of a kernel are: said by the user, or by two axes alone."""

from jaxpeft.tree._paths import matrix_words, module_path, resolve_pattern
from jaxpeft.tree._terms import BATCH, IN, OUT


def roles_of(by_path, paths, axes) -> dict[str, tuple[str, ...]]:
    """The roles of the axes of each site."""
    given = {}
    if axes:
        weights = [p for p, x in by_path.items() if getattr(x, "ndim", 0) >= 2]
        given = resolve_pattern("axes", axes, weights)
    roles = {}
    for path in paths:
        shape = by_path[path].shape
        known = getattr(by_path[path], "roles", ())  # of a quantised kernel
        if path not in given and len(known) == len(shape):
            roles[path] = known
            continue
        words = given.get(path, matrix_words(path) if len(shape) == 2 else None)
        if words is None:
            raise ValueError(
                f"site {path!r} has shape {tuple(shape)}, and a parameter tree does "
                "not say what its axes are (a stack of layers? heads?). Three ways "
                f"to tell: axes={{{module_path(path)!r}: 'layer in out'}}; the model's "
                "own, axes=model.axes; or read them off the model, "
                "axes=jaxpeft.infer_axes(fn, params, *example_args)."
            )
        roles[path] = parse_roles(words, path, shape)
    return roles


def parse_roles(words: str, path: str, shape) -> tuple[str, ...]:
    """Reads ``"layer in out"``; checks it against a kernel's shape."""
    if not isinstance(words, str):
        raise ValueError(
            f"`axes` must give a string such as 'layer in out', got {words!r} for "
            f"{path!r}"
        )
    names = words.split()
    roles = tuple(w if w in (IN, OUT) else BATCH for w in names)
    if len(roles) != len(shape) or IN not in roles or OUT not in roles:
        raise ValueError(
            f"`axes` gives {words!r} for {path!r} of shape {tuple(shape)}: it needs "
            f"one word per axis ({len(shape)}), with at least one 'in' and one 'out'"
        )
    return roles
