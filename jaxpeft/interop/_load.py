"""Reading adapters from a folder: everything fits, or nothing is loaded."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxpeft.interop._format import (
    CONFIG,
    DIGEST,
    TENSORS,
    adapter_info,
    digest,
)
from jaxpeft.interop._save import leaf_name
from jaxpeft.interop._tensors import TensorFile
from jaxpeft.interop._untie import untied_for
from jaxpeft.models import ModuleName
from jaxpeft.numerics import PROJECTION_TOLERANCE, checksum, projection
from jaxpeft.tree import (
    BATCH,
    DEFAULT,
    AdaptedKernel,
    Adapter,
    Site,
    axes_of,
    find_method,
    fold_base,
    grouped,
    initialise,
    is_abstract,
    is_whole,
    leaf_entries,
    leaves_with_path,
    lifted_factors,
    nearest,
    number_leaves,
    parts_of,
    shared_names,
    together,
    working_dtype,
)


def load_adapter(
    folder: str | Path,
    params: PyTree,
    *,
    check_base: bool = True,
    names: Sequence[ModuleName] = (),
    name: str | None = None,
) -> PyTree:
    """Puts saved adapters back beside the kernels they were trained with.

    Nothing is computed again: leaves come from the file as they were, on the devices
    and in the sharding of their kernels (methods that store a changed kernel fold it
    from the saved leaves). Either everything fits and is loaded, or one error lists
    all that does not fit.

    Args:
        folder: where ``save_adapter`` wrote.
        params: the plain parameter tree; it may carry adapters at other sites. Of
            ``jax.ShapeDtypeStruct`` (with ``check_base=False``) it only says whether
            the adapters fit.
        check_base: compare each kernel's dtype and fingerprint with the kernel that
            the adapter was trained with; of leaves that were trained in full, the
            dtype alone. ``False`` allows another base of the same shapes, such as the
            same weights in another dtype.
        names: ``model.names``. With them a tied tree is untied (``untie``) where the
            adapter acts on the embedding or on the head alone, as PEFT's do.
        name: a name for the adapter, where kernels are to have several; ``None``: the
            one that it was saved with.

    Returns:
        The adapted tree, equal in structure and leaves to the saved one.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: another version or format, unknown methods, sites that are not in
            ``params`` or already adapted, kernels of another shape or another base,
            leaves missing, left over, mis-shaped or not finite, or a file that is not
            as it was saved. All are listed.
    """
    folder = Path(folder)
    config = adapter_info(folder)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(
            f"`folder` {str(folder)!r} holds {CONFIG} but no {TENSORS}; copy both."
        )
    file = TensorFile(folder / TENSORS)
    if file.metadata.get("id") != config.get("id"):
        raise ValueError(
            f"{CONFIG} and {TENSORS} in {str(folder)!r} come from different saves (one "
            "was interrupted, or only one file was copied); copy both again."
        )
    problems = _damages(folder / TENSORS, config)
    methods = [_load_method(entry, problems) for entry in config["methods"]]
    params = untied_for(params, names, [entry["path"] for entry in config["sites"]])
    kernels = dict(leaves_with_path(params))
    wanted: set[str] = set()
    made: dict[str, dict[str, AdaptedKernel]] = {}
    saved = {entry.get("name", DEFAULT) for entry in config["sites"]}
    if name is not None and len(saved) > 1:
        raise ValueError(
            f"`name` is for a folder of one adapter, and {str(folder)!r} has "
            f"{sorted(saved)}; leave it out"
        )
    common: dict[str, Array] = {}  # leaves that sites share, read and placed once
    for entry in config["sites"]:
        path, own = entry["path"], entry.get("name", DEFAULT)
        leaves = [n for part in entry["leaves"].values() for n in part]
        wanted.update(f"{path}/{leaf_name(own, leaf)}" for leaf in leaves)
        wanted.update(entry.get("shared", {}).values())
        called = own if name is None else name
        args = methods, kernels, file, check_base, problems, common
        node = _load_site(entry, called, *args)
        if node is not None:
            made.setdefault(path, {})[called] = node
    nodes = {p: _joined(kernels[p], each, problems) for p, each in made.items()}
    problems += file.not_finite(wanted & set(file.shapes))
    problems += [
        f"left over: {name!r} belongs to no site"
        for name in sorted(set(file.shapes) - wanted)
    ]
    if problems:
        lines = grouped(problems)
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit; nothing was loaded:\n  "
            + lines
        )
    treedef = jax.tree.structure(params, is_leaf=is_whole)
    return treedef.unflatten([nodes.get(path, x) for path, x in kernels.items()])


def _joined(kernel, made: dict[str, AdaptedKernel], problems: list[str]):
    """A site's adapters, those that it had and those of the file."""
    had = parts_of(kernel) if isinstance(kernel, AdaptedKernel) else {}
    try:
        return together(had | made)
    except ValueError as e:
        problems.append(str(e))
        return kernel


