"""Ranks before training, estimated from the pretrained model and data."""

import functools
import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxpeft import allocate
from jaxpeft.allocate import Allocation, SiteRank
from jaxpeft.runs._arguments import check_arguments
from jaxpeft.runs._config import near_names
from jaxpeft.runs._gather import GATHER, Draw
from jaxpeft.tree import Adapter

ALLOCATION_FILE = "allocation.json"
# What says how large the scale is, or how it differs between sites.
_SCALES = ("alpha", "alpha_over_r", "adjust_alpha")
# ``blocks`` are of networks of one's own.
_NOT_OPTIONS = {"shapes", "options", "blocks", "model", "params", "draw", "progress"}
_NOT_OPTIONS |= set(GATHER)
# What spectra are of use for beside ranks, and whether that is so by default.
_START = {"init_from_eva": False, "whiten": False}


def estimate_allocation(
    model: Any,
    params: PyTree,
    fields: Mapping[str, Any],
    draw: Draw,
    *,
    targets: Any,
    exclude: Any = None,
    rank: int | None = None,
    scale: int | float = 1.0,
    start_file: str | Path | None = None,
    progress: bool = True,
) -> Allocation:
    """Estimates ranks by a function of ``jaxpeft.allocate``, before any training.

    What it takes beside the shapes is gathered from the pretrained model, without
    adapter, head and dropout, on rows as training has them, without their labels:
    a ``profile`` is the intrinsic dimension of pooled hidden states, ``spectra`` are
    those of the sites' inputs over all real tokens.

    Args:
        model: of ``models.load``.
        params: its parameters, with or without a head.
        fields: ``name``, a function of ``jaxpeft.allocate`` that makes an allocation of
            shapes ("gelora", "eva", "uniform"), its arguments, and of what is
            gathered: ``samples``, the most rows to look at (5000), and ``seed`` of
            their draw (0); of a profile also ``pool`` ("mean"), ``method``
            ("linear"), ``discard`` and ``sd`` ("subsample") of ``dimension.twonn``,
            and ``plateau`` (False), whether to estimate at several scales. Of spectra
            also ``tokens``, those with "label_mask" only where the next token is
            learnt ("mask": all real ones); ``svd``, "covariance", exact, or
            "incremental", which keeps ``keep`` leading directions (by default four
            times what a site may get) and ends once a batch turns none of those by
            more than ``tau`` (0.99, a cosine; None: never); by default "incremental"
            where an input is wider than 8192. ``init_from_eva`` (False): let adapters
            start at these directions, divided by the roots of their singular values
            where ``whiten`` (False); see ``start_at_inputs``.
        draw: ``(samples, seed) -> (rows, batches)``: at most that many training rows,
            in batches with ``valid``, as ``data.evaluation_batches`` has them.
        targets: the sites, as in ``attach``.
        exclude: as in ``attach``.
        rank: the mean rank, for a function that takes one and is given neither
            ``rank`` nor ``budget``; ``None``: its default.
        scale: alpha / rank of every site, where ``fields`` say nothing of alphas.
        start_file: where the directions go that adapters start at, an npz; needed
            where ``fields`` say ``init_from_eva``.
        progress: whether to say on stderr how far it is, every few seconds.

    Returns:
        The allocation. Its facts also say what it was estimated from.

    Raises:
        ValueError: an unknown name or argument, packed rows where texts are needed one
            by one, too few different rows, or what the function objects to.

    Example:
        >>> estimate_allocation(  # doctest: +SKIP
        ...     model, params, {"name": "eva", "rank": 4}, draw, targets=["query"]
        ... )
    """
    function, gathers, own, starts = check_estimate(fields)
    options = {option: value for option, value in fields.items() if option != "name"}
    start = starts | {n: options[n] for n in starts if n in options}
    if start.get("init_from_eva") and start_file is None:
        raise ValueError(
            "`ranks.before.init_from_eva` needs a place for the directions: "
            "start_file='allocation.npz'"
        )
    shapes = allocate.kernel_shapes(params, targets, exclude=exclude, axes=model.axes)
    taken = {n: options.pop(n) for n in list(options) if n not in own}
    if rank is not None and "rank" in own and not options.keys() & {"rank", "budget"}:
        options["rank"] = rank
    facts: dict[str, Any] = {"options": options | taken}
    given = {}
    if gathers:
        taken = {n: value for n, value in taken.items() if n not in starts}
        given[gathers], seen = GATHER[gathers](
            *(model, params, draw),
            shapes=shapes,
            options=options,
            progress=progress,
            **taken,
        )
        facts |= seen
    found = function(shapes, **given, **options)
    sites = dict(found.sites)
    if scale != 1 and not options.keys() & set(_SCALES):
        sites = {path: _scaled(site, scale) for path, site in sites.items()}
    facts["parameters"] = found.count(shapes)
    if start.get("init_from_eva"):
        _save_spectra(start_file, given["spectra"], found)
    return Allocation.of(sites, found.facts | facts)


