"""The quickstart's curve: a run's metrics as JSON, and the picture of the README.

python train.py
python -m benchmarks.quickstart --run runs/quickstart    # keeps what it measured
python -m benchmarks.quickstart                          # draws it again
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpeft import runs

RESULTS = Path(__file__).parent / "results"


def measured(run: Path) -> dict[str, Any]:
    """What a run has written of its losses and its validation scores."""
    report = json.loads((run / "report.json").read_text())
    scores = {name: report["results"][name] for name in ("split", "before", "after")}
    pick = lambda event, name: [
        [row["step"], round(row[name], 4)] for row in runs.read_metrics(run, event)
    ]
    return {
        "command": "python train.py",
        "versions": report["versions"],
        "validation_accuracy": pick("eval", "accuracy"),
        "loss": pick("train", "loss"),
        "results": scores,
    }


def draw(kept: dict[str, Any], file: Path) -> None:
    """Draws loss and accuracy over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    steps, losses = zip(*kept["loss"], strict=True)
    left.plot(steps, losses, color="tab:gray", lw=1)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None), title="training loss")
    steps, scores = zip(*kept["validation_accuracy"], strict=True)
    right.plot(steps, scores, marker="o", color="tab:blue")
    for step, score in zip(steps, scores, strict=True):
        right.annotate(
            f"{score:.3f}",
            (step, score),
            textcoords="offset points",
            xytext=(10, -4) if step < 50 else (6, -14),
            ha="left",
        )
    right.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.05))
    right.set(title="validation accuracy", xticks=steps)
    for axes in (left, right):
        axes.set_xlim(-8, max(steps) + 32)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("KaSA on MiniLM, TREC questions: python train.py")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a run if one is given, and draws what is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a complete run of the quickstart")
    given = parser.parse_args(argv)
    file = RESULTS / "quickstart.json"
    if given.run:
        text = json.dumps(measured(given.run), indent=1)
        pairs = re.sub(r"\[\s+(\d+),\s+([\d.]+)\s+\]", r"[\1, \2]", text)
        file.write_text(pairs + "\n")
    draw(json.loads(file.read_text()), RESULTS / "quickstart.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
