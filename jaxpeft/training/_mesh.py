"""Where arrays live: the mesh, and the rules that lay a model out on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpeft.training._slices import over_slices
from jaxpeft.tree import (
    inherit_specs,
    is_whole,
    leaves_with_path,
    matrix_words,
    module_path,
    names_leaf,
    resolve_pattern,
)

DATA, FSDP, SEQUENCE, TENSOR = "data", "fsdp", "sequence", "tensor"

# In this order. Cut by ("data", "fsdp"), on a mesh with three axes longer than 1, the
# partitioner of XLA (jaxlib 0.10.2 and 0.12.0) loses the order of the rows in
# `x @ kernel` when "fsdp" also cuts the kernel, and gradients are silently wrong:
# tests/training/mesh_test.py has the smallest case.
BATCH_AXES = (FSDP, DATA)

# Which axis of a kernel the tensor axis of the mesh cuts, by the end of its module's
# path; the first match wins. "out" then "in" is the pairing of Megatron-LM (arXiv
# 1909.08053): heads and hidden units stay whole on a device, one sum per block.
TENSOR_RULES: tuple[tuple[str, str], ...] = (
    ("query", "out"),
    ("key", "out"),
    ("value", "out"),
    ("intermediate/dense", "out"),
    ("output/dense", "in"),
    ("q_proj", "out"),
    ("k_proj", "out"),
    ("v_proj", "out"),
    ("o_proj", "in"),
    ("gate_proj", "out"),
    ("up_proj", "out"),
    ("down_proj", "in"),
    ("lm_head", "out"),
    # Of tables that are looked up, the vocabulary; fsdp is left the width.
    ("embed_tokens", "in"),
    ("wte", "in"),
    ("word_embeddings", "in"),
    ("embed_tokens/lookup", "in"),
    ("wte/lookup", "in"),
    ("query_proj", "out"),
    ("key_proj", "out"),
    ("value_proj", "out"),
    ("c_fc", "out"),
    ("mlp/c_proj", "in"),
    # Not fused ones (c_attn, qkv_proj, gate_up_proj): a cut would part what belongs
    # to one head or one hidden unit.
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
    **others: Any,
) -> Mesh:
    """Returns a mesh with the axes ``data``, ``fsdp``, ``sequence`` and ``tensor``.

    Batches are cut over ``data`` and ``fsdp``; frozen kernels are cut over ``fsdp``
    and ``tensor``, and whole on every device of ``sequence``, which cuts the tokens of
    long rows; ``tensor`` is innermost, on the nearest neighbours. Over slices of TPUs
    that a slower network joins goes ``data``, or else ``fsdp``.

    Args:
        data: devices along the data axis; -1 takes all that the other axes leave.
        fsdp: devices along the axis that cuts both the batch and the parameters.
        tensor: devices along the axis that cuts the matrices of one layer.
        sequence: devices along the axis that cuts the tokens of a row, of a model that
            can have it (``check_tokens``).
        devices: the devices; ``None`` for all of this run (``jax.devices()``). A
            compile-only topology's devices do as well.
        **others: there are no other axes: a name that is none of these is refused.

    Returns:
        The mesh. It has the axis ``sequence`` only where that is longer than 1.

    Raises:
        ValueError: an axis has another name, a size is not positive, more than one is
            -1, the sizes do not use every device exactly once, or neither ``data`` nor
            ``fsdp`` is a multiple of the number of slices.

    Example:
        >>> dict(make_mesh(data=-1, devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {DATA: data, FSDP: fsdp, SEQUENCE: sequence, TENSOR: tensor}
    if others:
        raise ValueError(
            f"a mesh has no axis {', '.join(map(repr, others))}; its axes are "
            f"{', '.join(sizes)}"
        )
    free = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"`{name}` must be a positive number of devices, or -1 for all that "
                f"are left; got {size}"
            )
    if len(free) > 1:
        raise ValueError(
            f"only one mesh axis may be -1, got {' and '.join(free)}; give the size "
            "of the others"
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if sizes[SEQUENCE] == 1:  # a mesh without it is what a mesh was
        del sizes[SEQUENCE]
    if math.prod(sizes.values()) != len(devices):
        asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"a mesh of {asked} does not fit {len(devices)} devices: the product of "
            f"the sizes must be {len(devices)}. Divisors are "
            f"{[d for d in range(1, len(devices) + 1) if len(devices) % d == 0]}; "
            "one axis may be -1 (all that is left)"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices > 1:
        arranged = over_slices(sizes, (DATA, FSDP), slices, devices)
        return Mesh(arranged, tuple(sizes), axis_types=kinds)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices
    )


def check_tokens(model: Any, mesh: Mesh, *lengths: int) -> None:
    """Raises where the axis ``sequence`` of a mesh cannot cut the tokens of a model.

    Args:
        model: a Linen module. One that can have its tokens cut (``models.Decoder``,
            without a cache) has a true attribute ``cuts_tokens``.
        mesh: the mesh.
        *lengths: tokens of a row, padding included.

    Raises:
        ValueError: the mesh has this axis, and the model's attention sees whole rows
            alone, or a length is no multiple of it.

    Example:
        >>> check_tokens(None, make_mesh(devices=jax.devices()[:1]), 7)
    """
    parts = mesh.shape.get(SEQUENCE, 1)
    if parts == 1:
        return
    if not getattr(model, "cuts_tokens", False):
        raise ValueError(
            f"`mesh` has sequence={parts}, but the tokens of a {type(model).__name__} "
            "cannot be cut: its attention sees whole rows. Decoders (models.Decoder) "
            "can; write sequence=1, and data or fsdp for the devices"
        )
    if odd := [length for length in lengths if length % parts]:
        raise ValueError(
            f"`mesh` has sequence={parts}, which does not cut rows of "
            f"{' and '.join(map(str, odd))} tokens; pad them to multiples of {parts}, "
            f"such as {-(-odd[0] // parts) * parts}, or write sequence=1"
        )


def param_specs(
    params: Any,
    mesh: Mesh,
    *,
    axes: Mapping[str, str] | None = None,
    tensor_rules: Sequence[tuple[str, str]] = TENSOR_RULES,
) -> Any:
    """Returns a ``PartitionSpec`` for every leaf of a plain parameter tree.

    The rules, in this order:

    1. Leaves with fewer than two axes, and all that are named ``bias`` or ``scale``
       (stacked ones have two), are replicated.
    2. The matrix axes are those that ``axes`` calls ``in`` or ``out``; without an
       entry, the last two (of an output head's table, ``out`` comes first). All
       others are batch axes and are never cut.
    3. ``tensor`` cuts the axis that the first matching rule names (of several, the
       largest that divides). A kernel no rule names is not cut by ``tensor``.
    4. ``fsdp`` cuts the largest matrix axis that is left and divides.
    5. What divides nothing is replicated.

    Placement never changes what is computed, only where.

    Args:
        params: plain parameters: arrays or ``jax.ShapeDtypeStruct`` (an 8B tree
            costs nothing).
        mesh: the mesh (``make_mesh``).
        axes: roles of the axes of kernels with more than two, as for
            ``jaxpeft.attach``: ``{"encoder/layer/.*": "layer in out"}``. Entries that
            match nothing here are an error.
        tensor_rules: pairs of a module name and ``"in"`` or ``"out"``.

    Returns:
        A tree of ``PartitionSpec`` like ``params``.

    Raises:
        ValueError: the mesh has a tensor axis that cuts no kernel; an ``axes`` entry
            matches nothing, or has the wrong number of words.

    Example:
        >>> import numpy as np
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> specs = param_specs({"query": {"kernel": np.zeros((4, 4))}}, mesh)
        >>> tuple(specs["query"]["kernel"])
        ('fsdp', 'tensor')
    """
    flat = leaves_with_path(params)
    words = resolve_pattern("axes", axes or {}, [path for path, _ in flat])
    specs = [
        leaf_spec(path, leaf.shape, mesh, words.get(path), tensor_rules=tensor_rules)
        for path, leaf in flat
    ]
    if mesh.shape[TENSOR] > 1 and not any(TENSOR in spec for spec in specs):
        raise ValueError(
            f"the mesh has tensor={mesh.shape[TENSOR]}, but no kernel is cut by it: no "
            "module matches `tensor_rules` with an axis that divides. Modules are "
            f"{sorted({module_path(p) for p, _ in flat})[:8]} ...; write "
            'tensor_rules=[("module", "out"), ...] or tensor=1'
        )
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_whole), specs)


