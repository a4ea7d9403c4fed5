"""Paths of leaves, and the patterns that name them."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

# A module's own names for its weights: "query" finds "query/kernel".
BIASES = ("bias", "b")
PARAMETERS = ("kernel", "embedding", "embeddings", "weight", "w", "scale", *BIASES)

OUTPUT_HEADS = ("lm_head",)  # modules that predict tokens

Targets = str | Sequence[str] | Callable[[str, Any], bool]


def path_strings(key_paths: Sequence[tuple]) -> list[str]:
    """Joins pytree key paths with "/".

    The ``.value`` of a box (Linen's ``Partitioned``, an NNX variable) is left out: the
    attribute of that name which is its parent's only child.
    """
    children: dict[tuple, set] = {}
    for path in key_paths:
        for i, key in enumerate(path):
            children.setdefault(path[:i], set()).add(key)
    return [_joined(path, children) for path in key_paths]


def _joined(key_path: tuple, children: dict[tuple, set]) -> str:
    names = []
    for i, key in enumerate(key_path):
        match key:
            case jax.tree_util.SequenceKey(idx=index):
                names.append(str(index))
            case jax.tree_util.GetAttrKey(name=name):
                dicts = jax.tree_util.DictKey  # of a node's leaves
                last = all(isinstance(k, dicts) for k in key_path[i + 1 :])
                box = name == "value" and last and len(children[key_path[:i]]) == 1
                if not box:
                    names.append(name)
            case _:
                names.append(str(getattr(key, "key", key)))
    return "/".join(names)


def module_path(path: str) -> str:
    """The path of the module that owns a leaf: without a last ``kernel``, ..."""
    head, _, last = path.rpartition("/")
    return head if head and last in PARAMETERS else path


def matrix_words(path: str) -> str:
    """Roles of a matrix's two axes where nothing else says them.

    An output head's table ``[V, D]`` is used the other way round than a kernel.
    """
    *_, module, last = ("", *path.split("/"))
    is_table = module in OUTPUT_HEADS and last in ("embedding", "embeddings")
    return "out in" if is_table else "in out"


def suffix_match(pattern: str, path: str) -> bool:
    """Whether ``pattern`` is a suffix of ``path`` that starts at a "/"."""
    return path == pattern or path.endswith("/" + pattern)


def names_leaf(pattern: str, path: str) -> bool:
    """Whether a list entry names this leaf or the module that owns it."""
    return suffix_match(pattern, path) or suffix_match(pattern, module_path(path))


def in_module(pattern: str, path: str) -> bool:
    """Whether a list entry names this leaf or any module that it lies in."""
    return f"/{pattern}/" in f"/{path}/"


def pattern_match(pattern: str, path: str) -> bool:
    """Whether a pattern of a mapping (``rank_pattern``, ``axes``) fits a leaf.

    A plain name matches as in ``targets``; anything else is a regular expression
    that must match the whole module path, the whole path, or a suffix of either
    that starts at a "/".
    """
    if names_leaf(pattern, path):
        return True
    expression = compiled(pattern, "pattern")
    wide = re.compile(rf"(.*/)?(?:{expression.pattern})")
    return any(wide.fullmatch(p) for p in (path, module_path(path)))


def compiled(pattern: str, argument: str) -> re.Pattern:
    """Compiles a user's regular expression; says which argument was wrong."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(
            f"`{argument}` {pattern!r} is not a valid regular expression: {e}"
        ) from None


# What families call the same module of a block.
_SAME = (
    ("query", "query_proj", "q_proj", "q", "wq", "q_einsum"),
    ("key", "key_proj", "k_proj", "k", "wk", "kv_einsum"),
    ("value", "value_proj", "v_proj", "v", "wv", "kv_einsum"),
    ("c_attn", "qkv", "qkv_proj", "query_key_value", "in_proj"),
    ("o_proj", "out_proj", "wo", "out", "attention_output", "attn_vec_einsum"),
    ("gate_proj", "gate", "wi_0", "gating_einsum"),
    ("up_proj", "up", "fc1", "c_fc", "intermediate", "wi", "wi_1", "dense_h_to_4h"),
    ("down_proj", "down", "fc2", "output", "linear", "dense_4h_to_h"),
)


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``pattern`` among the paths and their suffixes.

    First those by which other families call the same module; never ``pattern`` itself.
    """
    names: dict[str, None] = {}
    for path in paths:
        for p in (module_path(path), path):
            parts = p.split("/")
            for i in range(len(parts)):
                names["/".join(parts[i:])] = None
                names[parts[i]] = None
    names.pop(pattern, None)
    alike = {n for group in _SAME if pattern in group for n in group}
    near = [name for name in names if name in alike]
    near += difflib.get_close_matches(pattern, names, n=count, cutoff=0.5)
    near = list(dict.fromkeys(near))[:count]
    return near or list(dict.fromkeys(module_path(p) for p in paths))[:count]


def resolve_pattern(
    argument: str, patterns: Mapping[str, Any], paths: Sequence[str]
) -> dict[str, Any]:
    """Gives each path the value of the first pattern that matches it.

    Args:
        argument: the name of the mapping, for errors.
        patterns: values by pattern.
        paths: leaf paths.

    Returns:
        ``{path: value}`` for the paths that some pattern matches.

    Raises:
        ValueError: a pattern matches no path.
    """
    # A pattern that is a leaf's full path is for this leaf alone, though it may be the
    # end of other paths. It may have been read off a variable dict, {"params": ...}.
    exact = {p: k for p in paths for k in (p, f"params/{p}") if k in patterns}
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        hits = [
            p
            for p in paths
            if exact.get(p) == pattern or (p not in exact and pattern_match(pattern, p))
        ]
        if not hits:
            raise ValueError(
                f"`{argument}` entry {pattern!r} matched none of the {len(paths)} "
                f"sites; nearest: {nearest(pattern, paths)}"
            )
        for path in hits:
            found.setdefault(path, value)
    return found
