"""The adapted modules of a tree, and the form in which PEFT can have them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._tensors import is_finite, on_host
from jaxpeft.lowrank import is_plain
from jaxpeft.models import ModuleName
from jaxpeft.parts import PeftForm, form_of
from jaxpeft.tree import (
    OUT,
    AdaptedKernel,
    Adapter,
    alphas_of,
    change,
    layer_leaves,
    leaf_axes,
    matrix_shape,
    options_of,
    padded,
    shared_names,
    structure_of,
    unpadded_layers,
)

OTHER_WAYS = (
    "jaxpeft.merge and save_hf write a whole model, save_adapter writes jaxpeft's own "
    "file"
)


NOT_CALLED = (
    "is a module that transformers' class never calls: it reads the weight alone, so "
    "that an adapter of PEFT's beside it does nothing before it is merged. Merge it, "
    "or have the weight trained in full (modules_to_save), which the class does read"
)


class AdaptedModule(NamedTuple):
    """One adapted module: one layer of one of our nodes."""

    module: Module
    node: AdaptedKernel
    frozen: dict[str, np.ndarray]
    trainable: dict[str, np.ndarray]
    rank: int | None
    alpha: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return matrix_shape(self.node.base.shape, self.node.roles)[1:]

    @property
    def order(self) -> np.ndarray:
        """Which of our output features is each of the checkpoint's."""
        return self.module.order(self.shape[1])

    def ordered(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """``(frozen, trainable)`` with output features in the checkpoint's order."""
        axes = leaf_axes(self.node.adapter, self.rank)
        return tuple(
            {n: reordered(x, names.get(n, ()), self.order) for n, x in part.items()}
            for part, names in zip((self.frozen, self.trainable), axes, strict=True)
        )

    def pair(self) -> tuple[Array, Array]:
        """``(a, b)`` with ``a b`` what is added to the original kernel."""
        return _pair(self.node.adapter, self.shape, self.frozen, self.trainable)

    @property
    def form(self) -> PeftForm:
        """The method's."""
        return form_of(self.node.adapter, options_of(self.node))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pair(adapter: Adapter, shape: tuple[int, int], frozen, trainable):
    # What terms are made of is not the kernel's values, and what is not asked for is
    # not computed.
    terms = change(adapter, jnp.zeros(shape), frozen, trainable).terms
    return (
        jnp.concatenate([term.a for term in terms], 1),
        jnp.concatenate([term.b for term in terms], 0),
    )


class Collected(NamedTuple):
    """What of a tree goes into a file.

    Attributes:
        sites: modules with an adapter, in the order of the table.
        whole: modules of which the weight is trained in full.
        biases: modules of which the bias alone is.
        modules: all modules that there are in PEFT; of a tied table, both.
        tying: whether the two of a tied table are to have one adapter.
    """

    sites: list[AdaptedModule]
    whole: list[Module]
    biases: list[Module]
    modules: list[Module]
    tying: bool


def reordered(x: np.ndarray, axes: tuple, order: np.ndarray) -> np.ndarray:
    """A leaf with its out axis, where it has one, in another order."""
    return np.take(x, order, axes.index(OUT)) if OUT in axes else x


def collect(table: Table, untie: bool, problems: list[str]) -> Collected:
    """Sorts a tree's adapted leaves; what cannot be sorted goes to ``problems``."""
    sites: dict[str, AdaptedModule] = {}
    trained: dict[str, set[str]] = {}
    heads: dict[str, Module] = {}  # of tied tables that are adapted, by the table's
    host = _Host()
    for path, node in table.leaves.items():
        if not isinstance(node, AdaptedKernel):
            continue
        form, modules = form_of(node.adapter), table.by_leaf.get(path)
        if modules is None:
            problems.append(
                f"{path!r} is in no row of `names`; add a row for its module"
            )
            continue
        if form is None:
            problems.append(
                f"{path!r}: {node.adapter.name!r} has no form in PEFT; {OTHER_WAYS}"
            )
            continue
        (module, *_) = modules
        if path == module.leaves.get("weight") and module.row.tied and not untie:
            # A table that is written whole is so as it lies, for both.
            kind = "embedding" if is_whole(node) else "linear"
            row = ModuleName(module.row.tied, module.row.ours, kind)
            heads[module.name] = module._replace(name=row.theirs, row=row)
            if not is_whole(node) and not is_plain(node.adapter):
                problems.append(
                    f"{module.name!r} shares its weight with {module.row.tied!r}, and "
                    f"{node.adapter.name!r} changes both as one matrix, which PEFT "
                    "does not: merge instead; untie=True writes another function, the "
                    "adapter of the look-up alone"
                )
        if is_whole(node):
            for module in modules:
                part = "weight" if path == module.leaves.get("weight") else "bias"
                trained.setdefault(module.name, set()).add(part)
            continue
        for module, *leaves in zip(modules, *host.layers(node), strict=True):
            site = AdaptedModule(module, node, *leaves)
            if site.rank == 0:
                continue  # PEFT raises on it: the layer is its kernel
            sites[module.name] = site
            if head := heads.get(module.name):
                sites[head.name] = _turned(site, head)
            problems += [
                f"{module.name!r}: leaf {leaf!r} is not finite"
                for leaf, x in {**site.frozen, **site.trainable}.items()
                if not is_finite(x)
            ]
    for name, head in heads.items():
        if "weight" in trained.get(name, ()):
            trained[head.name] = {"weight"}
    modules = [*table.modules, *heads.values()]
    both = [n for n, parts in trained.items() if "weight" in parts and n in sites]
    problems += [f"{n!r} is trained in full and has an adapter as well" for n in both]
    whole = [m for m in modules if "weight" in trained.get(m.name, ())]
    biases = [m for m in modules if trained.get(m.name) == {"bias"}]
    ordered = [sites[m.name] for m in modules if m.name in sites]
    return Collected(ordered, whole, biases, modules, bool(heads))


def _turned(site: AdaptedModule, head: Module) -> AdaptedModule:
    """A plain adapter of a table, as that of the head that is its transpose."""
    there = dataclasses.replace(site.node.site, roles=site.node.roles[::-1])
    a, b = site.trainable["a"], site.trainable["b"]
    return site._replace(
        module=head, node=site.node.replace(site=there), trainable={"a": b.T, "b": a.T}
    )


class _Host:
    """Leaves brought to the host; those that sites share only once."""

    def __init__(self) -> None:
        self._shared: dict[int, np.ndarray] = {}

    def layers(self, node: AdaptedKernel):
        """``(frozen, trainable, ranks, alphas)``, one entry a layer."""
        common = {
            name: self._shared.setdefault(id(node.frozen[name]), None)
            for name in shared_names(node.adapter)
        }
        for name, x in common.items():
            if x is None:
                x = common[name] = on_host(node.frozen[name])
                self._shared[id(node.frozen[name])] = x
        own = {n: on_host(x) for n, x in node.frozen.items() if n not in common}
        host = node.replace(
            frozen=own, trainable={n: on_host(x) for n, x in node.trainable.items()}
        )
        if padded(host):
            each = unpadded_layers(host)
        else:
            parts = layer_leaves(host)
            count = len(next(iter({**parts[0], **parts[1]}.values())))
            each = [
                tuple({n: x[i] for n, x in part.items()} for part in parts)
                for i in range(count)
            ]
        none, site = (None,) * len(each), node.site
        plain = lambda leaves: {n: np.asarray(x) for n, x in leaves.items()}
        frozen = [plain(f) | common for f, _ in each]
        trainable = [plain(t) for _, t in each]
        return frozen, trainable, site.ranks or none, alphas_of(node) or none


def decomposed_tie(name: str, method: Adapter, rows: Sequence[ModuleName]) -> str:
    """Why a method that decomposes the base has no place on a tied head in PEFT."""
    tied = {row.tied: row.theirs for row in rows if row.tied}
    if name not in tied or not form_of(method).redone:
        return ""
    return (
        f"{name!r}: what {method.name!r} takes out of the weight, PEFT takes out of "
        f"that of {tied[name]!r}, which is the same one, so that its look-up changes "
        "too"
    )


def is_whole(node: AdaptedKernel) -> bool:
    """Whether the leaf's new value is written in place of the leaf."""
    return node.adapter.where.leaf != "kernel"


def _has_pair(site: AdaptedModule, form: str) -> bool:
    """Whether a module can be plain LoRA, and what PEFT puts beside it."""
    found = structure_of(site.node)
    if found.scales and site.form.beside and form != "portable":
        return True
    return found.only_adds


def choose_form(
    form: str,
    sites: list[AdaptedModule],
    rows: Sequence[ModuleName],
    problems: list[str],
) -> str:
    """``"native"``, ``"converted"`` or ``"portable"``, and what stands in its way."""
    if form == "auto":
        redone = [s.form.redone or s.form.peft_type is None for s in sites]
        form = "converted" if any(redone) else "native"
    for site in sites:
        name, method = site.module.name, site.node.adapter.name
        if site.module.kind == "norm":
            problems.append(f"{name!r} is a norm; PEFT has no adapter for it")
        if not site.module.row.called:
            problems.append(f"{name!r} {NOT_CALLED}")
        if form == "native":
            if why := decomposed_tie(name, site.node.adapter, rows):
                problems.append(f"{why}; form='auto' writes plain LoRA")
            if site.form.peft_type is None or site.form.refusal:
                why = site.form.refusal or f"PEFT has no {method!r}"
                problems.append(f"{name!r}: {why}; form='auto' writes plain LoRA")
            elif site.form.shared and site.module.row.interleaved:
                problems.append(
                    f"{name!r}: the matrices that all sites share cannot follow the "
                    "order of one site's heads; form='portable' writes plain LoRA"
                )
            elif site.module.kind not in site.form.kinds:
                problems.append(
                    f"{name!r}: PEFT has no {method!r} on a module of kind "
                    f"{site.module.kind!r}; form='auto' writes plain LoRA"
                )
        elif not _has_pair(site, form):
            problems.append(
                f"{name!r}: the change that {method!r} makes is not of low rank and "
                f"cannot be plain LoRA; form='native', or {OTHER_WAYS}"
            )
    return form
