"""Ranks before training: what an allocator asks of the pretrained model and data."""

import functools
import inspect
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpeft import allocate, core, dimension, models
from jaxpeft.training._config import _near

Draw = Callable[[int, int], tuple[int, Iterable[Mapping[str, Any]]]]
ALLOCATION_FILE = "allocation.json"
FEW = 500  # below, the dimension of a cloud is a rough guess
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "positions")
# What says how large the scale is, or how it differs between sites.
_SCALES = ("alpha", "alpha_over_r", "adjust_alpha")


class FewRowsWarning(UserWarning):
    """Dimensions were estimated from few rows."""


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
    progress: bool = True,
) -> core.Allocation:
    """Asks an allocator of ``jaxpeft.allocate`` for ranks, before anything is trained.

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
            and ``plateau`` (False), whether to estimate at several scales.
        draw: ``(samples, seed) -> (rows, batches)``: at most that many training rows,
            in batches with ``valid``, as ``data.evaluation_batches`` has them.
        targets: the sites, as in ``attach``.
        exclude: as in ``attach``.
        rank: the mean rank, for an allocator that takes one and is given neither
            ``rank`` nor ``budget``; ``None``: its default.
        scale: alpha / rank of every site, where ``fields`` say nothing of alphas.
        progress: whether to say on stderr how far it is, every few seconds.

    Returns:
        The allocation. Its facts also say what it was estimated from.

    Raises:
        ValueError: an unknown name or argument, packed rows where texts are needed one
            by one, too few different rows, or what the allocator objects to.

    Example:
        >>> estimate_allocation(  # doctest: +SKIP
        ...     model, params, {"name": "eva", "rank": 4}, draw, targets=["query"]
        ... )
    """
    options = dict(fields)
    name = options.pop("name")
    function = find_allocator(name)
    gathers = next(
        (n for n in _GATHER if n in inspect.signature(function).parameters), None
    )
    asked = inspect.signature(_GATHER[gathers]).parameters if gathers else {}
    own = [n for n in inspect.signature(function).parameters if n not in _NOT_OPTIONS]
    known = [*own, *(n for n, p in asked.items() if p.kind is p.KEYWORD_ONLY)]
    known = [n for n in known if n not in _NOT_OPTIONS]
    for option in options:
        if option not in known:
            raise ValueError(
                f"`allocation.{option}`: {name} takes no such argument; nearest: "
                f"{_near(option, known) or 'none'}, all: {', '.join(known)}."
            )
    if jax.process_count() > 1:
        raise ValueError(
            "`allocation` is estimated by one process. Write it to a file once, with "
            "`jaxpeft ranks`, and name that."
        )
    shapes = allocate.kernel_shapes(params, targets, exclude=exclude, axes=model.axes)
    taken = {n: options.pop(n) for n in list(options) if n not in own}
    if rank is not None and "rank" in own and not options.keys() & {"rank", "budget"}:
        options["rank"] = rank
    facts: dict[str, Any] = {"options": options | taken}
    given = {}
    if gathers:
        given[gathers], seen = _GATHER[gathers](
            model, params, draw, shapes=shapes, progress=progress, **taken
        )
        facts |= seen
    found = function(shapes, **given, **options)
    sites = dict(found.sites)
    if scale != 1 and not options.keys() & set(_SCALES):
        sites = {path: _scaled(site, scale) for path, site in sites.items()}
    facts["parameters"] = found.count(shapes)
    return core.Allocation.of(sites, found.facts | facts)


