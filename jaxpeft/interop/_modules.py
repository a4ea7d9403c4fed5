"""The modules of a checkpoint, one by one, and where each lies in our tree."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.models import ModuleName
from jaxpeft.tree import (
    BATCH,
    IN,
    OUT,
    AdaptedKernel,
    matrix_shape,
    matrix_words,
    module_path,
    nearest,
    parse_roles,
    resolve_pattern,
    to_matrices,
)

KINDS = ("linear", "conv1d", "embedding", "norm")
MATRICES = ("linear", "conv1d", "embedding")
_WEIGHTS = ("kernel", "embedding", "scale", "weight", "w")
_BIASES = ("bias", "b")


class Module(NamedTuple):
    """One module of the checkpoint.

    Attributes:
        name: its path there, layer number filled in.
        row: the row of the table that it comes from.
        layer: its place in our stack of layers, or ``None`` where it lies alone.
        layers: how many layers the stack has; 1 for a module alone.
        leaves: paths of our leaves, under ``"weight"`` and ``"bias"``.
        number: the number of its layer in ``name``, or ``None`` where there is none.
    """

    name: str
    row: ModuleName
    layer: int | None
    layers: int
    leaves: dict[str, str]
    number: int | None = None

    @property
    def kind(self) -> str:
        """``"linear"``, ``"conv1d"``, ``"embedding"`` or ``"norm"``."""
        return self.row.kind

    @property
    def saved(self) -> str:
        """Its path in a checkpoint of the tree alone."""
        return (self.row.saved or self.row.theirs).replace("{i}", str(self.number))

    def order(self, d_out: int) -> np.ndarray:
        """Which of our output features is each of the checkpoint's."""
        size = self.row.interleaved
        if not size:
            return np.arange(d_out)
        if d_out % size or size % 2:
            raise ValueError(
                f"`names` row {self.row.theirs!r} has interleaved={size}, which is no "
                f"even head size of {d_out} output features"
            )
        half = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
        return (np.arange(0, d_out, size)[:, None] + half).reshape(-1)