def _damages(file: Path, config: Mapping[str, Any]) -> list[str]:
    """Whether the file of arrays is the one that was saved, bit for bit."""
    if DIGEST not in config or digest(file) == config[DIGEST]:  # older ones have none
        return []
    return [
        f"{file.name} is not as it was saved: its SHA-256 is not the one in {CONFIG}. "
        "It was damaged or changed; copy the folder again"
    ]


def _load_method(entry: Mapping[str, Any], problems: list[str]) -> Adapter | None:
    name = entry["name"]
    options = {k: _hashable(v) for k, v in entry["options"].items()}
    try:
        constructor = find_method(name)
    except ValueError as e:
        problems.append(str(e))
        return None
    try:
        return constructor(**options)
    except (TypeError, ValueError) as e:
        problems.append(f"method {name!r} does not take the saved options: {e}")
        return None


def _hashable(value: Any) -> Any:
    """JSON's lists were tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _load_site(entry, called, methods, kernels, file, check_base, problems, common):
    """One site's node, or ``None`` with its problems added to the list."""
    path, base, own = entry["path"], entry["base"], entry.get("name", DEFAULT)
    kernel = kernels.get(path)
    count = len(problems)
    if kernel is None:
        near = nearest(path, list(kernels))
        problems.append(
            f"no leaf {path!r} in `params`; nearest: {near}. Of a tied model, an "
            "adapter of the embedding or the head alone needs names=model.names."
            if path.endswith("/embedding")
            else f"no leaf {path!r} in `params`; nearest: {near}"
        )
        return None
    if isinstance(kernel, AdaptedKernel):
        if called in (had := parts_of(kernel)):
            problems.append(f"{path!r} already carries {had[called].adapter.name!r}")
            return None
        kernel = kernel.base
    if list(kernel.shape) != base["shape"]:
        problems.append(f"{path!r} has shape {list(kernel.shape)}, was {base['shape']}")
    elif check_base and getattr(kernel, "kind", None) != base.get("quantised"):
        problems.append(
            f"{path!r} is {_kept_as(getattr(kernel, 'kind', None))}, and the adapter "
            f"was trained on {_kept_as(base.get('quantised'))}; "
            "check_base=False loads it all the same"
        )
    elif check_base and kernel.dtype.name != base["dtype"]:
        problems.append(
            f"{path!r} has dtype {kernel.dtype.name}, was {base['dtype']}; "
            "check_base=False loads it all the same"
        )
    adapter = methods[entry["method"]]
    if adapter is None or len(problems) > count:
        return None
    site = Site(
        path=path,
        roles=tuple(entry["roles"]),
        ranks=_hashable(entry["ranks"]),
        pattern=entry["pattern"],
    )
    expected = _expected_shapes(kernel, adapter, site)
    for part, names in entry["leaves"].items():
        for name in names:
            full = f"{path}/{leaf_name(own, name)}"
            if full not in file.shapes:
                problems.append(f"missing: {full!r}")
            elif expected[part].get(name) != file.shapes[full]:
                problems.append(
                    f"{full!r} has shape {list(file.shapes[full])}, should have "
                    f"{_listed(expected[part].get(name))}"
                )
        numbers = set(adapter.options.numbers)  # which may be among the options alone
        for name in sorted(set(expected[part]) - set(names) - numbers):
            problems.append(f"missing: {path + '/' + name!r}, a {part} leaf")
    if len(problems) > count:
        return None
    frozen, trainable = (
        {
            name: file.read(f"{path}/{leaf_name(own, name)}")
            for name in entry["leaves"][part]
        }
        for part in ("frozen", "trainable")
    )
    for name, x in number_leaves(adapter, working_dtype(kernel.dtype)).items():
        batch = tuple(kernel.shape[i] for i in axes_of(site.roles, BATCH))
        frozen.setdefault(name, np.broadcast_to(np.asarray(x), (*batch, *x.shape)))
    node = AdaptedKernel(kernel, frozen, trainable, adapter, site)
    problems += _wide_leaves(node)
    if adapter.folded is not None and not is_abstract(kernel):
        node = node.replace(base=fold_base(node, warn=False))
    # Of a leaf that is trained in full, nothing of the base is left: a head that was
    # drawn for the run need not be drawn again.
    replaced = adapter.where.leaf != "kernel"
    if check_base and not replaced and not _same_base(node.base, base):
        problems.append(
            f"{path!r} is not the kernel that the adapter was trained with (its "
            "fingerprint differs); check_base=False loads it all the same"
        )
    node = node.replace(
        frozen=place_leaves(node, node.frozen),
        trainable=place_leaves(node, node.trainable),
    )
    if shared := entry.get("shared"):
        node = _with_shared(node, shared, file, problems, common)
    return node if len(problems) == count else None