def read_allocation(
    file: str | Path,
    params: PyTree,
    *,
    targets: Any,
    exclude: Any = None,
    axes: Any = None,
) -> core.Allocation:
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
        found = core.Allocation.load(file)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} holds no allocation: {error!r}") from error
    shapes = allocate.kernel_shapes(params, targets, exclude=exclude, axes=axes)
    more, less = sorted(set(found) - set(shapes)), sorted(set(shapes) - set(found))
    if more or less:
        raise ValueError(
            f"`allocation` {str(file)!r} is not of the sites that `targets` names: "
            f"{len(more)} are in the file alone {more[:3]}, {len(less)} in the targets "
            f"alone {less[:3]}. Estimate it with the same targets and scan_layers."
        )
    for path, site in found.sites:
        layers = shapes[path].layers
        if (len(site.rank) if isinstance(site.rank, tuple) else None) != layers:
            there = f"a stack of {layers} layers" if layers else "a single kernel"
            raise ValueError(
                f"`allocation` {str(file)!r} has ranks {site.rank} at "
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
    adapter: core.Adapter,
    targets: Any,
    exclude: Any = None,
) -> core.Allocation:
    """Returns the ranks that a run starts with, the same again when it is resumed.

    The first time they are kept in the run's folder, as ``allocation.json``; from then
    on they are read from there, and nothing is estimated again.

    Args:
        setting: ``config.allocation``: the path of a saved allocation, the name of an
            allocator, or a section with ``name`` and options, of
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
    if isinstance(setting, str) and Path(setting).is_file():
        found = read(setting)
    else:
        known = adapter.rank is not None and adapter.alpha is not None
        fields = {"name": setting} if isinstance(setting, str) else dict(setting)
        found = estimate_allocation(
            *(model, params, fields, draw),
            rank=adapter.rank,
            scale=adapter.alpha / adapter.rank if known else 1.0,
            **sites,
        )
    if jax.process_index() == 0:
        new = folder / f"{ALLOCATION_FILE}.new"
        found.save(new)
        new.replace(kept)  # whole or not at all
    return found


def find_allocator(name: str) -> Callable[..., core.Allocation]:
    """Returns the function of ``jaxpeft.allocate`` of this name that makes allocations.

    Args:
        name: "gelora", "eva", "uniform"; one whose first argument is ``shapes``.

    Returns:
        The function.

    Raises:
        ValueError: there is none; the message says which there are.

    Example:
        >>> find_allocator("uniform").__name__
        'uniform'
    """
    names = []
    for each, value in vars(allocate).items():
        if inspect.isfunction(value):
            first = next(iter(inspect.signature(value).parameters), None)
            names += [each] * (first == "shapes")
    if name not in names:
        raise ValueError(
            f"`allocation` {name!r} is neither a file nor an allocator; there are "
            f"{', '.join(sorted(names))}; nearest: {_near(name, names) or 'none'}."
        )
    return getattr(allocate, name)


def _scaled(site: core.SiteRank, scale: float) -> core.SiteRank:
    alpha = site.alpha
    of = lambda x: float(x * scale)
    return site._replace(
        alpha=tuple(map(of, alpha)) if isinstance(alpha, tuple) else of(alpha)
    )


def _profile(
    model,
    params,
    draw: Draw,
    *,
    shapes,
    progress: bool,
    samples: int = 5000,
    seed: int = 0,
    pool: str = "mean",
    method: str = "linear",
    discard: int | float | None = None,
    sd: str = "subsample",
    plateau: bool = False,
):
    """The dimension of states 0 to L, and facts."""
    del shapes
    rows, batches = draw(samples, seed)
    if rows < FEW:
        warnings.warn(
            f"the dimension is estimated from {rows} rows; below {FEW} it is rough",
            FewRowsWarning,
            stacklevel=3,
        )
    estimator = functools.partial(
        dimension.twonn, method=method, discard=discard, sd=sd, seed=seed
    )
    if plateau:
        estimator = functools.partial(dimension.plateau, estimator=estimator, seed=seed)
    step = functools.partial(models.pooled_states(model, how=pool), params)
    with tempfile.TemporaryDirectory() as folder:
        states = dimension.collect(
            step,
            batches,
            folder,
            rows=rows,
            valid=lambda batch: batch["valid"],
            progress=progress,
        )
        each = _told(states, states.layers, "dimensions", "states", progress)
        profile = dimension.id_profile(each, estimator)
    return profile, {"rows": rows, "pool": pool, "estimator": profile[-1].method}


def _spectra(
    model,
    params,
    draw: Draw,
    *,
    shapes,
    progress: bool,
    samples: int = 5000,
    seed: int = 0,
):
    """Spectra of the sites' inputs over real tokens, and facts."""
    rows, batches = draw(samples, seed)
    bare = model.clone(head=None)
    apply = lambda params, inputs: bare.apply(
        {"params": params}, **inputs, deterministic=True
    )

    @jax.jit
    def run(params, inputs, mask):
        reduce = lambda x: allocate.input_moments(x, mask)
        chosen = lambda path, leaf: path in shapes
        return core.capture(apply, chosen, reduce, axes=model.axes)(params, inputs)[1]

    def step(batch):
        inputs = {n: np.asarray(batch[n]) for n in _INPUTS if n in batch}
        mask = inputs["attention_mask"] * batch["valid"][:, None].astype(np.int32)
        return run(params, inputs, jnp.asarray(mask))

    each = _told(batches, len(batches), "inputs", "batches", progress)
    moments = allocate.gather_moments(step, each)
    spectra = {path: allocate.spectrum(moments[path]) for path in shapes}
    tokens = int(np.max(next(iter(moments.values())).count))
    return spectra, {"rows": rows, "tokens": tokens}


def _told(each: Iterable, count: int, what: str, unit: str, progress: bool) -> Iterator:
    """The same, saying every few seconds how far it is."""
    started = said = time.monotonic()
    for number, one in enumerate(each):
        yield one
        now = time.monotonic()
        if progress and now - said > 5:
            said = now
            text = f"{what}: {number + 1}/{count} {unit}, {now - started:.0f} s"
            print(text, file=sys.stderr, flush=True)


# An allocator's argument, and what gathers it. ``blocks`` are of networks of one's own.
_GATHER = {"profile": _profile, "spectra": _spectra}
_NOT_OPTIONS = {"shapes", "blocks", "model", "params", "draw", "progress", *_GATHER}
