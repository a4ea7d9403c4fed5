"""Allocations as HF PEFT's ``rank_pattern`` and ``alpha_pattern``, and back."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.parts import in_layers, listed
from jaxpeft.tree import Allocation, KernelShape, ModuleName, SiteRank, module_path


def to_peft(allocation: Allocation, names: Sequence[ModuleName]) -> dict[str, Any]:
    """Returns the fields of a ``LoraConfig`` of these ranks.

    Every module is named by its whole path, so that layer 1 is not layer 11. (PEFT's
    scale is alpha / rank of the module itself.)

    Args:
        allocation: ranks and alphas.
        names: what the modules are called there: ``model.names``.

    Returns:
        ``r``, ``lora_alpha``, ``target_modules``, ``rank_pattern``, ``alpha_pattern``
        and ``use_rslora``, JSON-able.

    Raises:
        ValueError: a site is in no row of ``names``, or no site has a rank.

    Example:
        >>> allocation = Allocation.of({"layer_1/q/kernel": SiteRank(2, 4.0)})
        >>> to_peft(allocation, [ModuleName("h.{i}.q", "layer_{i}/q", "linear")])
        {'r': 2, 'lora_alpha': 4, 'target_modules': ['h.1.q'], 'rank_pattern': \
{'h.1.q': 2}, 'alpha_pattern': {'h.1.q': 4}, 'use_rslora': False}
    """
    ranks, alphas = {}, {}
    for path, site in allocation.sites:
        each = site.layers()
        stacked = isinstance(site.rank, tuple)
        modules = _modules(path, len(each) if stacked else None, names)
        for module, (rank, alpha) in zip(modules, each, strict=True):
            if rank:
                ranks[module] = rank
                alphas[module] = int(alpha) if alpha == int(alpha) else alpha
    if not ranks:
        raise ValueError("`allocation` gives every site rank 0")
    (rank, alpha), _ = collections.Counter(
        zip(ranks.values(), alphas.values(), strict=True)
    ).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": False,
    }


def from_peft(
    config: Mapping[str, Any],
    names: Sequence[ModuleName],
    shapes: Mapping[str, KernelShape],
) -> Allocation:
    """Reads ranks and alphas out of a ``LoraConfig``, by PEFT's own rules.

    Args:
        config: its fields, ``json.load`` of an ``adapter_config.json``.
        names: what the modules are called there.
        shapes: the sites to look for, of ``kernel_shapes``; those that the config does
            not target have rank 0.

    Returns:
        The allocation.

    Raises:
        ValueError: the config is of rsLoRA, whose scale is not alpha / rank; or one of
            its targets or patterns names none of the sites.
    """
    if config.get("use_rslora"):
        raise ValueError(
            "`config` has use_rslora, where the scale is alpha / sqrt(rank): attach "
            "jaxpeft.rslora with these patterns by hand"
        )
    wanted, excluded = config["target_modules"], config.get("exclude_modules")
    patterns = {n: config.get(f"{n}_pattern") or {} for n in ("rank", "alpha")}
    used: set[str] = set()

    def value(what: str, default: Any, module: str) -> Any:
        for pattern, found in patterns[what].items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                used.add(pattern)
                return found
        return config.get(default, 8)

    def targeted(module: str) -> bool:
        if isinstance(wanted, str):
            if wanted == "all-linear" or re.fullmatch(wanted, module):
                used.add(wanted)
                return True
            return False
        hits = {t for t in wanted if module == t or module.endswith(f".{t}")}
        used.update(hits)
        return module in hits or bool(hits) and in_layers(config, module)

    sites = {}
    for path, shape in shapes.items():
        pairs = []
        for module in _modules(path, shape.layers, names):
            hit = targeted(module) and not listed(excluded, module)
            rank = value("rank", "r", module) if hit else 0
            alpha = value("alpha", "lora_alpha", module) if hit else 0
            pairs.append((rank, float(alpha)))
        if shape.layers is None:
            sites[path] = SiteRank(*pairs[0])
        else:
            sites[path] = SiteRank(*(tuple(x) for x in zip(*pairs, strict=True)))
    every = {wanted} if isinstance(wanted, str) else set(wanted)
    if dead := (every | set(patterns["rank"]) | set(patterns["alpha"])) - used:
        raise ValueError(
            f"`config` names {sorted(dead)[:5]}, which is none of the {len(shapes)} "
            "sites of `shapes`"
        )
    return Allocation.of(sites, {"allocator": "peft"})


def _modules(path: str, layers: int | None, names: Sequence[ModuleName]) -> list[str]:
    """What PEFT calls the module of a site, or of each layer of a stack."""
    name = module_path(path).removeprefix("params/")
    for row in names:
        before, counted, after = row.ours.partition("{i}")
        expression = re.escape(before) + (r"(\d+)" if counted else "")
        if not (match := re.fullmatch(expression + re.escape(after), name)):
            continue
        if counted:
            return [row.theirs.replace("{i}", match[1])]
        if layers is None:
            return [row.theirs]
        return [row.theirs.replace("{i}", str(i)) for i in range(layers)]
    raise ValueError(f"site {path!r} is in no row of `names`; add a row for its module")