def leaf_spec(
    path: str,
    shape: Sequence[int],
    mesh: Mesh,
    roles: str | None = None,
    *,
    tensor_rules: Sequence[tuple[str, str]] = TENSOR_RULES,
) -> PartitionSpec:
    """Returns the ``PartitionSpec`` of one parameter, by the rules of ``param_specs``.

    Args:
        path: the leaf's path, joined with "/".
        shape: its shape.
        mesh: the mesh.
        roles: the roles of its axes, ``"layer in out"``; ``None``: the last two are
            the matrix.
        tensor_rules: as for ``param_specs``.

    Returns:
        One entry per axis.

    Raises:
        ValueError: ``roles`` has the wrong number of words.

    Example:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> tuple(leaf_spec("encoder/layer/query/kernel", (6, 384, 384), mesh))
        (None, 'fsdp', 'tensor')
    """
    matrix = _matrix_axes(path, tuple(shape), roles)
    spec: list[str | None] = [None] * len(shape)
    rule = next((role for name, role in tensor_rules if names_leaf(name, path)), None)
    for name, allowed in ((TENSOR, (rule,)), (FSDP, ("in", "out"))):
        candidates = [
            axis
            for axis, role in matrix.items()
            if role in allowed
            and spec[axis] is None
            and shape[axis] % mesh.shape[name] == 0
        ]
        if candidates:
            # The first of equals: the in axis, so that equal leaves agree.
            spec[max(candidates, key=lambda i: (shape[i], -i))] = name
    return PartitionSpec(*spec)