class Table:
    """All modules that both a table of names and a parameter tree have.

    Args:
        names: rows, ``model.names`` of our models.
        leaves: leaves of the tree by path; an adapted kernel is one leaf.
        axes: roles of the axes of kernels, as ``attach`` takes them.

    Raises:
        ValueError: a row is malformed, or no row's module is in the tree.
    """

    def __init__(
        self,
        names: Sequence[ModuleName],
        leaves: Mapping[str, Any],
        axes: Mapping[str, str] | None = None,
    ):
        self.leaves = dict(leaves)
        weights = [p for p, x in leaves.items() if len(x.shape) >= 2]
        self.words = resolve_pattern("axes", axes, weights) if axes else {}
        self.rows = tuple(map(_checked, names))
        owned: dict[str, dict[str, str]] = {}
        for path in leaves:
            last = path.rpartition("/")[2]
            kind = "weight" if last in _WEIGHTS else "bias" if last in _BIASES else None
            if kind:
                owned.setdefault(module_path(path), {})[kind] = path
        self.modules: list[Module] = []
        for row in self.rows:
            self.modules += self._expand(row, owned)
        self.by_name = {module.name: module for module in self.modules}
        self.by_leaf: dict[str, list[Module]] = {}
        for module in self.modules:
            for path in module.leaves.values():
                self.by_leaf.setdefault(path, []).append(module)
        if not self.modules:
            raise ValueError(
                f"`names` has {len(names)} rows and none of their modules is in the "
                f"tree; its modules are named like {nearest('', list(leaves))}. Give "
                "the tree of parameters itself (not {'params': ...}) with the same "
                "model's `names`."
            )

    def _expand(self, row: ModuleName, owned) -> list[Module]:
        if "{i}" not in row.ours:
            leaves = owned.get(row.ours)
            if leaves is None:
                return []
            if "{i}" not in row.theirs:
                return [Module(row.theirs, row, None, 1, leaves)]
            count = self._stack_size(leaves)
            each = (row.theirs.replace("{i}", str(i)) for i in range(count))
            return [Module(n, row, i, count, leaves, i) for i, n in enumerate(each)]
        return [
            Module(row.theirs.replace("{i}", str(i)), row, None, 1, leaves, i)
            for i, leaves in _layers(row.ours, owned)
        ]

    def _stack_size(self, leaves: Mapping[str, str]) -> int:
        for path in leaves.values():
            if roles := self.roles_of(path):
                if BATCH in roles:
                    return matrix_shape(self.leaves[path].shape, roles)[0]
        return self.leaves[next(iter(leaves.values()))].shape[0]

    def roles_of(self, path: str) -> tuple[str, ...] | None:
        """Roles of a kernel's axes, where they are known."""
        leaf = self.leaves[path]
        if isinstance(leaf, AdaptedKernel) and leaf.adapter.where.leaf == "kernel":
            return leaf.roles
        if path not in self.words or path.rpartition("/")[2] in _BIASES:
            return None
        return parse_roles(self.words[path], path, leaf.shape)

    def tensor(
        self, module: Module, part: str, value: np.ndarray, *, sliced: bool = False
    ) -> np.ndarray:
        """One module's part of our leaf, as the checkpoint has it.

        Args:
            module: whose.
            part: ``"weight"`` or ``"bias"``.
            value: the leaf, whole.
            sliced: whether ``value`` is this module's layer of it alone.

        Returns:
            ``[out, in]`` for a linear weight, ``[in, out]`` for conv1d, else as it is.
        """
        path = module.leaves[part]
        if part == "weight" and module.kind in ("linear", "conv1d"):
            roles = self.matrix_roles(module, path)[1 if sliced else 0 :]
            matrix = to_matrices(value, roles)[0 if sliced else module.layer or 0]
            matrix = matrix[:, module.order(matrix.shape[1])]
            return matrix if module.kind == "conv1d" else matrix.T
        if part == "weight" and module.kind == "embedding":
            alone = sliced or module.layer is None
            table = value if alone else value[module.layer]
            return table.reshape(table.shape[0], -1)
        rows = value.reshape(1 if sliced else module.layers, -1)
        row = rows[0 if sliced else module.layer or 0]
        return row[module.order(len(row))]

    def leaf(self, modules: Sequence[Module], part: str, tensors) -> np.ndarray:
        """The inverse of ``tensor``: our leaf, of all modules that share it."""
        path = modules[0].leaves[part]
        shape = self.leaves[path].shape
        if part == "weight" and modules[0].kind in ("linear", "conv1d"):
            roles = self.matrix_roles(modules[0], path)
            pairs = zip(modules, tensors, strict=True)
            each = [t if m.kind == "conv1d" else t.T for m, t in pairs]
            back = np.argsort(modules[0].order(each[0].shape[1]))
            each = [matrix[:, back] for matrix in each]
            order = [i for r in (BATCH, IN, OUT) for i, x in enumerate(roles) if x == r]
            whole = np.stack(each).reshape([shape[i] for i in order])
            return whole.transpose(np.argsort(order))
        if part == "weight" and modules[0].kind == "embedding":
            return np.stack(list(tensors)).reshape(shape)
        back = np.argsort(modules[0].order(len(tensors[0])))
        return np.stack([x[back] for x in tensors]).reshape(shape)

    def tensor_shape(self, module: Module, part: str) -> tuple[int, ...]:
        """The shape of ``tensor``, without its data."""
        shape = self.leaves[module.leaves[part]].shape
        empty = np.broadcast_to(np.zeros((), np.int8), shape)
        return self.tensor(module, part, empty).shape

    def matrix_roles(self, module: Module, path: str) -> tuple[str, ...]:
        """Roles of a matrix's axes: as given, or two after those of its stack."""
        roles, ndim = self.roles_of(path), len(self.leaves[path].shape)
        if roles is None:
            matrix = tuple(matrix_words(path).split())
            roles = matrix if module.layer is None else (BATCH, *matrix)
        if len(roles) != ndim:
            raise ValueError(
                f"the kernel {path!r} has {ndim} axes and nothing says which of them "
                f"are in and which out; write axes={{{module_path(path)!r}: "
                "'in out out'}, or axes=model.axes."
            )
        return roles


def _layers(pattern: str, owned: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """The layers that a tree has of ``layer_{i}/q``: their numbers, in order."""
    first, *rest = map(re.escape, pattern.split("{i}"))
    numbered = first + "(?P<i>0|[1-9][0-9]*)" + "(?P=i)".join(rest)
    matches = (re.fullmatch(numbered, path) for path in owned)
    found = {int(match["i"]): owned[match[0]] for match in matches if match}
    return sorted(found.items())


def _checked(row: ModuleName) -> ModuleName:
    row = ModuleName(*row)
    if row.kind not in KINDS:
        raise ValueError(
            f"`names` row {row.theirs!r} has kind {row.kind!r}; kinds are "
            f"{', '.join(KINDS)}."
        )
    if "{i}" in row.ours and "{i}" not in row.theirs:
        raise ValueError(
            f"`names` row {row.ours!r} counts layers but {row.theirs!r} does not; "
            "write {i} in both, or in `theirs` alone for a stack of layers."
        )
    return row
