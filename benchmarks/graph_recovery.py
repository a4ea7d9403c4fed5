"""Which selector finds the nodes that depend on the important ones, on planted graphs.

    python -m benchmarks.graph_recovery
    python -m benchmarks.graph_recovery --json benchmarks/results/graph_recovery.json

Scores are drawn from Gaussian graphical models whose edges are known, and go the whole
way that a run's scores go (``node_scores``, ``rank_nodes``, ``select_nodes``), with the
defaults where the table names nothing else. Recall is the part of the planted nodes
among as many chosen ones, over seeds. Graphs of 40 nodes, 8 of them important:

- hub: 6 nodes, each tied to 3 important ones; every other node is independent. All
  dependence is direct, so no graph can do better here than a covariance.
- chain: 3 nodes tied to two important ones each, with chains of nodes behind them, and
  6 nodes tied weakly to one. Chains are correlated with important nodes, but only
  through the nodes before them.
- scaled: chains, and each step's scores multiplied by one number, as a gradient's are.

Measured, 20 seeds (results/graph_recovery.json): on hubs plain covariance is best with
few steps, and all of them are perfect with many. On chains no selector is good at 50
steps; at 500 the graph finds 0.72 of the nodes, covariance 0.40, and chance 0.28. A
step's scale takes nothing from the graph (0.72). Rows that are centred do: 0.47 and
0.47, for the common mean of few nodes carries signal, and without it the matrix is
nearly singular; in no column is the graph better by them. So they are not by default.
The l2,g penalty adds little to the same graph without it (0.69), something to a ridge
(0.64), and nothing to a pseudo-inverse with 500 steps (0.74), which is far worse with
50. Delta in place of Omega loses where many of its columns are 0, which says nothing
of their order (0.58). Nodes are shuffled for each seed, as equal values are taken in
their order: in the order above Delta had 0.95.

Below p = 1 the solver's end depends on its start (``starts``): for p = 0.3 the lower of
its two ends was up to 0.19 above the lowest of five from random starts, for the default
of 0.9 not by 0.0001. At 434 nodes it took 57 and 92 s on two processors that had 14
times as much to do.

Nothing here is about fine-tuning: whether dependent components are the ones to train is
another question.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from jaxpeft.numerics import group_graph, node_scores, rank_nodes, select_nodes

N, IMPORTANT = 40, range(8)
STEPS = (50, 150, 500)
SELECTORS = {
    "ggm": {"by": "ggm"},
    "ggm, by delta": {"by": "ggm", "rank_by": "delta"},
    "ggm, tau 0": {"by": "ggm", "tau": 0.0},
    "ridge": {"by": "ridge"},
    "cov": {"by": "cov"},
    "pinv": {"by": "pinv"},
    "score": {"by": "score"},
    "random": {"by": "random"},
}
# Centring makes a matrix that is nearly singular along the mean of all nodes.
SELECTORS |= {
    f"{name}, centred": {"row": "center"} | SELECTORS[name]
    for name in ("ggm", "ggm, tau 0", "ridge", "cov", "pinv")
}
COMMON = {"hub": 0.0, "chain": 0.0, "scaled": 1.0}  # of the logarithms, a deviation
POWERS = (0.3, 0.5, 0.7, 0.9)


def hub_graph(seed: int) -> tuple[np.ndarray, list[int]]:
    """``(precision matrix, planted nodes)``: nodes 8 to 13 hang on important ones."""
    rng, omega = np.random.default_rng(seed), np.eye(N)
    planted = list(range(8, 14))
    for node in planted:
        for other in rng.choice(len(IMPORTANT), 3, replace=False):
            omega[node, other] = omega[other, node] = 0.35 * rng.choice((-1, 1))
    least = np.linalg.eigvalsh(omega)[0]
    return omega + max(0.0, 0.2 - least) * np.eye(N), planted


def chain_graph() -> tuple[np.ndarray, list[int]]:
    """``(precision matrix, planted nodes)``: 8 to 16; 17 to 25 are behind them."""
    omega = np.eye(N)

    def tie(i, j, value):
        omega[i, j] = omega[j, i] = value

    for t in range(3):
        tie(8 + t, 2 * t, -0.35)
        tie(8 + t, 2 * t + 1, -0.35)
        before = 8 + t
        for node in range(17 + 3 * t, 20 + 3 * t):
            tie(before, node, -0.45)
            before = node
    for node in range(11, 17):
        tie(node, node - 11, -0.12)
    return omega, list(range(8, 17))


def correlation(omega: np.ndarray) -> np.ndarray:
    """The exact correlations of a graphical model."""
    covariance = np.linalg.inv(omega)
    deviation = np.sqrt(np.diag(covariance))
    return covariance / np.outer(deviation, deviation)


def sample(omega: np.ndarray, steps: int, seed: int, common: float = 0.0) -> np.ndarray:
    """``[steps, n]`` scores whose logarithms are Gaussian with this precision.

    ``common`` is the deviation of a number that all nodes of a step have in common.
    """
    rng = np.random.default_rng(10_000 + seed)
    root = np.linalg.cholesky(np.linalg.inv(omega))
    logs = rng.normal(size=(steps, N)) @ root.T
    return np.exp(logs + common * rng.normal(size=(steps, 1)))


def recall(graph: str, steps: int, seed: int) -> dict[str, float]:
    """The part of the planted nodes that each selector finds."""
    omega, planted = hub_graph(seed) if graph == "hub" else chain_graph()
    scores, result = sample(omega, steps, seed, COMMON[graph]), {}
    # Equal values are taken in the order of nodes, and planted ones would come first.
    order = np.random.default_rng(seed).permutation(np.arange(len(IMPORTANT), N))
    order = np.concatenate([IMPORTANT, order])
    scores = scores[:, order]
    count = len(IMPORTANT) + len(planted)
    for name, given in SELECTORS.items():
        options = dict(given)
        found = node_scores(scores, row=options.pop("row", "none"))
        values = rank_nodes(found, list(IMPORTANT), seed=seed, **options).values
        chosen = select_nodes(values, IMPORTANT, count=count)
        result[name] = len(set(planted) & set(order[chosen].tolist())) / len(planted)
    return result


def table(seeds: int) -> list[dict]:
    """``{graph, steps, selector, mean, sd}`` of every case."""
    rows = []
    for graph in COMMON:
        for steps in STEPS:
            each = [recall(graph, steps, seed) for seed in range(seeds)]
            for name in SELECTORS:
                values = [r[name] for r in each]
                row = {"graph": graph, "steps": steps, "selector": name}
                row |= {
                    "mean": statistics.fmean(values),
                    "sd": statistics.stdev(values),
                }
                rows.append(row)
    return rows


def starts(seeds: int) -> list[dict]:
    """How far above the lowest known end the solver stops, by where it starts."""
    rng, rows = np.random.default_rng(0), []
    graphs = (hub_graph(0)[0], chain_graph()[0])
    for power in POWERS:
        above: dict[str, list[float]] = {}
        for omega, steps, seed in itertools.product(graphs, (50, 500), range(seeds)):
            matrix = node_scores(sample(omega, steps, seed)).matrix
            ends = {"default": None, "identity": np.eye(N)}
            ends |= {f"random {i}": _random_start(rng) for i in range(5)}
            for name, start in ends.items():
                found = group_graph(matrix, IMPORTANT, power=power, start=start)
                ends[name] = float(found.objective[-1])
            for name in ("default", "identity"):
                above.setdefault(name, []).append(ends[name] - min(ends.values()))
        rows += [
            {"power": power, "start": name, "mean": float(np.mean(x)), "most": max(x)}
            for name, x in above.items()
        ]
    return rows


def _random_start(rng: np.random.Generator) -> np.ndarray:
    half = rng.normal(size=(N, N))
    return half @ half.T / N + 0.1 * np.eye(N)


def solve(steps: int, n: int = 434, important: int = 30) -> dict:
    """One solution at the size of the paper's RoBERTa-base, with its defaults."""
    rng = np.random.default_rng(0)
    sparse = rng.normal(size=(n, n)) * (rng.random((n, n)) < 4 / n) / 2
    draws = rng.normal(size=(steps, n)) @ (np.eye(n) + sparse)
    scores = np.exp(draws + rng.normal(size=(steps, 1)))  # with a step's common scale
    matrix = node_scores(scores).matrix
    started = time.perf_counter()
    found = group_graph(matrix, range(important))
    return {
        "nodes": n,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "iterations": len(found.objective),
        "converged": bool(found.converged),
        "objective_rose_by": float(np.max(np.diff(found.objective))),
        "load": round(os.getloadavg()[0], 1),
        "processors": os.cpu_count(),
    }


