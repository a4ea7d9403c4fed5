"""From an adapter folder of HF PEFT to an adapted tree: everything fits, or nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpeft.interop._format import forms
from jaxpeft.interop._modules import MATRICES, Module, Table
from jaxpeft.interop._tensors import TensorFile
from jaxpeft.interop._untie import untied_for
from jaxpeft.interop.peft._attach import Found, attach_sites, attach_whole
from jaxpeft.interop.peft._config import (
    CONFIG,
    PREFIX,
    TENSORS,
    read_config,
)
from jaxpeft.interop.peft._rules import (
    NO_TARGETS,
    by_pattern,
    is_target,
    listed,
    with_tied,
)
from jaxpeft.interop.peft._sites import NOT_CALLED
from jaxpeft.interop.peft._tied import bound, settle, tables
from jaxpeft.interop.peft._whole import (
    Keys,
    by_leaf,
    check_copies,
    partial,
    whole_leaves,
)
from jaxpeft.models import ModuleName
from jaxpeft.parts import form_of
from jaxpeft.tree import Adapter, grouped, init_shapes, is_node, matrix_shape, nearest


def load_peft(
    folder: str | Path,
    params: PyTree,
    *,
    names: Sequence[ModuleName],
    axes: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
) -> PyTree:
    """Attaches an adapter that HF PEFT wrote.

    The tree that comes back trains on like any other: PEFT's factors are the trained
    leaves, in float32, and modules that PEFT saved whole are trained in full. Targets,
    ranks and alphas are resolved by PEFT's own rules. What PEFT's method decomposes,
    it decomposes anew on every load, and so does this. Either everything in the file
    is used and all that the config asks for is in the file, or one error lists what
    is not.

    Of a model that ties its head to its embedding PEFT adapts one of the two, unless
    ``ensure_weight_tying`` is set: the tree that comes back is then untied
    (``untie``), and the same model runs it. Embeddings that
    ``save_embedding_layers`` left in the file must be those of ``params``; where they
    are others, and nothing adapts them, they take their place and are trained.

    Args:
        folder: an adapter folder, with ``adapter_config.json`` and
            ``adapter_model.safetensors``. A second, named adapter is a sub-folder.
        params: the plain parameter tree; it may carry adapters at other sites.
        names: what the modules are called in the checkpoint: ``model.names`` of our
            models, or rows of your own.
        axes: roles of the axes of kernels, as in ``attach``; ``model.axes``.
        ignore: fields of the config that are to be overlooked. With
            ``"target_modules"`` the sites are those that the file has leaves for.

    Returns:
        The adapted tree; ``jaxpeft.describe`` shows its sites.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are not safetensors or not finite, a file lies outside
            of the folder, the config asks for what is not done here, or file, config
            and tree do not fit. Nothing is loaded then.

    Example:
        >>> import tempfile, jax, jaxpeft as jp
        >>> from jaxpeft import interop
        >>> params = {"q": {"kernel": jax.numpy.ones((4, 6))}}
        >>> adapted = jp.attach(params, jp.lora(2), ["q"], key=jax.random.key(0))
        >>> names = [jp.models.ModuleName("attention.q_proj", "q", "linear")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = interop.save_peft(adapted, folder, names=names)
        ...     again = load_peft(folder, params, names=names)
        >>> bool((again["q"]["kernel"].trainable["a"] ==
        ...       adapted["q"]["kernel"].trainable["a"]).all())
        True

    References:
        The format is that of huggingface/peft 0.21.
    """
    folder = Path(folder)
    _check_files(folder)
    config = read_config(folder, ignore)
    file = TensorFile(folder / TENSORS)
    table, tied = tables(params, names, axes)
    config = with_tied(config, table.rows)
    problems: list[str] = []
    shared = {key for _, form in forms().values() for key in form.shared.values()}
    keys = _keys(file, table, shared, problems)
    found = _sites(config, table, keys, file, problems, "target_modules" in ignore)
    whole = whole_leaves(config, table, keys, file, problems)
    methods = {site.module.name: site.adapter for site in found}
    copies, other = check_copies(table, keys, file, methods, whole, problems)
    whole += other
    used = {key for site in found for key in site.keys.values()} | copies
    used |= {each.key for each in whole}
    used |= {key for site in found for key in form_of(site.adapter).shared.values()}
    for ends in keys.values():
        for key in ends.values():
            if key not in used:
                problems.append(f"left over: {key!r} is not what the config asks for")
    _check_shared(found, table, file, problems)
    found, whole = settle(config, table, tied, keys, found, whole, file, problems)
    sites, leaves = _by_leaf(found, problems), by_leaf(whole, problems)
    problems += file.not_finite(used & set(file.shapes))
    if problems:
        lines = grouped(problems)
        raise ValueError(
            f"the adapter in {str(folder)!r} does not fit; nothing was loaded:\n  "
            + lines
        )
    paths = {*sites, *leaves}
    table = tied if paths <= tied.leaves.keys() else table
    tree = untied_for(params, table.rows, paths)
    # By identity: equal methods may differ in numbers, which are leaves.
    adapters = {id(each[0].adapter): each[0].adapter for each in sites.values()}
    for adapter in adapters.values():
        own = {p: each for p, each in sites.items() if each[0].adapter is adapter}
        tree = attach_sites(tree, adapter, own, file, table.words, config)
    return attach_whole(tree, table, leaves, file)


def _check_files(folder: Path) -> None:
    """The two files are there, are no pickles, and lie where they seem to."""
    if not (folder / TENSORS).is_file():
        others = [
            p.name
            for end in ("*.bin", "*.pt", "*.pth")
            for p in sorted(folder.glob(end))
        ]
        if others:
            raise ValueError(
                f"{str(folder)!r} has its weights in {others}, which is pickled code "
                "and never opened here. Write them anew in PEFT: "
                "model.save_pretrained(folder2)."
            )
        if (folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"`folder` {str(folder)!r} holds {CONFIG} but no {TENSORS}; copy both."
            )
        return  # the config's own error says more
    home = folder.resolve()
    # The hub's cache keeps files in .../blobs and links to them from .../snapshots.
    if home.parent.name == "snapshots":
        home = home.parent.parent
    for name in (CONFIG, TENSORS):
        real = (folder / name).resolve()
        if (folder / name).is_file() and not real.is_relative_to(home):
            raise ValueError(
                f"{name} in {str(folder)!r} is a link to {str(real)!r}, outside of the "
                "folder; copy the file itself."
            )


def _keys(file: TensorFile, table: Table, shared: set[str], problems) -> Keys:
    """The file's keys by the module that they belong to."""
    found: Keys = {"": {key: key for key in shared & set(file.shapes)}}
    for key in sorted(set(file.shapes) - shared):
        if not key.startswith(PREFIX):
            problems.append(f"left over: {key!r} does not begin with {PREFIX!r}")
            continue
        # Old files have the adapter's name in their keys.
        parts = [p for p in key.removeprefix(PREFIX).split(".") if p != "default"]
        names = (".".join(parts[:i]) for i in reversed(range(1, len(parts))))
        name = next((n for n in names if n in table.by_name), None)
        if name is None and (why := bound(table, key.removeprefix(PREFIX))):
            problems.append(f"{key!r}: {why}")
            continue
        if name is None:
            near = nearest(key.removeprefix(PREFIX), list(table.by_name))
            problems.append(
                f"left over: {key!r} belongs to no module of the model; nearest: "
                f"{near}. The weights of a head need a model with that head."
            )
            continue
        end = ".".join(parts[len(name.split(".")) :])
        if end in found.setdefault(name, {}):
            problems.append(f"{key!r} and {found[name][end]!r} are the same leaf")
        found[name][end] = key
    return found


def _sites(config, table, keys: Keys, file, problems, by_keys: bool) -> list[Found]:
    """What the config asks for and the file has, module by module."""
    candidates = [m for m in table.modules if m.kind in MATRICES]
    wanted = config["target_modules"]
    if wanted is None and not by_keys:
        problems.append(
            f"{CONFIG} has no target_modules, which PEFT would choose by the model's "
            "type; ignore=['target_modules'] takes the modules that the file has "
            "leaves for"
        )
        return []
    if wanted is None:
        plain = ("weight", "bias", "base_layer.weight", "base_layer.bias")
        modules = [m for m in candidates if set(keys.get(m.name, ())) - set(plain)]
    else:
        modules = [m for m in candidates if is_target(config, m.name, m.kind)]
        if wanted and not modules and wanted != NO_TARGETS:
            problems.append(
                f"target_modules {wanted!r} matches no module; they are named like "
                f"{nearest('', list(table.by_name))}"
            )
    found = [_site(config, m, table, keys, file, problems) for m in modules]
    return [site for site in found if site is not None]


def _site(config, module: Module, table, keys: Keys, file, problems) -> Found | None:
    name, count = module.name, len(problems)
    path = module.leaves.get("weight")
    if path is None or is_node(table.leaves[path]):
        why = "has no weight" if path is None else "already carries an adapter"
        problems.append(f"{name!r} {why} in `params`")
        return None
    if not module.row.called:
        problems.append(f"{name!r} {NOT_CALLED}")
        return None
    adapter = _method(_at_module(config, name), module.kind, problems)
    if adapter is None:
        return None
    rank = alpha = None
    if adapter.where.rank is not None:
        rank, alpha = adapter.where.rank, adapter.where.alpha
        if form_of(adapter).patterns:
            rank = by_pattern(config["rank_pattern"], name, rank)
            alpha = by_pattern(config["alpha_pattern"], name, alpha)
    try:
        expected = _expected(adapter, module, table, rank)
    except ValueError as e:
        problems.append(f"{name!r}: {e}")
        return None
    ends = {e.removesuffix(".weight"): k for e, k in keys.get(name, {}).items()}
    known = {end: ends.get(end.removesuffix(".weight")) for end in expected}
    problems += [
        f"missing: {PREFIX + name + '.' + end!r}" for end in known if not known[end]
    ]
    if len(problems) > count:
        return None
    found = {end: tuple(file.shapes[key]) for end, key in known.items()}
    if form_of(adapter).arrange is not None:  # a file may leave parts of leaves out
        dummies = {e: np.broadcast_to(np.float32(0), s) for e, s in found.items()}
        try:
            made = form_of(adapter).arrange(config, name, dummies)
        except ValueError as e:
            problems.append(f"{name!r}: {e}")
            return None
        found = {end: x.shape for end, x in made.items()}
    problems += [
        f"{known[end]!r} has shape {list(found[end])}; config and model make it "
        f"{list(shape)}"
        for end, shape in expected.items()
        if found[end] != shape
    ]
    if len(problems) > count:
        return None
    return Found(module, adapter, rank, alpha, known)


def _at_module(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The config with the fields that list modules as whether this one is listed."""
    fields = {field for _, form in forms().values() for field in form.lists}
    return config | {
        field: listed(config[field], name, dotted=False)
        for field in fields & config.keys()
    }


def _check_shared(found: list[Found], table: Table, file, problems) -> None:
    """The matrices that sites have in common are there, in the sites' largest sizes."""
    first = next((site for site in found if form_of(site.adapter).shared), None)
    if first is None or problems:
        return
    sizes = [_sizes(site.module, table) for site in found]
    d_in, d_out = (max(each) for each in zip(*sizes, strict=True))
    made = jax.eval_shape(
        lambda: first.adapter.shared(
            jax.random.key(0), d_in, d_out, first.rank, jnp.float32
        )
    )
    for ours, key in form_of(first.adapter).shared.items():
        shape = made[ours].shape[::-1]
        if file.shapes.get(key) != shape:
            problems.append(
                f"missing: {key!r}"
                if key not in file.shapes
                else f"{key!r} has shape {list(file.shapes[key])}; the sites make it "
                f"{list(shape)}"
            )


def _sizes(module: Module, table: Table) -> tuple[int, int]:
    """``(d_in, d_out)`` of a module's kernel."""
    path = module.leaves["weight"]
    roles = table.matrix_roles(module, path)
    return matrix_shape(table.leaves[path].shape, roles)[1:]


def _method(config: Mapping[str, Any], kind: str, problems) -> Adapter | None:
    """The one method that reads this config, with its options."""
    claims = {}
    for name, (constructor, form) in forms().items():
        try:
            options = form.read(config, kind) if form.read else None
        except ValueError as e:
            problems.append(str(e))
            return None
        if options is not None:
            claims[name] = lambda c=constructor, o=options: c(**o)
    if len(claims) == 1:
        (build,) = claims.values()
        try:
            return build()
        except (TypeError, ValueError) as e:
            problems.append(f"the config's settings are not possible: {e}")
            return None
    said = ("peft_type", "init_lora_weights", "use_dora", "kasa_config", "bias")
    known = {field: config[field] for field in said if field in config}
    problems.append(
        f"no method here is what PEFT does on modules of kind {kind!r} with {known}: "
        "convert the adapter to plain LoRA in PEFT (path_initial_model_for_weight_"
        "conversion), or merge it there and load the model"
        if not claims
        else f"several methods read this config: {sorted(claims)}"
    )
    return None


def _expected(adapter: Adapter, module: Module, table: Table, rank):
    """``{end of the key: shape}`` that this method makes at this module."""
    d_in, d_out = _sizes(module, table)
    parts = init_shapes.__wrapped__(adapter, d_in, d_out, rank, jnp.dtype("float32"))
    leaves = jax.eval_shape(
        lambda f, t: form_of(adapter).to_leaves(f, t, module.kind), *parts
    )
    return {end: tuple(x.shape) for end, x in leaves.items()}


def _by_leaf(found: list[Found], problems) -> dict[str, list[Found]]:
    """Sites by our kernel; all layers of a stack, by one method."""
    sites: dict[str, list[Found]] = {}
    for site in found:
        sites.setdefault(site.module.leaves["weight"], []).append(site)
    for path, each in sites.items():
        if len(each) < each[0].module.layers and not problems:
            problems.append(partial(path, [site.module for site in each]))
    return sites
