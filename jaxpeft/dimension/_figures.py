"""Figures of the study of learning paradigms: numbers in, a PNG and its CSV out.

Each takes ``file``, "figures/summary.png", writes it and the numbers beside it as
"figures/summary.csv", and returns the path of the picture.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpeft.console import optional
from jaxpeft.dimension import _law as law
from jaxpeft.dimension._estimate import ANALYTIC, IdEstimate
from jaxpeft.dimension._fit import twonn_points
from jaxpeft.dimension._profile import dims_of, normalized_auc, normalized_auc_sd

Profile = Sequence[IdEstimate | float]
Score = float | tuple[float, float]  # and its standard deviation
POOR = "poor fit: the dimension means little"


def plot_profiles(
    profiles: Mapping[str, Profile],
    file: str | Path,
    *,
    scores: Mapping[str, Score] | None = None,
    title: str = "",
) -> Path:
    """Draws dimension against layer, one line a paradigm, with areas and accuracies.

    Also of checkpoints, or of k: a line a key, in their order. A cross marks a layer
    whose estimate has a poor fit.

    Args:
        profiles: ``{paradigm: profile of layers 0 to L}``; layer 0 is not drawn.
        file: a PNG.
        scores: ``{paradigm: accuracy}``, or pairs with its standard deviation;
            ``None``: no such panel.
        title: above all.

    Returns:
        The picture's path.
    """
    panels = 3 if scores else 2
    figure, axes = _figure(panels, title)
    rows, colours = [], _colours(len(profiles))
    for colour, (name, profile) in zip(colours, profiles.items(), strict=True):
        rows += [[name, *row] for row in _line(axes[0], profile, name, colour)]
        area, spread = _area(profile)
        axes[1].bar(name, area, yerr=spread, color=colour, capsize=2)
        if scores:
            accuracy, spread = _pair(scores[name])
            axes[2].bar(name, accuracy, yerr=spread, color=colour, capsize=2)
    _explain(figure, axes[0], profiles.values())
    axes[1].set(ylabel="normalised area")
    if scores:
        axes[2].set(ylabel="accuracy")
    for axis in axes[1:]:
        axis.tick_params(axis="x", rotation=45)
    return _save(figure, file, ["paradigm", *_COLUMNS], rows)


def plot_dynamics(
    profiles: Mapping[int, Profile],
    file: str | Path,
    *,
    scores: Mapping[int, Score] | None = None,
    label: str = "step",
    title: str = "",
) -> Path:
    """Draws what changes with training steps or with demonstrations.

    Dimension against layer, a line for each, with a cross at poor fits; accuracy
    against them; and the normalised area against them.

    Args:
        profiles: ``{step, or k: profile of layers 0 to L}``; layer 0 is not drawn.
        file: a PNG.
        scores: ``{step, or k: accuracy}``, as in ``plot_profiles``.
        label: what the numbers are.
        title: above all.

    Returns:
        The picture's path.
    """
    figure, axes = _figure(3 if scores else 2, title)
    x = sorted(profiles)
    rows, colours = [], _colours(len(x))
    for colour, at in zip(colours, x, strict=True):
        line = _line(axes[0], profiles[at], f"{label} {at}", colour)
        rows += [[at, *row] for row in line]
    _explain(figure, axes[0], profiles.values())
    if scores:
        pairs = [_pair(scores[at]) for at in x]
        axes[1].errorbar(x, *zip(*pairs, strict=True), marker="o", capsize=2)
        axes[1].set(xlabel=label, ylabel="accuracy")
    areas = [_area(profiles[at]) for at in x]
    axes[-1].errorbar(x, *zip(*areas, strict=True), marker="o", capsize=2)
    axes[-1].set(xlabel=label, ylabel="normalised area")
    for axis in axes[1:]:
        axis.set_xticks(x)
    return _save(figure, file, [label, *_COLUMNS], rows)


def plot_differences(
    table: Float[np.ndarray, "p p"], paradigms: Sequence[str], file: str | Path
) -> Path:
    """Draws by how much each paradigm's dimension is above each other's.

    Args:
        table: of ``difference_map``.
        paradigms: its rows and columns.
        file: a PNG.

    Returns:
        The picture's path.
    """
    figure, (axis,) = _figure(1, "H[p, q] > 0: p has the higher dimension")
    most = float(np.max(np.abs(table))) or 1.0
    _matrix(
        figure, axis, table, paradigms, paradigms, "RdBu_r", (-most, most), "{:.2f}"
    )
    axis.set(xlabel="q", ylabel="p")
    rows = [
        [p, q, table[i, j]]
        for i, p in enumerate(paradigms)
        for j, q in enumerate(paradigms)
    ]
    return _save(figure, file, ["p", "q", "difference"], rows)


def plot_areas(areas: Mapping[str, Sequence[float]], file: str | Path) -> Path:
    """Draws boxes of normalised areas over models and data sets.

    Args:
        areas: ``{paradigm: areas}``.
        file: a PNG.

    Returns:
        The picture's path.
    """
    figure, (axis,) = _figure(1, "")
    axis.boxplot(list(areas.values()), tick_labels=list(areas))
    axis.set(ylabel="normalised area")
    rows = [[name, x] for name, each in areas.items() for x in each]
    return _save(figure, file, ["paradigm", "area"], rows)


def plot_against(
    x: Sequence[int | float],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    file: str | Path,
    *,
    label: str = "step",
) -> Path:
    """Draws what changes with training steps or with demonstrations, a panel each.

    Args:
        x: steps, or k.
        curves: ``{panel: {line: values}}``: ``{"accuracy": {"train": ..., "eval":
            ...}, "normalised area": ...}``.
        file: a PNG.
        label: what ``x`` is.

    Returns:
        The picture's path.
    """
    figure, axes = _figure(len(curves), "")
    rows = []
    for axis, (panel, lines) in zip(axes, curves.items(), strict=True):
        for name, values in lines.items():
            axis.plot(x, values, marker="o", label=name)
            rows += [[panel, name, *pair] for pair in zip(x, values, strict=True)]
        axis.set(xlabel=label, ylabel=panel)
        axis.legend(fontsize="small")
    return _save(figure, file, ["panel", "line", label, "value"], rows)


def plot_agreement(
    first: Sequence[float],
    second: Sequence[float],
    file: str | Path,
    *,
    labels: tuple[str, str] = ("TwoNN", "Levina-Bickel, k = 50"),
    poor: Sequence[bool] | None = None,
) -> Path:
    """Draws two estimators against each other, with a line and their correlation.

    Args:
        first: dimensions by the one, over all layers and runs.
        second: by the other.
        file: a PNG.
        labels: their names.
        poor: at which of them an estimate has a poor fit, to mark those.

    Returns:
        The picture's path.
    """
    x, y = np.asarray(first, float), np.asarray(second, float)
    slope, start = np.polyfit(x, y, 1)
    correlation = np.corrcoef(x, y)[0, 1]
    figure, (axis,) = _figure(1, f"slope {slope:.2f}, correlation {correlation:.3f}")
    axis.scatter(x, y, s=12)
    if poor is not None and any(poor):
        at = np.flatnonzero(poor)
        axis.scatter(x[at], y[at], marker="x", color="red", label=POOR)
        axis.legend(fontsize="small")
    ends = np.array([x.min(), x.max()])
    axis.plot(ends, start + slope * ends, color="grey")
    axis.set(xlabel=labels[0], ylabel=labels[1])
    return _save(figure, file, list(labels), zip(x, y, strict=True))


def plot_fit(
    r1: Float[np.ndarray, " n"],
    r2: Float[np.ndarray, " n"],
    file: str | Path,
    *,
    discard: int | float = 0.1,
    title: str = "",
) -> Path:
    """Draws what TwoNN fits a line to: off the line its law does not hold.

    Args:
        r1: distances to the nearest point.
        r2: to the second nearest.
        file: a PNG.
        discard: as in ``twonn``.
        title: above it, before the dimension and its fit.

    Returns:
        The picture's path.
    """
    x, y = twonn_points(r1, r2, discard)
    dim = float(np.sum(x * y) / np.sum(x * x))
    fit = law.law_distance(law.twonn_law(np.log(r2 / r1), dim), discard)
    most = law.limits("twonn", discard, len(r1))[1]
    said = f"dimension {dim:.2f}, {'poor ' * (fit > most)}fit {fit:.3f}"
    said += f" (999 of 1000 clean clouds: below {most:.3f})"
    figure, (axis,) = _figure(1, f"{title}\n{said}".strip())
    axis.scatter(x, y, s=6)
    axis.plot([0, x.max()], [0, dim * x.max()], color="grey")
    axis.set(xlabel="log(r2 / r1)", ylabel="-log(1 - i / N)")
    return _save(figure, file, ["log_mu", "minus_log_survival"], zip(x, y, strict=True))


def plot_scale(
    draws: Mapping[int, Sequence[float]], file: str | Path, *, title: str = ""
) -> Path:
    """Draws the dimension against the number of points it was estimated from.

    Args:
        draws: ``{number of points: dimensions of several draws}``.
        file: a PNG.
        title: above it.

    Returns:
        The picture's path.
    """
    figure, (axis,) = _figure(1, title)
    sizes = sorted(draws)
    means = [np.mean(draws[n]) for n in sizes]
    axis.errorbar(sizes, means, [np.std(draws[n]) for n in sizes], capsize=2)
    axis.set(xlabel="points", ylabel="intrinsic dimension")
    rows = [[n, x] for n in sizes for x in draws[n]]
    return _save(figure, file, ["points", "dim"], rows)


def plot_ranks(
    grid: tuple[Sequence[str], Sequence[str], Sequence[Sequence[int | None]]],
    file: str | Path,
    *,
    title: str = "",
    remarks: Mapping[str, str] | None = None,
    legend: Mapping[str, str] | None = None,
) -> Path:
    """Draws a map of ranks, layers by modules.

    Args:
        grid: of an allocation's ``grid()``.
        file: a PNG.
        title: above it.
        remarks: ``{layer: "poor fit"}``, to stand beside the layer.
        legend: what remarks mean, to stand below.

    Returns:
        The picture's path.
    """
    layers, modules, rows = grid
    figure, (axis,) = _figure(1, title)
    table = np.array([[np.nan if r is None else r for r in row] for row in rows], float)
    limits = (0.0, float(np.nanmax(table)) or 1.0)
    told = {layer: f"{text}  {layer}" for layer, text in (remarks or {}).items()}
    names = [told.get(layer, layer) for layer in layers]
    _matrix(figure, axis, table, names, modules, "viridis", limits, "{:.0f}")
    axis.set(ylabel="layer")
    _below(figure, [f"{word}: {text}" for word, text in (legend or {}).items()])
    flat = [
        [layer, module, rank]
        for layer, row in zip(layers, rows, strict=True)
        for module, rank in zip(modules, row, strict=True)
        if rank is not None
    ]
    return _save(figure, file, ["layer", "module", "rank"], flat)


_COLUMNS = ("layer", "dim", "sd", "fit", "poor fit")


def _line(axis, profile: Profile, label: str, colour) -> list[list[Any]]:
    """Draws a profile without layer 0; returns its rows of ``_COLUMNS``."""
    each, dims = list(profile)[1:], dims_of(profile)[1:]
    sds = [getattr(one, "sd", 0.0) for one in each]
    layers = np.arange(1, len(dims) + 1)
    axis.errorbar(layers, dims, sds, label=label, color=colour, capsize=2)
    poor = [getattr(one, "poor", False) for one in each]
    at = np.flatnonzero(poor)
    axis.scatter(layers[at], dims[at], marker="x", s=40, color=[colour], zorder=3)
    fits = [getattr(one, "fit", float("nan")) for one in each]
    return [
        list(row) for row in zip(layers.tolist(), dims, sds, fits, poor, strict=True)
    ]


def _explain(figure, axis, profiles: Iterable[Profile]) -> None:
    """Axes and the legend of profiles; below it of what deviations they are."""
    each = [one for p in profiles for one in p[1:] if isinstance(one, IdEstimate)]
    if any(one.poor for one in each):
        axis.scatter([], [], marker="x", s=40, color="black", label=POOR)
    axis.set(xlabel="layer", ylabel="intrinsic dimension", xlim=(0.5, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize="small")
    if any(not one.halves and not one.degenerate for one in each):
        _below(figure, [ANALYTIC])


def _below(figure, lines: Iterable[str]) -> None:
    if text := "\n".join(lines):
        figure.supxlabel(text, fontsize="small", wrap=True)


def _area(profile: Profile) -> tuple[float, float]:
    """The normalised area and, where there are halves, its spread."""
    known = all(getattr(each, "halves", ()) for each in profile[1:])
    return normalized_auc(profile), normalized_auc_sd(profile) if known else 0.0


def _pair(score: Score) -> tuple[float, float]:
    return score if isinstance(score, tuple) else (score, 0.0)


def _colours(count: int) -> Any:
    with optional("Figures"):
        import matplotlib

    return matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def _figure(panels: int, title: str):
    with optional("Figures"):  # of no global state, without a display
        from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * panels + 0.5, 4), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _matrix(figure, axis, table, rows, columns, colours, limits, form: str) -> None:
    image = axis.imshow(
        table, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    figure.colorbar(image, ax=axis)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    middle = (limits[0] + limits[1]) / 2
    for (i, j), x in np.ndenumerate(table):
        if np.isfinite(x):
            # Dark fields: the ends of the diverging colours, the start of the other.
            far = abs(x - middle) > 0.6 * (limits[1] - middle)
            dark = far if colours == "RdBu_r" else x < middle
            colour = "white" if dark else "black"
            axis.text(j, i, form.format(x), ha="center", va="center", color=colour)


def _save(figure, file: str | Path, header: list[str], rows: Iterable[Any]) -> Path:
    file = Path(file)
    if file.suffix != ".png":
        raise ValueError(f"`file` must end in .png, got {str(file)!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        writer.writerows(rows)
    return file
