"""Where tokens go: loads, entropies and dead experts by task, layer and module."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, PyTree
from numpy import ndarray

from jaxpeft.console import optional
from jaxpeft.tree import AdaptedKernel, nodes, parts_of, structure_of

DEAD = 0.01  # a share of the load that is this part of an even one is none


class RoutingReport(NamedTuple):
    """What routers did with the tokens of each task; made by ``routing_report``.

    A router is one site and layer. What a router does not have (the padding of a stack
    whose layers have unequal experts) is NaN.

    Attributes:
        tasks: names, T of them.
        routers: ``(module, layer)`` of each router, R of them; layer ``None`` where
            neither a stack nor the path has a number.
        experts: names of each router's experts, the longest N of them.
        tokens: ``[T, R]``, how many tokens it saw.
        gates: ``[T, R, N]``, mean gates; rows add up to 1.
        load: ``[T, R, N]``, shares of the choices made; with soft gates the same.
        token_entropy: ``[T, R]``, mean of H(g) / log N: 0 one expert a token, 1 all
            alike. 0 where there is one expert.
        load_entropy: ``[T, R]``, H(mean g) / log N: 1 where all experts have as much.
        specialisation: ``[T, R]``, nats, H(mean g) - mean H(g): what a token says about
            its experts.
        task_specialisation: ``[R]``, nats, the same of the tasks: what knowing the task
            says about the experts of its tokens.
        dead: ``(module, layer, expert)`` with a load below 0.01 / N over all tasks.
    """

    tasks: tuple[str, ...]
    routers: tuple[tuple[str, int | None], ...]
    experts: tuple[tuple[str, ...], ...]
    tokens: Float64[ndarray, "T R"]
    gates: Float64[ndarray, "T R N"]
    load: Float64[ndarray, "T R N"]
    token_entropy: Float64[ndarray, "T R"]
    load_entropy: Float64[ndarray, "T R"]
    specialisation: Float64[ndarray, "T R"]
    task_specialisation: Float64[ndarray, " R"]
    dead: tuple[tuple[str, int | None, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data; NaN becomes ``None``."""
        plain = lambda x: (
            [plain(v) for v in x] if isinstance(x, list) else None if x != x else x
        )
        arrays = {
            name: plain(np.round(value, 6).tolist())
            for name, value in self._asdict().items()
            if isinstance(value, ndarray)
        }
        return {
            "tasks": list(self.tasks),
            "routers": [list(router) for router in self.routers],
            "experts": [list(names) for names in self.experts],
            "dead": [list(expert) for expert in self.dead],
            **arrays,
        }

    def summary(self) -> dict[str, str]:
        """Returns a line a task and one of the dead experts, for the end of a run."""
        mean = lambda x, i: f"{np.nanmean(x[i]):.3f}"
        lines = {
            task: f"token entropy {mean(self.token_entropy, i)}, load entropy "
            f"{mean(self.load_entropy, i)}, specialisation "
            f"{mean(self.specialisation, i)} nats"
            for i, task in enumerate(self.tasks)
        }
        shown = [f"{m} {n} expert {e}" for m, n, e in self.dead[:5]]
        more = [f"and {len(self.dead) - 5} more"] * (len(self.dead) > 5)
        return {
            **lines,
            "between tasks": f"{np.nanmean(self.task_specialisation):.3f} nats",
            "dead experts": ", ".join(shown + more) or "none",
        }


def routing_report(
    adapted: PyTree, sums: Mapping[str, Mapping[str, Any]]
) -> RoutingReport:
    """Returns loads, entropies and dead experts from sums over tokens.

    Args:
        adapted: the tree that ran; for the names of its experts.
        sums: by task, what ``adapt(fn, taps="own")`` gave, summed over batches (see
            ``numerics.routing_sums``): by site "tokens" and "entropy"
            ``[*layers, rows]``, "gates" and "load" ``[*layers, rows, N]``, "active"
            ``[*layers, N]``, a number above 0 for each expert that there is.

    Returns:
        the report; sites without a router (fixed gates) are not in it.

    Raises:
        ValueError: there is no router, or a task saw no token.
    """
    names = {node.site.path: _routed(node) for node in nodes(adapted)}
    tasks = tuple(sums)
    sites = [path for path in next(iter(sums.values())) if path in names]
    parts = [
        _flat(path, names[path], [sums[task][path] for task in tasks]) for path in sites
    ]
    parts = [part for part in parts if part is not None]
    if not parts:
        raise ValueError(
            "`sums` has no router: no site has a method with experts, or their gates "
            'are fixed. Run adapt(fn, taps="own") with the router\'s own gates.'
        )
    width = max(part["gates"].shape[-1] for part in parts)

    def column(name):  # every router of every site, padded to the same experts
        pad = lambda x: np.pad(x, [(0, 0)] * 2 + [(0, width - x.shape[2])])
        arrays = [part[name] for part in parts]
        return np.concatenate([pad(x) if x.ndim == 3 else x for x in arrays], axis=1)

    tokens, active = column("tokens"), column("active")[0] > 0
    for task, counts in zip(tasks, tokens, strict=True):
        if not counts.all():
            raise ValueError(f"`sums` of task {task!r} have no token at some router.")
    n = active.sum(-1)
    gates, load = (column(name) / tokens[..., None] for name in ("gates", "load"))
    entropy = column("entropy") / tokens
    of_mean = _entropy(gates)
    most = np.where(n > 1, np.log(np.maximum(n, 2)), 1.0)
    weight = tokens / tokens.sum(0)
    over_tasks = lambda x: (weight[..., None] * x).sum(0)
    routers = tuple(router for part in parts for router in part["routers"])
    each = [part["experts"] for part in parts for _ in part["routers"]]
    experts = tuple(
        tuple(e for e, there in zip(names, row, strict=False) if there)
        for names, row in zip(each, active, strict=True)
    )
    dead = [
        (*routers[r], names[k])
        for r, names in enumerate(each)
        for k in np.flatnonzero(active[r] & (over_tasks(load)[r] < DEAD / n[r]))
    ]
    hide = lambda x: np.where(active, x, np.nan)
    return RoutingReport(
        tasks=tasks,
        routers=routers,
        experts=experts,
        tokens=tokens,
        gates=hide(gates),
        load=hide(load),
        token_entropy=np.where(n > 1, entropy / most, 0.0),
        load_entropy=np.where(n > 1, of_mean / most, 0.0),
        specialisation=np.maximum(of_mean - entropy, 0.0),
        task_specialisation=np.maximum(
            _entropy(over_tasks(gates)) - (weight * of_mean).sum(0), 0.0
        ),
        dead=tuple(dead),
    )


