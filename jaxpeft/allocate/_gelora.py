"""GeLoRA (arXiv 2412.09250): ranks from the intrinsic dimension of hidden states.

Not GeoLoRA (arXiv 2410.18720), and not what HF PEFT calls GLORA.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxpeft.allocate._allocation import Allocation, KernelShape, SiteRank, layer_of
from jaxpeft.dimension import IdEstimate

ROUNDINGS: dict[str, Callable[[float], int]] = {
    "round": lambda x: math.floor(x + 0.5),  # not to even
    "ceil": math.ceil,
    "floor": math.floor,
}
DEGENERATE = ("error", "zero")
FEW = 500  # below, the dimension of a cloud is a rough guess
NOISE = 2  # deviations that a rise must reach, where they are known
LEGEND = {
    "below noise": "a rise within its noise, which raises no rank",
    "within two sds": "a rise within two standard deviations, which raises a rank",
    "poor fit": "distances do not follow the law of the estimator at the state before "
    "the block or the one after; the rise means little",
}


class FewTextsWarning(UserWarning):
    """Dimensions were estimated from few texts."""


class Block(NamedTuple):
    """A part of a network between two states.

    Attributes:
        before: the number of the state that it reads.
        after: the number of the state that it writes.
        sites: a regular expression that must match the whole path of its kernels.
    """

    before: int
    after: int
    sites: str


def gelora(
    shapes: Mapping[str, KernelShape],
    profile: Sequence[IdEstimate | float],
    *,
    rounding: str = "round",
    offset: int = 1,
    noise: int | float | None = None,
    r_min: int = 1,
    r_max: int | None = None,
    alpha_over_r: int | float = 1.0,
    degenerate: str = "error",
    blocks: Sequence[Block] | None = None,
    budget: int | None = None,
) -> Allocation:
    r"""Gives a block as many ranks as it raises the intrinsic dimension by, plus one.

    .. math::
        \delta_i = \max(d_{i+1} - d_i, 0), \qquad
        r_i = \max(r_{min}, \min(R(\delta_i) + \mathrm{offset}, r_{max}, d_{in},
            d_{out})), \qquad \alpha_i = (\alpha / r) \, r_i

    Estimates are of the pretrained model's states on the task's texts, without
    adapter, head and dropout, state 0 what block 0 reads, the last one before a final
    norm (``models.pooled_states``, ``dimension.collect``, ``dimension.id_profile``).

    Of what this can tell: the paper bounds the number of parameters, and that the bound
    holds of a rank is an argument. A smooth map cannot raise a dimension; it rises as
    a pooled state is no function of the one before. Large dimensions are estimated
    too low, so their differences are too small, and ranks from different numbers of
    texts do not compare. With ``"ceil"`` and ``noise=0``, noise alone gives a mean rank
    of 1.5. Where an estimate has a poor fit, so that its number means little, the table
    says so and the rank is as of any other.

    Notation:
        paper     here
        T_i       block i, from state i to state i + 1
        d_i       profile[i]
        r_i       rank of every site in block i

    Args:
        shapes: the sites, of ``kernel_shapes``; the paper's are attention's q, k, v, o.
        profile: the dimension of states 0 to L, with its uncertainty where known.
        rounding: R: ``"round"``, half up; ``"ceil"``, as the one other implementation
            has it; or ``"floor"``.
        offset: added to every rank.
        noise: a rise below so many of its standard deviations counts as none, and the
            table says which; 0: every rise counts. ``None``: 2 where the deviations of
            both states are known, else 0. They are best with ``sd="subsample"``, whose
            halves are shared by the states; without those the errors are taken as
            independent, which is too much, of analytic ones, which are too small. A
            number needs estimates with their uncertainty.
        r_min: the least rank.
        r_max: the largest rank; ``None``: the kernel's smaller side.
        alpha_over_r: the scale of every site.
        degenerate: of a state that is one point for all texts: ``"error"``, or
            ``"zero"``, which gives its block a large rank.
        blocks: where the network is not one row of blocks; ``None``: block i is the
            i-th layer by the numbers in the paths, or of a stack.
        budget: parameters of plain low-rank pairs in all; where the ranks need more,
            ``r_max`` is lowered until they do not. ``None``: no limit.

    Returns:
        The allocation. Its facts have for each block both dimensions, the rise, its
        standard deviation, the rank before caps, and a remark, with a legend below.

    Warns:
        FewTextsWarning: a dimension is estimated from fewer than 500 distinct texts.

    Raises:
        ValueError: an estimate is negative or not finite, the number of layers does
            not fit, a site is in no block, the budget is too small, or ``noise`` is
            given where the uncertainty of a state is not known.

    Example:
        >>> shapes = {f"layer_{i}/q/kernel": KernelShape(None, 64, 64) for i in (0, 1)}
        >>> gelora(shapes, [2.0, 5.0, 4.0]).ranks()
        {'layer_0/q/kernel': 4, 'layer_1/q/kernel': 1}

    References:
        GeLoRA: Geometric adaptive ranks for efficient LoRA fine-tuning, arXiv
        2412.09250.

    Note:
        The paper's rounding is not known to us, nor its pooling and its alpha / r; the
        defaults are ours. ``noise``, ``budget`` and ``blocks`` are not in the paper,
        which counts every rise: ``noise=0``.
    """
    _check(rounding, offset, noise, r_min, r_max, degenerate)
    _warn_of_few(profile)
    dims, sds, halves = _read_profile(profile, degenerate)
    _check_spreads(noise, sds)
    chain = blocks is None
    if chain:
        blocks = [Block(i, i + 1, "") for i in range(len(dims) - 1)]
    poor = [getattr(each, "poor", False) for each in profile]
    rows, wanted = [], []
    for number, block in enumerate(blocks):
        i, j = block.before, block.after
        if not (0 <= i < len(dims) and 0 <= j < len(dims)):
            raise ValueError(
                f"`blocks` entry {number} goes from state {i} to {j}; `profile` has "
                f"states 0 to {len(dims) - 1}"
            )
        rise = max(dims[j] - dims[i], 0.0)
        spread = _rise_sd(halves[i], halves[j], sds[i], sds[j])
        known = not (math.isnan(sds[i]) or math.isnan(sds[j]))
        held = (NOISE if known else 0) if noise is None else noise
        noisy = held > 0 and 0 < rise < held * spread
        wanted.append(ROUNDINGS[rounding](0.0 if noisy else rise) + offset)
        unsure = rise > 0 and rise < 2 * spread
        remarks = ["below noise" if noisy else "within two sds"] * (noisy or unsure)
        remarks += ["poor fit"] * (poor[i] or poor[j])
        rows.append(
            {
                "block": number,
                "dim in": dims[i],
                "dim out": dims[j],
                "rise": rise,
                "sd of it": spread,
                "rank": wanted[-1],
                "remark": ", ".join(remarks),
            }
        )
    places = {path: _blocks_of(path, s, blocks, chain) for path, s in shapes.items()}

    def allocated(limit: int | None) -> Allocation:
        sites = {}
        for path, shape in shapes.items():
            most = min(limit or shape.d_in, shape.d_in, shape.d_out)
            ranks = tuple(max(r_min, min(wanted[b], most)) for b in places[path])
            alphas = tuple(float(alpha_over_r * r) for r in ranks)
            alone = shape.layers is None
            sites[path] = (
                SiteRank(ranks[0], alphas[0]) if alone else SiteRank(ranks, alphas)
            )
        facts = {"allocator": "gelora", "rounding": rounding, "layers": rows}
        said = {part for row in rows for part in row["remark"].split(", ")}
        facts["legend"] = {word: text for word, text in LEGEND.items() if word in said}
        return Allocation.of(sites, facts | {"r_max": limit, "noise": noise})

    result = allocated(r_max)
    limit = max((r for s in result.values() for r, _ in s.layers()), default=r_min)
    while budget is not None and result.count(shapes) > budget:
        if (limit := limit - 1) < r_min:
            raise ValueError(
                f"`budget` {budget} is below the {result.count(shapes)} parameters of "
                f"rank {r_min} everywhere"
            )
        result = allocated(limit)
    return result


def _check(rounding, offset, noise, r_min, r_max, degenerate) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"`rounding` must be one of {tuple(ROUNDINGS)}, got {rounding!r}"
        )
    if degenerate not in DEGENERATE:
        raise ValueError(
            f"`degenerate` must be one of {DEGENERATE}, got {degenerate!r}"
        )
    if offset < 0 or (noise or 0) < 0:
        raise ValueError(
            f"`offset` and `noise` must be at least 0, got {offset} and {noise}"
        )
    if r_min < 1 or (r_max is not None and r_max < r_min):
        raise ValueError(
            f"`r_min` must be at least 1 and `r_max` no smaller, got {r_min} and "
            f"{r_max}"
        )


def _warn_of_few(profile) -> None:
    """Of distinct texts: copies say nothing of a dimension."""
    used = [each.n_used for each in profile if isinstance(each, IdEstimate)]
    if used and min(used) < FEW:
        warnings.warn(
            f"`profile` has dimensions estimated from {min(used)} distinct points; "
            f"below {FEW} they are rough",
            FewTextsWarning,
            stacklevel=3,
        )


def _read_profile(profile, degenerate: str) -> tuple[list[float], list[float], list]:
    """Dimensions, their sds (nan: not known), and halves."""
    dims, sds, halves = [], [], []
    for i, each in enumerate(profile):
        known = isinstance(each, IdEstimate)
        dim = float(each.dim if known else each)
        if known and each.degenerate:
            if degenerate == "error":
                raise ValueError(
                    f"`profile` has no dimension at state {i}: it is one point for all "
                    "texts, as the first or last token's often is. Pool by 'mean', or "
                    "write degenerate='zero'."
                )
            dim = 0.0
        if not (math.isfinite(dim) and dim >= 0):
            raise ValueError(f"`profile` has dimension {dim} at state {i}")
        dims.append(dim)
        spread = each.sd if known else math.nan
        sds.append(0.0 if known and each.degenerate else spread)  # of one point: none
        halves.append(each.halves if known else ())
    if len(dims) < 2:
        raise ValueError(f"`profile` has {len(dims)} states; a block needs two")
    return dims, sds, halves


def _check_spreads(noise, sds: Sequence[float]) -> None:
    """Raises where a rise would be held against a deviation that nobody knows."""
    unknown = [i for i, sd in enumerate(sds) if math.isnan(sd)]
    if noise and unknown:
        raise ValueError(
            f"`noise` {noise} holds a rise against its standard deviation, and "
            f"`profile` has none at states {unknown}: bare numbers have no spread. "
            "Give the estimates of jaxpeft.dimension.id_profile, or noise=0."
        )


def _rise_sd(before, after, sd_before: float, sd_after: float) -> float:
    """The standard deviation of a rise; 0 where nothing is known of it."""
    if before and after:
        return float(np.std(np.subtract(after, before), ddof=1))
    each = [sd for sd in (sd_before, sd_after) if not math.isnan(sd)]
    return math.hypot(*each) if each else 0.0


def _blocks_of(path: str, shape: KernelShape, blocks, chain: bool) -> list[int]:
    """The block of each layer of a site."""
    layers, count = shape.layers, len(blocks)
    if chain and layers is not None:
        if layers != count:
            raise ValueError(
                f"site {path!r} has {layers} layers, `profile` {count + 1} states; it "
                "needs one state more than layers, or `blocks`"
            )
        return list(range(count))
    if chain:
        own = layer_of(path)
        if own is None or own >= count:
            raise ValueError(
                f"site {path!r} names "
                f"{'no layer' if own is None else f'layer {own}'}, and `profile` has "
                f"{count} blocks; name other sites, or give `blocks`"
            )
        return [own]
    found = [i for i, b in enumerate(blocks) if re.fullmatch(b.sites, path)]
    if len(found) != (layers or 1):
        raise ValueError(
            f"site {path!r} has {layers or 1} layers and lies in {len(found)} of "
            "`blocks`"
        )
    return found