class Estimate(NamedTuple):
    """What a section that names such a function asks for.

    Attributes:
        function: of ``jaxpeft.allocate``.
        gathers: what that takes beside shapes, a name in ``GATHER``; ``None``: nothing.
        own: names of its options.
        starts: those that say how adapters start, with their defaults.
    """

    function: Callable[..., Allocation]
    gathers: str | None
    own: list[str]
    starts: dict[str, bool]


def check_estimate(fields: Mapping[str, Any]) -> Estimate:
    """Checks what ``estimate_allocation`` is asked for, before anything is read.

    Args:
        fields: as of ``estimate_allocation``.

    Returns:
        What is asked for.

    Raises:
        ValueError: an unknown name or argument, one of another type, or several
            processes.

    Example:
        >>> check_estimate({"name": "uniform", "rank": 4}).gathers is None
        True
    """
    options = {option: value for option, value in fields.items() if option != "name"}
    name = fields["name"]
    function = allocation_function(name)
    gathers = next(
        (n for n in GATHER if n in inspect.signature(function).parameters), None
    )
    asked = inspect.signature(GATHER[gathers]).parameters if gathers else {}
    starts = _START if gathers == "spectra" else {}
    own = [n for n in inspect.signature(function).parameters if n not in _NOT_OPTIONS]
    known = [*own, *(n for n, p in asked.items() if p.kind is p.KEYWORD_ONLY)]
    known = [n for n in known if n not in _NOT_OPTIONS] + [*starts]
    for option in options:
        if option not in known:
            raise ValueError(
                f"`ranks.before.{option}`: {name} takes no such argument; nearest: "
                f"{near_names(option, known) or 'none'}, all: {', '.join(known)}."
            )
    for asker in (function, GATHER[gathers]) if gathers else (function,):
        takes = inspect.signature(asker).parameters
        here = {n: value for n, value in options.items() if n in takes}
        check_arguments(asker, here, "`ranks.before.{}`".format)
    for option in starts:
        if not isinstance(options.get(option, False), bool):
            raise ValueError(
                f"`ranks.before.{option}` must be True or False, got "
                f"{options[option]!r}."
            )
    if jax.process_count() > 1:
        raise ValueError(
            "`ranks.before` is estimated by one process. Write it to a file once, with "
            "`jaxpeft ranks`, and name that."
        )
    if options.get("whiten") and not options.get("init_from_eva"):
        raise ValueError(
            "`ranks.before.whiten` is of init_from_eva=True; write that too"
        )
    return Estimate(function, gathers, own, starts)


def read_allocation(
    file: str | Path,
    params: PyTree,
    *,
    targets: Any,
    exclude: Any = None,
    axes: Any = None,
) -> Allocation:
    """Reads an allocation of exactly the sites that a run adapts.

    Args:
        file: of ``Allocation.save``.
        params: the model's parameters.
        targets: the sites, as in ``attach``.
        exclude: as in ``attach``.
        axes: as in ``attach``.

    Returns:
        The allocation.

    Raises:
        ValueError: the file is none, or has other sites than the targets.
        FileNotFoundError: there is no such file.
    """
    try:
        found = Allocation.load(file)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} holds no allocation: {error!r}") from error
    shapes = allocate.kernel_shapes(params, targets, exclude=exclude, axes=axes)
    more, less = sorted(set(found) - set(shapes)), sorted(set(shapes) - set(found))
    if more or less:
        raise ValueError(
            f"`ranks.before` {str(file)!r} is not of the sites that `targets` names: "
            f"{len(more)} are in the file alone {more[:3]}, {len(less)} in the targets "
            f"alone {less[:3]}. Estimate it with the same targets and scan_layers."
        )
    for path, site in found.sites:
        layers = shapes[path].layers
        if (len(site.rank) if isinstance(site.rank, tuple) else None) != layers:
            there = f"a stack of {layers} layers" if layers else "a single kernel"
            raise ValueError(
                f"`ranks.before` {str(file)!r} has ranks {site.rank} at "
                f"{path!r}, {there} here. Estimate it with the same scan_layers."
            )
    return found


