"""Allocations as HF PEFT's ``rank_pattern`` and ``alpha_pattern``, and back."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.allocate import Allocation, KernelShape, SiteRank
from jaxpeft.interop.peft._rules import (
    NO_TARGETS,
    by_pattern,
    fitting_pattern,
    is_target,
    target_entries,
    with_tied,
)
from jaxpeft.models import ModuleName
from jaxpeft.tree import module_path


def allocation_to_peft(
    allocation: Allocation, names: Sequence[ModuleName]
) -> dict[str, Any]:
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
        >>> names = [ModuleName("h.{i}.q", "layer_{i}/q", "linear")]
        >>> allocation_to_peft(allocation, names)
        {'r': 2, 'lora_alpha': 4, 'target_modules': ['h.1.q'], 'rank_pattern': \
{'h.1.q': 2}, 'alpha_pattern': {'h.1.q': 4}, 'use_rslora': False}
    """
    ranks, alphas = {}, {}
    for path, site in allocation.sites:
        each = site.layers()
        stacked = isinstance(site.rank, tuple)
        _, modules = _modules(path, len(each) if stacked else None, names)
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


def allocation_from_peft(
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
        ValueError: the config is of rsLoRA, whose scale is not alpha / rank; it has no
            targets; or one of its targets or patterns names none of the sites. A
            target that names only sites which another field leaves out is none of
            those.
    """
    if config.get("use_rslora"):
        raise ValueError(
            "`config` has use_rslora, where the scale is alpha / sqrt(rank): attach "
            "jaxpeft.rslora with these patterns by hand"
        )
    if (wanted := config.get("target_modules")) is None:
        raise ValueError(
            "`config` has no target_modules, which PEFT would choose by the model's "
            "type; write the modules, or 'all-linear'"
        )
    ranks, alphas = (config.get(f"{x}_pattern") or {} for x in ("rank", "alpha"))
    full = with_tied(config, names)
    used: set[str | None] = {NO_TARGETS}

    def rank_of(row: ModuleName, module: str) -> tuple[int, float]:
        used.update(target_entries(config, module, row.kind))
        if not is_target(full, module, row.kind):
            return 0, 0.0
        used.update(fitting_pattern(x, module) for x in (ranks, alphas))
        alpha = by_pattern(alphas, module, config.get("lora_alpha", 8))
        return by_pattern(ranks, module, config.get("r", 8)), float(alpha)

    sites = {}
    for path, shape in shapes.items():
        row, modules = _modules(path, shape.layers, names)
        pairs = [rank_of(row, module) for module in modules]
        if shape.layers is None:
            sites[path] = SiteRank(*pairs[0])
        else:
            sites[path] = SiteRank(*(tuple(x) for x in zip(*pairs, strict=True)))
    every = {wanted} if isinstance(wanted, str) else set(wanted)
    if dead := (every | set(ranks) | set(alphas)) - used:
        raise ValueError(
            f"`config` names {sorted(dead)[:5]}, which is none of the {len(shapes)} "
            "sites of `shapes`"
        )
    return Allocation.of(sites, {"allocator": "peft"})


def _modules(
    path: str, layers: int | None, names: Sequence[ModuleName]
) -> tuple[ModuleName, list[str]]:
    """A site's row, and what PEFT calls its module, or that of each of its layers."""
    name = module_path(path).removeprefix("params/")
    for row in names:
        before, counted, after = row.ours.partition("{i}")
        expression = re.escape(before) + (r"(\d+)" if counted else "")
        if not (match := re.fullmatch(expression + re.escape(after), name)):
            continue
        if counted:
            return row, [row.theirs.replace("{i}", match[1])]
        if layers is None:
            return row, [row.theirs]
        return row, [row.theirs.replace("{i}", str(i)) for i in range(layers)]
    raise ValueError(f"site {path!r} is in no row of `names`; add a row for its module")