def _matrix_axes(path: str, shape: tuple[int, ...], words: str | None):
    """``{axis: "in" | "out"}`` of the axes that make up the matrix of a leaf."""
    if len(shape) < 2 or path.rpartition("/")[2] in ("bias", "scale"):
        return {}
    if words is None:
        return dict(enumerate(matrix_words(path).split(), len(shape) - 2))
    roles = words.split()
    if len(roles) != len(shape):
        raise ValueError(
            f"`axes` says {words!r} for {path!r}, {len(roles)} words for the "
            f"{len(shape)} axes of shape {shape}"
        )
    return {i: role for i, role in enumerate(roles) if role in ("in", "out")}


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Returns the tree of ``NamedSharding`` for a tree of ``PartitionSpec``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows over ``fsdp`` and ``data``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place(adapted: Any, mesh: Mesh, specs: Any) -> Any:
    """Puts an adapted tree on the mesh; adapters follow their kernels.

    Args:
        adapted: the tree. Leaves that are ``jax.ShapeDtypeStruct`` stay abstract and
            are given their sharding, for compiling without memory.
        mesh: the mesh.
        specs: ``PartitionSpec`` for the plain parameters (``param_specs``). A factor
            that shares an axis with its kernel is cut like it; rank axes are whole.

    Returns:
        The same tree, every leaf on its ``NamedSharding``.

    Raises:
        ValueError: ``specs`` is not like the plain parameters.
    """
    where = shardings(inherit_specs(adapted, specs, dict(mesh.shape)), mesh)

    def put(leaf, sharding):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, adapted, where)