def _with_shared(node, shared: Mapping[str, str], file, problems, common):
    """The node with the leaves that it has in common with other sites."""
    path = node.site.path
    names = shared_names(node.adapter)
    problems += [f"missing: {path + '/' + n!r}" for n in names if n not in shared]
    problems += [f"{path + '/' + n!r} is no leaf" for n in shared if n not in names]
    lost = [t for t in shared.values() if t not in file.shapes]
    problems += [f"missing: {t!r}, a leaf of {path!r}" for t in lost]
    if lost or set(names) != set(shared):
        return node
    for tensor in shared.values():
        if tensor not in common:
            common[tensor] = put_leaf(file.read(tensor), node.base, ())
    frozen = node.frozen | {name: common[t] for name, t in shared.items()}
    node = node.replace(frozen=frozen)
    try:
        jax.eval_shape(lifted_factors, node)
    except (TypeError, ValueError):
        sizes = {name: frozen[name].shape for name in names}
        problems.append(f"{path!r}: shared leaves {sizes} do not fit its kernel")
    return node


def _kept_as(kind: str | None) -> str:
    return "floats" if kind is None else f"quantised as {kind}"


def _listed(shape) -> str:
    return "no such leaf" if shape is None else str(list(shape))


def _expected_shapes(kernel, adapter: Adapter, site: Site) -> dict[str, dict]:
    """Shapes of the leaves that attaching here would make; computes nothing."""
    has_alpha = adapter.where.alpha is not None and site.ranks is not None
    alphas = (1.0,) * len(site.ranks) if has_alpha else None  # shapes alone are read
    with warnings.catch_warnings():  # what attach has warned of already
        warnings.simplefilter("ignore")
        parts = jax.eval_shape(
            lambda key, kernel: initialise(
                key, kernel, adapter=adapter, site=site, alphas=alphas
            ),
            jax.eval_shape(lambda: jax.random.key(0)),
            jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
        )
    names = ("frozen", "trainable")
    shapes = [{name: x.shape for name, x in part.items()} for part in parts]
    return dict(zip(names, shapes, strict=True))


def _wide_leaves(node: AdaptedKernel) -> list[str]:
    """Leaves that JAX would silently narrow."""
    leaves = {**node.frozen, **node.trainable}
    return [
        f"{node.site.path + '/' + name!r} is {x.dtype.name}; set "
        'jax.config.update("jax_enable_x64", True) first'
        for name, x in leaves.items()
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
    ]


def _same_base(kernel: Any, saved: Mapping[str, Any]) -> bool:
    if "checksum" in saved:
        return checksum(kernel) == saved["checksum"]
    along, norm = projection(kernel)
    off = max(abs(along - saved["projection"]), abs(norm - saved["norm"]))
    return off <= PROJECTION_TOLERANCE * saved["norm"]


def place_leaves(node: AdaptedKernel, leaves: dict[str, Any]) -> dict[str, Any]:
    """Moves leaves to their kernel's devices, sharded along the same axes."""
    entries = leaf_entries(node)
    return {name: put_leaf(x, node.base, entries[name]) for name, x in leaves.items()}


def put_leaf(leaf: np.ndarray, kernel: Any, entries: tuple[int | None, ...]) -> Array:
    """A leaf on its kernel's devices; ``entries``: the kernel's axis behind each."""
    where = getattr(kernel, "sharding", None)
    if isinstance(where, jax.sharding.NamedSharding):
        spec = (*where.spec, *(None,) * (kernel.ndim - len(where.spec)))
        along = (None if i is None else spec[i] for i in entries)
        where = where.update(spec=jax.sharding.PartitionSpec(*along))
    if where is None:
        return jax.numpy.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, where, lambda i: leaf[i])