def _entropy(shares):
    """H along the last axis, nats; 0 log 0 is 0."""
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=-1)


def _routed(node: AdaptedKernel) -> tuple[str, ...]:
    """Names of the experts that tokens may be routed to, in the router's order."""
    parts = parts_of(node).values()
    away = {name for x in parts for name in x.adapter.options.get("inactive", ())}
    return tuple(name for name in structure_of(node).experts if name not in away)


def _flat(
    path: str, experts: tuple[str, ...], of_tasks: list[Mapping[str, Any] | None]
) -> dict[str, Any] | None:
    """A site's sums as ``[T, layers]`` and ``[T, layers, N]``, with its routers."""
    if any(not sums for sums in of_tasks):
        return None  # fixed gates: nothing was routed
    stack = lambda name: np.stack([np.asarray(s[name], np.float64) for s in of_tasks])
    active = stack("active")
    batch, n = active.shape[1:-1], active.shape[-1]
    layers = math.prod(batch)
    scalar = lambda x: x.reshape(len(of_tasks), layers, -1).sum(-1)
    vector = lambda x: x.reshape(len(of_tasks), layers, -1, n).sum(-2)
    found = {name: scalar(stack(name)) for name in ("tokens", "entropy")}
    found |= {name: vector(stack(name)) for name in ("gates", "load")}
    number = re.search(r"(?:^|[/_])(\d+)(?:/|$)", path)
    own = int(number[1]) if number else None
    return found | {
        "experts": experts[-n:],  # one that all others stand behind has no gate
        "active": active.reshape(len(of_tasks), layers, n),
        "routers": [
            (_module(path), own if not batch else layer) for layer in range(layers)
        ],
    }


def _module(path: str) -> str:
    """The path without its layer's number and without "kernel"."""
    path = re.sub(r"/(kernel|weight|w)$", "", path)
    return re.sub(r"(^|[/_])\d+(?=/|$)", r"\1*", path)


def plot_routing(
    report: RoutingReport,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    title: str = "Routing",
) -> Path:
    """Draws mean gates: tasks by experts for some layers, layers by experts for tasks.

    Averaged over the modules of a layer that have the same experts.

    Args:
        report: from ``routing_report``.
        path: where to write the picture.
        layers: which layers have a panel; ``None``: up to four, spread evenly.
        title: stands above.

    Returns:
        the path.

    Raises:
        ValueError: a layer that no router is in.
    """
    with optional("Figures"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    numbers = [-1 if layer is None else layer for _, layer in report.routers]
    known = sorted(set(numbers))
    if layers is None:
        spread = np.linspace(0, len(known) - 1, min(4, len(known))).round()
        layers = [known[int(i)] for i in spread]
    for layer in layers:
        if layer not in known:
            raise ValueError(f"`layers` has {layer}; there are routers in {known}.")
    names = max(report.experts, key=len)
    # The mean over a layer's routers. An expert that a layer lacks is NaN in each of
    # them, of which numpy warns, and stays NaN: an empty field.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        of_layer = {
            layer: np.nanmean(
                report.gates[:, [i for i, n in enumerate(numbers) if n == layer]],
                axis=1,
            )
            for layer in known
        }
    tasks = list(report.tasks)
    columns = max(len(layers), len(tasks))
    height = 1.6 + 0.32 * len(tasks) + 0.32 * len(known)
    figure = Figure(
        figsize=(max(2.6 * columns, 6), height), layout="constrained", dpi=140
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    ratios = [len(tasks) + 1, len(known) + 1]
    axes = figure.subplots(2, columns, squeeze=False, height_ratios=ratios)
    most = max(float(np.nanmax(x)) for x in of_layer.values())

    def panel(ax, image, rows, heading):
        shown = ax.imshow(image, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        ax.set_title(heading, fontsize=10, loc="left")
        ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        return shown

    for ax in axes.flat[:]:
        ax.set_visible(False)
    for ax, layer in zip(axes[0], layers, strict=False):
        ax.set_visible(True)
        heading = "all tasks" if layer < 0 else f"layer {layer}"
        shown = panel(ax, of_layer[layer], tasks, heading)
    rows = ["" if layer < 0 else f"layer {layer}" for layer in known]
    for i, (ax, task) in enumerate(zip(axes[1], tasks, strict=False)):
        ax.set_visible(True)
        panel(ax, np.stack([of_layer[layer][i] for layer in known]), rows, task)
    figure.colorbar(shown, ax=axes, label="mean gate", shrink=0.8)
    figure.savefig(path)
    return Path(path)
