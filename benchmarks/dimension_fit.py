"""How far clean clouds are from the law that an estimator fits, by chance alone.

    python -m benchmarks.dimension_fit --out benchmarks/results/dimension_fit.json

Draws Gaussian clouds of 1, 2, 5 and 10 dimensions, spheres and rolls of several sizes,
and writes for each estimator the distance of the ratios' law to the fitted one, times
the root of the number of points: what 95 % of the clouds of each kind and size stay
below, and 99.9 % of those of a size, all kinds together and of lines and rolls alone,
which bend and end most; of both the largest. The limits in
``jaxpeft/dimension/_law.py`` are these, rounded up; a test compares them. It takes six
minutes of one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from jaxpeft import dimension
from jaxpeft.dimension import gride_fit, mle_fit, twonn_fit

KINDS = ("1", "2", "5", "10", "sphere", "roll")
CLOUDS = {250: 200, 1000: 200, 2000: 60, 5000: 15}  # points: clouds of a kind
TAIL = 1000  # clouds that 99.9 % are told from
LONG = ("1", "roll")  # so many of them up to 1,000 points
DISCARDS = (0.0, 0.1, 0.25, 0.5)
NEIGHBOURS = (4, 8, 16, 32, 64)
SHARE_OF_POINTS = 5  # no neighbour is looked for beyond this part of the cloud


def draw(kind: str, n: int, generator: np.random.Generator) -> np.ndarray:
    """A clean cloud."""
    if kind == "roll":
        turn = 1.5 * np.pi * (1 + 2 * generator.uniform(size=n))
        wide = 21 * generator.uniform(size=n)
        return np.stack([turn * np.cos(turn), wide, turn * np.sin(turn)], 1)
    if kind == "sphere":
        x = generator.normal(size=(n, 6))
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    return generator.normal(size=(n, int(kind)))


def distances(r: np.ndarray) -> dict[str, float]:
    """Of each estimator, times the root of n."""
    n, found = len(r), {}
    x = np.log(r[:, 1] / r[:, 0])
    for discard in DISCARDS:
        for method in ("linear", "ml") if discard else ("ml",):
            d = twonn_fit(r[:, 0], r[:, 1], method, discard)
            gap = dimension.law_distance(dimension.twonn_law(x, d), discard)
            found[f"twonn-{method} {discard}"] = gap
    for k in NEIGHBOURS:
        if k * SHARE_OF_POINTS > n:
            continue
        dim, local = mle_fit(r[:, :k])
        found[f"mle {k}"] = dimension.law_distance(dimension.mle_law(dim, local, k))
        near, far = r[:, k // 2 - 1], r[:, k - 1]
        dim, _ = gride_fit(near, far, k // 2, k)
        of = dimension.gride_law(np.log(far / near), dim, k // 2, k)
        found[f"gride {k}"] = dimension.law_distance(of)
    return {name: gap * n**0.5 for name, gap in found.items()}


def main() -> None:
    """Draws the clouds and writes the table."""
    from scipy.spatial import cKDTree

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for n, clouds in CLOUDS.items():
        most = max(k for k in NEIGHBOURS if k * SHARE_OF_POINTS <= n)
        pooled: dict[str, list[float]] = {}
        for kind in KINDS:
            generator = np.random.default_rng(0)
            each = []
            for _ in range(TAIL if kind in LONG and n <= 1000 else clouds):
                x = draw(kind, n, generator)
                each.append(distances(cKDTree(x).query(x, most + 1)[0][:, 1:]))
            for name in each[0]:
                values = [one[name] for one in each]
                pooled.setdefault(name, []).extend(values[:clouds])
                of = f"{kind}, {n} points"
                _put(found, name, "95", of, values, 0.95)
                if len(values) >= TAIL:
                    _put(found, name, "99.9", of, values, 0.999)
        for name, values in pooled.items():
            if len(values) >= TAIL:
                _put(found, name, "99.9", f"{n} points", values, 0.999)
        print(n, "points", flush=True)
    limits = {
        name: {level: max(row.values()) for level, row in rows.items()}
        for name, rows in found.items()
    }
    result = {"clouds": CLOUDS, "limits": limits, "by cloud": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _put(found, name: str, level: str, of: str, values, share: float) -> None:
    at = round(float(np.quantile(values, share)), 3)
    found.setdefault(name, {}).setdefault(level, {})[of] = at


if __name__ == "__main__":
    main()
