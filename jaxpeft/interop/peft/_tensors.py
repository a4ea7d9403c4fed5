"""Tensors and config of adapted modules: in their methods' forms, or as plain LoRA."""

from typing import Any

import numpy as np

from jaxpeft.interop._modules import Module
from jaxpeft.interop._tensors import on_host
from jaxpeft.interop.peft._config import DEFAULTS, PREFIX, patterns_of, target_names
from jaxpeft.interop.peft._pairs import balance, pad
from jaxpeft.interop.peft._sites import AdaptedModule


def native(sites: list[AdaptedModule], modules: list[Module], problems: list[str]):
    """``(tensors, config)`` of the methods' own forms."""
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    listed: dict[str, list] = {}
    # What one site's method sets is said of all: of the others it is PEFT's default.
    usual = {
        field: DEFAULTS[site.form.peft_type][field]
        for site in sites
        for field in site.form.fields
        if field in DEFAULTS[site.form.peft_type]
    }
    for site in sites:
        form, name, kind = site.form, site.module.name, site.module.kind
        leaves = form.to_leaves(*site.ordered(), kind)
        tensors |= {f"{PREFIX}{name}.{n}": on_host(x) for n, x in leaves.items()}
        for ours, key in form.shared.items():
            _add_shared(tensors, key, on_host(site.frozen[ours].T), name, problems)
        for field, here in form.lists.items():
            listed.setdefault(field, []).extend([site.module] if here else [])
        own = {"peft_type": form.peft_type, **usual, **form.fields}
        if kind == "embedding":  # which PEFT decomposes in no way
            own.pop("init_lora_weights", None)
        _merge(config, own, name, problems)
        if site.rank is not None:
            ranks[name] = site.rank
        if site.alpha is not None:
            alphas[name] = _alpha(site)
    config = config or {"peft_type": "LORA"}
    for values, field, pattern in (
        (ranks, sites[0].form.rank if sites else "", "rank_pattern"),
        (alphas, "lora_alpha", "alpha_pattern"),
    ):
        if values:
            config[field], others = patterns_of(values)
            if sites[0].form.patterns:
                config[pattern] = others
            elif others:
                problems.append(
                    f"{config['peft_type']} has one {field} for all sites in PEFT, and "
                    f"here they differ: {sorted(set(values.values()))}; form='portable'"
                )
    return tensors, config | _lists(sites, listed, modules)


def _lists(
    sites, listed: dict[str, list[Module]], modules: list[Module]
) -> dict[str, Any]:
    """``target_modules``, and the fields that list a part of them.

    PEFT wants those to be a subset, entry by entry: so the parts are named first.
    """
    fields, names = {}, []
    rest = [site.module for site in sites]
    for field, part in listed.items():
        fields[field] = target_names(part, modules)
        names += fields[field]
        rest = [module for module in rest if module not in part]
    return fields | {"target_modules": names + target_names(rest, modules)}


def _merge(config: dict[str, Any], own: dict[str, Any], name: str, problems) -> None:
    """Adds a site's fields to the one config that there is."""
    for field, value in own.items():
        if config.setdefault(field, value) != value:
            problems.append(
                f"{name!r} needs {field}={value!r} in the one PEFT config, others "
                f"{config[field]!r}; form='portable', or save one method a folder"
            )


def _add_shared(tensors, key: str, value: np.ndarray, name: str, problems) -> None:
    """Adds a matrix that all sites have in common."""
    if key not in tensors:
        tensors[key] = value
    elif not np.array_equal(tensors[key], value):
        problems.append(
            f"{name!r} has another {key!r} than other sites, and PEFT has one for all; "
            "attach them in one call, or form='portable'"
        )


def _alpha(site: AdaptedModule) -> int | float:
    """The alpha that gives the site's scale, as JSON writes a number."""
    return int(site.alpha) if site.alpha.is_integer() else site.alpha


def plain(
    sites: list[AdaptedModule],
    rank: int | None,
    modules: list[Module],
    problems: list[str],
):
    """``(tensors, config, errors)`` of plain LoRA, one rank for all.

    What PEFT does with the sum of kernel and pair (``PeftForm.beside``) goes along.
    """
    pairs, errors = {}, {}
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {"peft_type": "LORA"}
    usual = DEFAULTS["LORA"]
    fields = {f: usual[f] for site in sites for f in site.form.beside_fields}
    for site in sites:
        name = site.module.name
        left, right = map(on_host, site.pair())
        a, b, error = balance(left, right[:, site.order], rank)
        pairs[name] = (a, b, site.module.kind)
        if error > 1e-6:  # more than rounding
            errors[name] = error
        for ours, end in site.form.beside.items():
            value = site.ordered()[1][ours]
            tensors[f"{PREFIX}{name}.{end}"] = on_host(value.T)
        _merge(config, fields | dict(site.form.beside_fields), name, problems)
    top = rank or max((a.shape[1] for a, *_ in pairs.values()), default=8)
    for name, (a, b, kind) in pairs.items():
        a, b = pad(a, b, top)
        ends = ("lora_A.weight", "lora_B.weight")
        if kind == "embedding":
            ends = ("lora_embedding_A", "lora_embedding_B")
        for end, x in zip(ends, (a, b), strict=True):
            tensors[f"{PREFIX}{name}.{end}"] = on_host(x.T)
    config |= _lists(sites, {}, modules) | {"r": top, "lora_alpha": top}
    return tensors, config, errors
