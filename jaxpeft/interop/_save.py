"""Writing adapters to a folder: what sits where, and its arrays. No base weights."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxpeft.interop._card import CARD, adapter_card, may_write
from jaxpeft.interop._format import (
    CONFIG,
    DIGEST,
    FORMAT,
    TENSORS,
    VERSION,
    digest,
    version,
)
from jaxpeft.interop._tensors import is_finite, on_host, write_tensors
from jaxpeft.numerics import checksum, is_quantised, projection
from jaxpeft.tree import (
    DEFAULT,
    AdaptedKernel,
    alphas_of,
    is_named,
    leaves_with_path,
    methods,
    options_of,
    parts_of,
    shared_names,
)


def save_adapter(
    adapted: PyTree,
    folder: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> Path:
    """Writes the adapters of a tree, without its base, to a folder.

    ``adapter.json`` (methods with all their options; for each site its
    path, axis roles, ranks, alphas and a fingerprint of its base kernel; the SHA-256 of
    the other file) and ``adapter.safetensors`` (every frozen and trained leaf, under
    ``path/of/kernel/leaf``, bit for bit), and a card for people, ``README.md``.
    Dropout keys are not saved. A new folder appears whole or not at all.

    Args:
        adapted: a tree made by ``attach``.
        folder: a new or an empty folder.
        metadata: anything JSON can hold, kept in the file for people to read; see
            ``adapter_info``.
        overwrite: allow a folder with files in it. Only these files are replaced;
            others are left as they are, and so is a card that is not ours.
        name: of the adapter to save, where kernels have several; ``None``: all of them.

    Returns:
        The folder. With several processes all must call this; the first one writes.

    Raises:
        ValueError: the tree has no adapters, a method is not one of
            ``jaxpeft.adapters``, a leaf is not finite, or ``metadata`` is not JSON.
        FileExistsError: the folder has files in it and ``overwrite`` is not set.

    Example:
        >>> import jax, tempfile, jaxpeft as jp
        >>> from jaxpeft import interop
        >>> params = {"query": {"kernel": jax.numpy.ones((4, 6))}}
        >>> adapted = jp.attach(params, jp.lora(2), ["query"], key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     folder = save_adapter(adapted, folder)
        ...     again = interop.load_adapter(folder, params)
        >>> jax.tree.structure(again) == jax.tree.structure(adapted)
        True
    """
    folder = Path(folder)
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not overwrite
    ):
        raise FileExistsError(
            f"`folder` {str(folder)!r} exists and is not empty; choose another, or "
            "write save_adapter(adapted, folder, overwrite=True) to replace the "
            "adapter in it."
        )
    parts = [p for p in _parts(adapted) if name in (None, p[0])]
    called, sites = [n for n, _ in parts], [node for _, node in parts]
    if not sites:
        raise ValueError(
            f"`adapted` has no adapter{'s' if name is None else f' {name!r}'}; save a "
            "tree that jaxpeft.attach made, before merge or detach."
        )
    entries = _method_entries(sites)
    methods = [e for i, e in enumerate(entries) if e not in entries[:i]]
    tensors, shared = _tensors(parts)
    if bad := [name for name, leaf in tensors.items() if not is_finite(leaf)]:
        raise ValueError(
            f"`adapted` has leaves that are not finite, {bad}; nothing was written. "
            "Go back to the last step whose loss was finite."
        )
    config = {
        "format": FORMAT,
        "version": VERSION,
        "id": uuid.uuid4().hex,  # the same in both files
        "jaxpeft": version(),
        "methods": methods,
        "sites": [
            _site_entry(n, node, methods.index(entry), shared)
            for n, node, entry in zip(called, sites, entries, strict=True)
        ],
        "metadata": dict(metadata or {}),
    }
    try:
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"`metadata` must be what JSON can hold: {e}") from e
    if jax.process_index() == 0:
        _write(folder, config, tensors, adapter_card(sites, config["metadata"]))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jaxpeft.save_adapter")
    return folder


def _parts(tree: PyTree) -> Iterator[tuple[str, AdaptedKernel]]:
    for _, leaf in leaves_with_path(tree):
        if isinstance(leaf, AdaptedKernel):
            yield from parts_of(leaf).items()


def leaf_name(name: str, leaf: str) -> str:
    """What a leaf of the adapter of a name is called in the file."""
    return leaf if name == DEFAULT else f"{name}:{leaf}"


def _tensors(parts: list[tuple[str, AdaptedKernel]]):
    """What goes into the file; a leaf that sites have in common goes there once.

    Returns:
        ``({name in the file: array}, {(name, path): {shared leaf: its array's}})``.
    """
    tensors: dict[str, np.ndarray] = {}
    shared: dict[tuple[str, str], dict[str, str]] = {}
    seen: dict[tuple[str, int], str] = {}
    for called, node in parts:
        common, numbers = shared_names(node.adapter), node.adapter.options.numbers
        for name, leaf in {**node.frozen, **node.trainable}.items():
            if name in numbers:
                continue
            if name not in common:
                own = leaf_name(called, name)
                tensors[f"{node.site.path}/{own}"] = on_host(leaf)
                continue
            if (name, id(leaf)) not in seen:
                seen[name, id(leaf)] = _common(tensors, name, on_host(leaf))
            own = shared.setdefault((called, node.site.path), {})
            own[name] = seen[name, id(leaf)]
    return tensors, shared


def _common(tensors: dict[str, np.ndarray], name: str, leaf: np.ndarray) -> str:
    """Adds a shared leaf unless an equal one is there; returns its name."""
    i = 0
    while f"shared.{i}/{name}" in tensors:
        if np.array_equal(tensors[f"shared.{i}/{name}"], leaf):
            break
        i += 1
    tensors[f"shared.{i}/{name}"] = leaf
    return f"shared.{i}/{name}"


def _method_entries(sites: list[AdaptedKernel]) -> list[dict[str, Any]]:
    """Each site's method, whose alpha is that of one of its sites."""
    entries = [_method_entry(node) for node in sites]
    alphas = [alphas_of(node) or () for node in sites]
    kinds = [entry["options"] | {"alpha": None, "": entry["name"]} for entry in entries]
    for node, entry, kind in zip(sites, entries, kinds, strict=True):
        found = zip(alphas, kinds, strict=True)
        there = [x for each, other in found if other == kind for x in each]
        if there and node.adapter.where.alpha not in there:
            entry["options"]["alpha"] = max(there)
    return entries


def _method_entry(node: AdaptedKernel) -> dict[str, Any]:
    adapter = node.adapter
    if not is_named(adapter):
        raise ValueError(
            f"the method {adapter!r} could not be loaded again: it is not what a known "
            f"method of its name returns; there are {', '.join(methods())}. Decorate "
            "its constructor with @jaxpeft.tree.method"
        )
    told = set(adapter.options.drawn) - set(adapter.options.numbers)
    options = {n: v for n, v in options_of(node).items() if n not in told}
    return {"name": adapter.name, "options": options}


def _site_entry(name: str, node: AdaptedKernel, method: int, shared) -> dict[str, Any]:
    site = node.site
    common = shared.get((name, site.path), {})
    numbers = set(node.adapter.options.numbers)  # which are among the options
    base = {"shape": list(node.base.shape), "dtype": node.base.dtype.name}
    if is_quantised(node.base):
        base["quantised"] = node.base.kind
    if node.adapter.folded is None:
        base["checksum"] = checksum(node.base)
    else:
        base["projection"], base["norm"] = projection(node.base)
    named = {} if name == DEFAULT else {"name": name}
    return named | {
        "path": site.path,
        "method": method,
        "roles": site.roles,
        "ranks": site.ranks,
        "alphas": alphas_of(node),
        "pattern": site.path,  # which finds it; the one that did is only told
        "leaves": {
            "frozen": sorted(set(node.frozen) - set(common) - numbers),
            "trainable": sorted(node.trainable),
        },
        "shared": common,
        "base": base,
    }


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], text: str
) -> None:
    """Writes the files beside their place, then moves them there."""
    name = config["id"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{name}")
    new.mkdir()
    try:
        header = {"format": FORMAT, "id": name}
        write_tensors(new / TENSORS, tensors, header)
        told = json.dumps(config | {DIGEST: digest(new / TENSORS)}, indent=1)
        (new / CONFIG).write_text(told + "\n", encoding="utf-8")
        (new / CARD).write_text(text, encoding="utf-8")
        if folder.is_dir() and any(folder.iterdir()):
            # A crash between the two leaves files of different ids, which loading
            # refuses.
            os.replace(new / TENSORS, folder / TENSORS)
            os.replace(new / CONFIG, folder / CONFIG)
            if may_write(folder):
                os.replace(new / CARD, folder / CARD)
        else:
            if folder.is_dir():
                folder.rmdir()
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
