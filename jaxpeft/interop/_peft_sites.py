"""The adapted modules of a tree, and the form in which PEFT can have them."""

from typing import NamedTuple

import numpy as np

from jaxpeft.core import AdaptedKernel
from jaxpeft.core._lift import layer_leaves, padded, unpadded_layers
from jaxpeft.interop._modules import Module, Table
from jaxpeft.interop._tensors import on_host

OTHER_WAYS = (
    "jaxpeft.merge and save_hf write a whole model, save_adapter writes jaxpeft's own "
    "file"
)


class AdaptedModule(NamedTuple):
    """One adapted module: one layer of one of our nodes."""

    module: Module
    node: AdaptedKernel
    frozen: dict[str, np.ndarray]
    trainable: dict[str, np.ndarray]
    rank: int | None
    alpha: float | None


def is_finite(x: np.ndarray) -> bool:
    """Whether all of a floating array is."""
    return bool(np.all(np.isfinite(x.astype(np.float32))))


def collect(
    table: Table, untie: bool, problems: list[str]
) -> tuple[list[AdaptedModule], list[Module]]:
    """Adapted modules, and modules of which a leaf is trained in full."""
    sites: dict[str, AdaptedModule] = {}
    whole: dict[str, Module] = {}
    for path, node in table.leaves.items():
        if not isinstance(node, AdaptedKernel):
            continue
        form, modules = node.adapter.peft, table.by_leaf.get(path)
        if modules is None:
            problems.append(
                f"{path!r} is in no row of `names`; add a row for its module"
            )
        elif form is None:
            problems.append(
                f"{path!r}: {node.adapter.name!r} has no form in PEFT; {OTHER_WAYS}"
            )
        elif form.whole:
            whole |= {module.name: module for module in modules}
        else:
            for module, *leaves in zip(modules, *_layers(node), strict=True):
                if module.row.tied and not untie:
                    problems.append(
                        f"{module.name!r} shares its weight with {module.row.tied!r}: "
                        "PEFT's adapter would act on the look-up alone and not be the "
                        "same function; merge instead, or write untie=True"
                    )
                sites[module.name] = site = AdaptedModule(module, node, *leaves)
                problems += [
                    f"{module.name!r}: leaf {leaf!r} is not finite"
                    for leaf, x in {**site.frozen, **site.trainable}.items()
                    if not is_finite(x)
                ]
    order = [m.name for m in table.modules]
    ordered = sorted(sites.values(), key=lambda site: order.index(site.module.name))
    return ordered, list(whole.values())


def _layers(node: AdaptedKernel):
    """``(frozen, trainable, ranks, alphas)``, one entry a layer, on the host."""
    host = node.replace(
        frozen={n: on_host(x) for n, x in node.frozen.items()},
        trainable={n: on_host(x) for n, x in node.trainable.items()},
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
    none = (None,) * len(each)
    site = node.site
    plain = lambda leaves: {n: np.asarray(x) for n, x in leaves.items()}
    frozen, trainable = (tuple(map(plain, part)) for part in zip(*each, strict=True))
    return frozen, trainable, site.ranks or none, site.alphas or none


def choose_form(form: str, sites: list[AdaptedModule], problems: list[str]) -> str:
    """``"native"`` or ``"portable"``; what stands in the way goes to ``problems``."""
    if form == "auto":
        redone = [
            s.node.adapter.peft.redone or s.node.adapter.peft.peft_type is None
            for s in sites
        ]
        form = "portable" if any(redone) else "native"
    for site in sites:
        method, own, name = site.node.adapter, site.node.adapter.peft, site.module.name
        if form == "portable" and own.pair is None:
            problems.append(
                f"{name!r}: the change that {method.name!r} makes is not of low rank "
                f"and cannot be plain LoRA; form='native', or {OTHER_WAYS}"
            )
        if form == "native" and (own.peft_type is None or own.refusal):
            why = own.refusal or f"PEFT has no {method.name!r}"
            problems.append(f"{name!r}: {why}; form='portable' writes plain LoRA")
        elif form == "native" and site.module.kind not in own.kinds:
            problems.append(
                f"{name!r}: PEFT has no {method.name!r} on a module of kind "
                f"{site.module.kind!r}; form='portable' writes plain LoRA"
            )
        if site.module.kind == "norm":
            problems.append(f"{name!r} is a norm; PEFT has no adapter for it")
    return form