def starting_allocation(
    setting: Any,
    folder: Path,
    model: Any,
    params: PyTree,
    draw: Draw,
    *,
    adapter: Adapter,
    targets: Any,
    exclude: Any = None,
) -> Allocation:
    """Returns the ranks that a run starts with, the same again when it is resumed.

    The first time they are kept in the run's folder, as ``allocation.json``; from then
    on they are read from there, and nothing is estimated again.

    Args:
        setting: ``config.ranks.before``: the path of a saved allocation, a name of
            ``jaxpeft.allocate``, or a section with ``name`` and options, of
            ``estimate_allocation``.
        folder: the run's folder.
        model: of ``models.load``.
        params: its parameters.
        draw: as in ``estimate_allocation``.
        adapter: what will be attached. Its rank is the mean rank where ``setting`` says
            neither ``rank`` nor ``budget``, its alpha / rank the scale of all sites
            where that says nothing of alphas. The ranks and alphas of a file are taken
            as they are.
        targets: the sites, as in ``attach``.
        exclude: as in ``attach``.

    Returns:
        The allocation.

    Raises:
        ValueError: as of ``estimate_allocation`` and ``read_allocation``.
    """
    kept, sites = folder / ALLOCATION_FILE, {"targets": targets, "exclude": exclude}
    read = functools.partial(read_allocation, params=params, axes=model.axes, **sites)
    if kept.exists():
        return read(kept)
    start_file = kept.with_suffix(".npz")
    if isinstance(setting, str) and Path(setting).is_file():
        found, beside = read(setting), Path(setting).with_suffix(".npz")
        if _starts_at_inputs(found):
            if not beside.is_file():
                raise ValueError(
                    f"`ranks.before` {setting!r} starts adapters at the directions in "
                    f"{str(beside)!r}, which is not there: `jaxpeft ranks` writes both"
                )
            if jax.process_index() == 0:
                shutil.copyfile(beside, start_file)
    else:
        sizes = adapter.where
        known = sizes.rank is not None and sizes.alpha is not None
        fields = {"name": setting} if isinstance(setting, str) else dict(setting)
        found = estimate_allocation(
            *(model, params, fields, draw),
            rank=sizes.rank,
            scale=sizes.alpha / sizes.rank if known else 1.0,
            start_file=start_file,
            **sites,
        )
    if jax.process_index() == 0:
        new = folder / f"{ALLOCATION_FILE}.new"
        found.save(new)
        new.replace(kept)  # whole or not at all
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("allocation")
    return found


def _starts_at_inputs(allocation: Allocation) -> bool:
    return bool(allocation.facts.get("options", {}).get("init_from_eva"))


def start_at_inputs(
    adapted: PyTree, allocation: Allocation, file: str | Path
) -> PyTree:
    """Starts low-rank adapters at the leading directions of their inputs, as EVA does.

    Args:
        adapted: a tree with adapters of these ranks.
        allocation: of ``estimate_allocation``.
        file: the ``start_file`` it wrote, where it was told ``init_from_eva``.

    Returns:
        The tree, which computes the same; see ``allocate.eva_start``. Without
        ``init_from_eva`` it is the tree that was given.

    Raises:
        ValueError: as of ``allocate.eva_start``.
    """
    if not _starts_at_inputs(allocation):
        return adapted
    whiten = bool(allocation.facts["options"].get("whiten"))
    with np.load(file) as found:
        read = {path: found[path] for path in found.files}
    spectra = {
        path: allocate.Spectrum(x[..., 0, :], x[..., 2:, :], x[..., 1, :])
        for path, x in read.items()
    }
    return allocate.eva_start(adapted, spectra, whiten=whiten)


def _save_spectra(file, spectra: Mapping[str, Any], found: Allocation) -> None:
    """Writes as many directions as sites have ranks: shares, singular values, both."""
    kept = {}
    for path, site in found.sites:
        if rank := max(r for r, _ in site.layers()):
            x = spectra[path]
            rows = (x.ratios[..., None, :], x.singular[..., None, :], x.directions)
            kept[path] = np.concatenate(rows, -2)[..., :rank].astype(np.float32)
    new = Path(f"{file}.new")
    with new.open("wb") as stream:
        np.savez(stream, **kept)
    new.replace(file)  # whole or not at all


def allocation_function(name: str) -> Callable[..., Allocation]:
    """Returns the function of ``jaxpeft.allocate`` of this name that makes allocations.

    Args:
        name: "gelora", "eva", "uniform"; one whose first argument is ``shapes``.

    Returns:
        The function.

    Raises:
        ValueError: there is none; the message says which there are.

    Example:
        >>> allocation_function("uniform").__name__
        'uniform'
    """
    names = []
    for each, value in vars(allocate).items():
        if inspect.isfunction(value):
            first = next(iter(inspect.signature(value).parameters), None)
            names += [each] * (first == "shapes")
    if name not in names:
        raise ValueError(
            f"`ranks.before` {name!r} is neither a file nor a name of jaxpeft.allocate "
            f"({', '.join(sorted(names))}); nearest: "
            f"{near_names(name, names) or 'none'}."
        )
    return getattr(allocate, name)


def _scaled(site: SiteRank, scale: float) -> SiteRank:
    alpha = site.alpha
    of = lambda x: float(x * scale)
    return site._replace(
        alpha=tuple(map(of, alpha)) if isinstance(alpha, tuple) else of(alpha)
    )
