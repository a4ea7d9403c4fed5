"""Messages about many sites: each cause once, with how many and a few examples."""

import re
from collections.abc import Iterable

FEW = 6  # of one cause stand by themselves; of more, the first
SHOWN = 3
# A site, a leaf or a tensor: words joined by "/" or ".", in quotes or not.
_NAME = re.compile(r"'?[\w-]+(?:[./][\w-]+)+'?")


def grouped(problems: Iterable[str], indent: int = 2) -> str:
    """Returns lines that differ in the names of sites alone as one line a cause.

    Args:
        problems: a line each; the first name in it is where it occurs.
        indent: spaces before every line but the first.

    Returns:
        Indented lines, joined. A few of a cause stand by themselves.

    Example:
        >>> grouped(f"missing: 'layer_{i}/a'" for i in range(24))
        "missing: 'layer_0/a' (and 23 more: 'layer_1/a', 'layer_2/a', ...)"
    """
    causes: dict[str, list[str]] = {}
    for line in dict.fromkeys(problems):
        causes.setdefault(_NAME.sub("", line), []).append(line)
    found = []
    for lines in causes.values():
        if len(lines) <= FEW:
            found += lines
            continue
        places = [_NAME.search(line) for line in lines[1:SHOWN]]
        others = ", ".join(place[0] for place in places if place)
        found.append(f"{lines[0]} (and {len(lines) - 1} more: {others}, ...)")
    return f"\n{' ' * indent}".join(found)


def some(names: Iterable[str]) -> str:
    """Returns the first names of a list, and how many more there are.

    Example:
        >>> some(["a", "b"]), some("abcdef")
        ("'a', 'b'", "'a', 'b', 'c' and 3 more")
    """
    every = list(names)
    shown = ", ".join(map(repr, every[:SHOWN]))
    return shown + f" and {len(every) - SHOWN} more" * (len(every) > SHOWN)
