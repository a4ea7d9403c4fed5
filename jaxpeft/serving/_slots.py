"""Slots: fixed room for adapters beside the kernels of a base.

Every kernel has room for S - 1 pairs of thin matrices, and a batch says by number which
of them each of its rows takes. Loading an adapter writes into arrays that are there
already, so no program that uses them is compiled anew. Names are known here alone, on
the host.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from jaxpeft.models import ModuleName
from jaxpeft.numerics import target_of
from jaxpeft.serving._write import cleared, misfits, pairs, written
from jaxpeft.transform import WAYS, is_slotted, is_taken, slotted, take_rows
from jaxpeft.tree import (
    Targets,
    attach,
    detach,
    grouped,
    is_node,
    leaves_with_path,
    map_nodes,
    nearest,
    nodes,
    with_call,
)

BASE = "__base__"


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """A base with slots, and the names of what is in them.

    Not a pytree: ``tree`` is what goes into a jitted function, through ``with_rows``.

    Attributes:
        tree: the parameters, with slots beside the kernels.
        names: the name in each slot, ``"__base__"`` first; ``None``: the slot is free.
        modules: what modules are called in the checkpoint, for HF PEFT's files.
        axes: roles of the axes of kernels, as in ``attach``.
    """

    tree: PyTree
    names: tuple[str | None, ...]
    modules: tuple[ModuleName, ...]
    axes: Mapping[str, str] | None


def slots(
    params: PyTree,
    targets: Targets,
    *,
    capacity: int = 16,
    rank: int = 16,
    exclude: Targets | None = None,
    axes: Mapping[str, str] | None = None,
    modules: Sequence[ModuleName] = (),
    how: str | None = None,
    dtype: DTypeLike | None = None,
) -> Slots:
    r"""Makes room beside the kernels of a base for adapters that share it.

    Rows of one batch then use different adapters. With k the slot of row i,

    .. math:: y_i = x_i W + s_k (x_i a_k)\, b_k, \qquad y_i = x_i W
              \text{ bit for bit where } k = 0

    Loading and dropping write a slot: functions that were compiled stay as they are.
    For inference; the slots do not train.

    Args:
        params: the plain parameter tree.
        targets: the kernels that adapters may sit on, as in ``attach``. An adapter
            may leave some of them out, and may have no other.
        capacity: adapters that there is room for beside the base, at least 1.
        rank: the largest rank r of an adapter; smaller ones are padded with zeros.
        exclude: as in ``attach``.
        axes: as in ``attach``; ``model.axes``.
        modules: names of the modules in the checkpoint, ``model.names``, where
            adapters come from HF PEFT's files. Those of a tied model's embedding or
            head alone need slots over ``interop.untie(params, names=model.names)``.
        how: ``"gather"`` takes each row's pair out of the slots, a copy of
            rows x (d_in + d_out) x r numbers at each kernel; ``"ragged"`` sorts the
            rows by slot and multiplies group by group (``jax.lax.ragged_dot``, which
            JAX cannot ``vmap`` over the input alone, and makes a masked dense product
            on a CPU). Both give the same numbers. ``None``: "ragged" on TPUs, else
            "gather".
        dtype: of the pairs, to which adapters are rounded as they are loaded:
            ``jnp.bfloat16`` takes half the room and half the reading. ``None``:
            float32, float64 over float64. Products are float32 all the same.

    Returns:
        Empty slots: S = capacity + 1 with slot 0, which is the base. Beside a kernel
        ``[d_in, d_out]`` lie ``a [S, d_in, r]``, ``b [S, r, d_out]``, ``scale [S]``,
        layers of a stack in front, sharded along the axes of their kernel.

    Raises:
        ValueError: as ``attach``, or a number outside of what is allowed.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> from jaxpeft import serving
        >>> params = {"query": {"kernel": jnp.eye(4)}}
        >>> method = jp.lora(rank=2, init="gaussian")
        >>> make = lambda i: jp.attach(params, method, ["query"], key=jax.random.key(i))
        >>> room = serving.slots(params, ["query"], capacity=4, rank=8)
        >>> room = serving.load(room, "french", make(1))
        >>> room = serving.load(room, "sql", make(2))
        >>> forward = jp.adapt(lambda params, x: x @ params["query"]["kernel"])
        >>> index = serving.rows(room, ["sql", "__base__", "french"])
        >>> index.tolist()
        [2, 0, 1]
        >>> y = forward(serving.with_rows(room.tree, index), jnp.ones((3, 4)))
        >>> y.shape, y[1].tolist()
        ((3, 4), [1.0, 1.0, 1.0, 1.0])

    References:
        Sheng et al., S-LoRA, arXiv 2311.03285.
    """
    for argument, value in (("capacity", capacity), ("rank", rank)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"`{argument}` must be a whole number from 1 up, got {value!r}; write "
                f"slots(..., {argument}=16)."
            )
    if dtype is not None:
        dtype = jnp.dtype(dtype).name
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`dtype` must be a floating one, such as jnp.bfloat16, got {dtype}"
            )
    if how is None:
        how = "ragged" if target_of(params) == "tpu" else "gather"
    if how not in WAYS:
        raise ValueError(f"`how` must be None or one of {', '.join(WAYS)}, got {how!r}")
    if any(is_node(x) for x in jax.tree.leaves(params, is_leaf=is_node)):
        raise ValueError(
            "`params` carry adapters already; give the plain tree, and load each "
            "adapter into a slot: serving.load(slots, name, adapted)."
        )
    tree = attach(
        params,
        slotted(capacity + 1, rank, how, dtype),
        targets,
        key=jax.random.key(0),  # nothing is drawn
        exclude=exclude,
        axes=axes,
    )
    return Slots(tree, (BASE,) + (None,) * capacity, tuple(modules), axes)


def load(
    slots: Slots,
    name: str,
    adapter: PyTree | str | Path,
    *,
    check_base: bool = True,
    ignore: Sequence[str] = (),
) -> Slots:
    """Writes an adapter into a free slot.

    What an adapter adds to a kernel must be one product of thin matrices: LoRA and
    rsLoRA as they are; methods with initial factors (PiSSA, OLoRA, MiLoRA, KaSA) by
    their change of the kernel they began with, which may have twice their rank. So is
    a mixture under fixed gates, and with it one domain out of several:
    ``mixtures.fix_gates(adapted, {"law": 1.0})``.

    Args:
        slots: as ``slots`` made them.
        name: any name that is not taken.
        adapter: an adapted tree over the same base, or a folder with an adapter of
            ours or of HF PEFT's. What ``extract`` took off is put back onto the base
            first: ``jaxpeft.graft(params, adapter)``.
        check_base: for a folder of ours, see ``interop.load_adapter``.
        ignore: for a folder of PEFT's, see ``interop.load_peft``.

    Returns:
        The slots with one more name; those given stay as they are.

    Raises:
        ValueError: the name is taken, no slot is free, or the adapter sits on other
            kernels, has a larger rank than the slots, or no such product. All is
            listed, and nothing is loaded.
        FileNotFoundError: the folder has no adapter.
    """
    _check_name(slots, name)
    tree = adapter
    if isinstance(adapter, str | Path):
        tree = _read(slots, Path(adapter), check_base, ignore)
    own = {node.site.path: node for node in nodes(slots.tree)}
    found = nodes(tree)
    paths = {path for path, _ in leaves_with_path(slots.tree)}
    problems = [problem for node in found for problem in misfits(own, node, paths)]
    if not found:
        problems = ["it is a tree without adapters; give one that attach made"]
    if problems:
        lines = grouped(problems)
        raise ValueError(
            f"`adapter` {name!r} does not fit the slots; nothing was loaded:\n  {lines}"
        )
    slot = slots.names.index(None)
    new = {n.site.path: pairs(n, own[n.site.path]) for n in found}
    tree = map_nodes(
        lambda node: (
            written(node, new[node.site.path], slot) if node.site.path in new else node
        ),
        slots.tree,
    )
    return _renamed(slots, tree, slot, name)


def _check_name(slots: Slots, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"`name` must be a text, got {name!r}")
    if name in slots.names:
        way = (
            "the base has that name"
            if name == BASE
            else f"drop it first: serving.drop(slots, {name!r})"
        )
        raise ValueError(f"`name` {name!r} is taken; {way}, or choose another.")
    if None not in slots.names:
        raise ValueError(
            f"all {len(slots.names) - 1} slots are taken, by {_known(slots)}; drop "
            "one, serving.drop(slots, name), or make more, serving.slots(..., "
            "capacity=...)."
        )


def _read(slots: Slots, folder: Path, check_base: bool, ignore: Sequence[str]):
    """An adapted tree from a folder of either sort."""
    from jaxpeft import interop
    from jaxpeft.interop import CONFIG as OWN
    from jaxpeft.interop import PEFT_CONFIG as PEFT

    params = detach(slots.tree)
    if (folder / OWN).is_file():
        return interop.load_adapter(
            folder, params, check_base=check_base, names=slots.modules
        )
    if folder.is_file():
        raise ValueError(
            f"`adapter` {str(folder)!r} is a file, and adapters are folders. A domain "
            "that export_domain wrote goes in by a tree: adapted = "
            "mixtures.import_domain(adapted, file), then load(slots, name, "
            'mixtures.fix_gates(adapted, {"law": 1.0})).'
        )
    if not (folder / PEFT).is_file():
        raise FileNotFoundError(
            f"`adapter` {str(folder)!r} holds neither {OWN} nor {PEFT}: no adapter."
        )
    if not slots.modules:
        raise ValueError(
            f"{str(folder)!r} is HF PEFT's, which names modules as in the checkpoint; "
            "make the slots with serving.slots(..., modules=model.names)."
        )
    names, axes = slots.modules, slots.axes
    return interop.load_peft(folder, params, names=names, axes=axes, ignore=ignore)


def drop(slots: Slots, name: str) -> Slots:
    """Empties a slot; an index that still points to it is the base's again.

    Args:
        slots: as ``load`` returned them.
        name: what was loaded.

    Returns:
        The slots with one name less; those given stay as they are.

    Raises:
        ValueError: there is no such name, or it is the base's.
    """
    if name == BASE:
        raise ValueError(f"`name` {BASE!r} is the base, which cannot be dropped.")
    slot = _slot(slots, name)
    tree = map_nodes(lambda node: cleared(node, slot), slots.tree)
    return _renamed(slots, tree, slot, None)


def _renamed(slots: Slots, tree: PyTree, slot: int, name: str | None) -> Slots:
    names = (*slots.names[:slot], name, *slots.names[slot + 1 :])
    return dataclasses.replace(slots, tree=tree, names=names)


def rows(slots: Slots, names: Sequence[str]) -> Int[np.ndarray, " rows"]:
    """The slot of each row of a batch.

    Args:
        slots: as ``load`` returned them.
        names: the adapter of each row; ``"__base__"`` for none.

    Returns:
        ``[rows]`` int32, for ``with_rows``.

    Raises:
        ValueError: there is no such name; those that there are are listed.
    """
    if isinstance(names, str) or not len(names):
        raise ValueError(
            f"`names` must be one name for each row of the batch, got {names!r}; write "
            f"[{BASE!r}, ...]."
        )
    return np.array([_slot(slots, name) for name in names], np.int32)


def _slot(slots: Slots, name: str) -> int:
    if name is None or name not in slots.names:
        known = [n for n in slots.names if n is not None]
        near = nearest(str(name), known, 1)
        raise ValueError(
            f"there is no adapter {name!r}; nearest: {near}. Loaded are "
            f"{_known(slots)}."
        )
    return slots.names.index(name)


def _known(slots: Slots) -> str:
    return ", ".join(repr(n) for n in slots.names if n is not None)


def with_rows(
    tree: PyTree,
    index: Array | np.ndarray | Sequence[int],
    *,
    copies: bool = False,
) -> PyTree:
    """Says which adapter each row of the next batch takes.

    A function of arrays, which may be called inside of ``jit`` too: a new index of the
    same length compiles nothing.

    Args:
        tree: ``slots.tree``.
        index: ``[rows]`` integers, as ``rows`` returns them; the first axis of the
            input of every kernel must be these rows. A number that is no slot raises
            here; under ``jit``, where it cannot, that row's output is NaN.
        copies: takes each row's pair out of the slots once, here, and not at every
            use: for many calls with one index, such as the tokens that
            ``models.generate`` writes one by one. The tree then holds rows x (d_in +
            d_out) x r numbers beside each kernel, of the adapters as they are now.

    Returns:
        A tree for functions made by ``adapt``, and for ``models.generate``.

    Raises:
        ValueError: the tree has no slots, or the index is no list of theirs.
    """
    found = [node for node in nodes(tree) if is_slotted(node)]
    if not found:
        raise ValueError("`tree` has no slots; give slots.tree of serving.slots(...).")
    if is_taken(found[0]):
        raise ValueError(
            "`tree` holds copies for the rows of one batch; give slots.tree, which "
            "holds every adapter"
        )
    index = index if hasattr(index, "dtype") else np.asarray(index)
    shape = jnp.shape(index)
    if len(shape) != 1 or not shape[0] or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"`index` must be one whole number for each row, got {index.dtype}"
            f"{list(shape)}; write serving.rows(slots, names)."
        )
    if not isinstance(index, jax.core.Tracer):
        count = found[0].frozen["scale"].shape[-1]
        index = np.asarray(index)
        wrong = sorted({int(i) for i in index if not 0 <= i < count})
        if wrong:
            raise ValueError(f"`index` has {wrong}, but slots go from 0 to {count - 1}")
    index = jnp.asarray(index, jnp.int32)
    if not copies:
        return with_call(tree, rows=index)
    return map_nodes(lambda n: take_rows(n, index) if is_slotted(n) else n, tree)