def show(rows: list[dict]) -> str:
    """The table as text, a line a selector."""
    cases = list(dict.fromkeys((r["graph"], r["steps"]) for r in rows))
    by_case = {(r["selector"], r["graph"], r["steps"]): r for r in rows}
    lines = [f"{'selector':25}" + "".join(f"{g:>8} {s:<5}" for g, s in cases)]
    for name in dict.fromkeys(r["selector"] for r in rows):
        cells = [by_case[(name, *case)] for case in cases]
        numbers = "".join(f"{r['mean']:7.2f} ±{r['sd']:4.2f} " for r in cells)
        lines.append(f"{name:25}{numbers}".rstrip())
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Recall over the number of steps, a panel a graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for panel, graph in zip(panels, COMMON, strict=True):
        shown = [name for name in SELECTORS if "centred" not in name]
        for i, name in enumerate(shown):
            mine = [r for r in rows if r["graph"] == graph and r["selector"] == name]
            shift = 1.02 ** (i - len(shown) / 2)  # bars of spread side by side
            panel.errorbar(
                [r["steps"] * shift for r in mine],
                [r["mean"] for r in mine],
                [r["sd"] for r in mine],
                marker="o",
                markersize=4,
                capsize=2,
                label=name,
            )
        panel.set(xscale="log", xticks=STEPS, xticklabels=STEPS, title=graph)
        panel.minorticks_off()
        panel.set_xlabel("steps collected")
    panels[0].set(ylabel="recall of the planted nodes", ylim=(0, 1.05))
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table; writes it and the figure where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    parser.add_argument("--json", type=Path, help="also writes .png beside it")
    arguments = parser.parse_args()
    rows = table(arguments.seeds)
    print(show(rows))
    ends = starts(max(2, arguments.seeds // 4))
    solver = [solve(steps) for steps in (170, 600)]
    print(*ends, *solver, sep="\n")
    if arguments.json:
        record = {"seeds": arguments.seeds, "rows": rows}
        record |= {"starts": ends, "solver": solver}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        plot(rows, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
