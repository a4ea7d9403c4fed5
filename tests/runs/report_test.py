import io
import json

import matplotlib.image
import ml_collections
import pytest
import rich.console

from jaxpeft import data, runs, training


def test_curves_are_a_picture_of_what_was_measured(tmp_path):
    with pytest.raises(FileNotFoundError):
        runs.plot_curves(tmp_path, score="accuracy", title="a run")
    with runs.MetricsWriter(tmp_path, after=None, tensorboard=False) as writer:
        writer.write("eval", 0, loss=2.0, accuracy=0.1)
        with pytest.raises(ValueError, match="no training step to draw"):
            runs.plot_curves(tmp_path, score="accuracy", title="a run")
        for step in range(1, 9):
            rates = {"learning_rate/adapter": 1e-3 / step, "learning_rate/head": 1e-3}
            writer.write("train", step, loss=2 / step, penalty=0.1, **rates)
        writer.write("eval", 8, loss=0.4, accuracy=0.9)
    options = dict(score="accuracy", title="a run", best_step=8)
    before = runs.plot_curves(tmp_path, **options)
    assert before == tmp_path / "curves.png"
    image = matplotlib.image.imread(before)
    assert image.shape[0] > 500 and image.shape[1] > 800 and image.std() > 0.05
    with runs.MetricsWriter(tmp_path, after=8, tensorboard=False) as writer:
        writer.write("train", 9, loss=float("nan"), penalty=0.1)
        writer.write("eval", 9, loss=3.0, accuracy=float("nan"))
    after = runs.plot_curves(tmp_path, **options)
    assert (matplotlib.image.imread(after) != image).any()


def annotations(monkeypatch):
    """What is written into a picture, apart from axes and titles."""
    from matplotlib.axes import Axes

    written, plain = [], Axes.annotate
    keep = lambda self, text, *args, **options: (
        written.append(text) or plain(self, text, *args, **options)
    )
    monkeypatch.setattr(Axes, "annotate", keep)
    return written


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("perplexity", {0: 90.0, 4: 12.0, 8: 15.0}, "best 12 at step 4"),
        ("accuracy", {0: 0.1, 4: 0.9, 8: 0.5}, "best 0.9 at step 4"),
        # Of equals the checkpoint that is kept is the latest, whatever the metric.
        ("perplexity", {0: 90.0, 4: 12.0, 8: 12.0}, "best 12 at step 8"),
        ("accuracy", {4: 0.75, 8: 0.75}, "best 0.75 at step 8"),
    ],
)
def test_the_best_that_is_drawn_is_the_checkpoint_that_is_kept(
    tmp_path, monkeypatch, metric, scores, best
):
    mode = data.metric_mode(metric)
    with training.Checkpointer(
        tmp_path / "checkpoints", config={}, metric=metric, mode=mode
    ) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: list(scores))
        score_of = lambda step: {metric: scores[step]}
        monkeypatch.setattr(checkpoints, "_scores_of", score_of)
        kept = checkpoints.best
    with runs.MetricsWriter(tmp_path, after=None, tensorboard=False) as writer:
        for step, score in scores.items():
            writer.write("train", step, loss=1.0, penalty=0.0)
            writer.write("speed", step, step_seconds=1.0, tokens_per_second=1.0)
            writer.write("eval", step, loss=1.0, **{metric: score})
    written = annotations(monkeypatch)
    each = {metric: 0.5}
    results = RESULTS | {"metric": metric, "best_step": kept, "before": each}
    results |= {"after": each, "after_last_step": each}
    console = rich.console.Console(file=io.StringIO())
    config = ml_collections.ConfigDict()
    runs.report(tmp_path, results, config, title="a run", console=console)
    assert written == [best]


RESULTS = {
    "split": "test",
    "metric": "accuracy",
    "before": {"accuracy": 0.1},
    "after": {"accuracy": 0.9},
    "after_last_step": {"accuracy": 0.875},
    "best_step": 8,
    "trainable": 123_456,
    "total": 12_345_678,
    "seconds": 95.0,
}


def test_the_report_has_config_and_versions_inside(tmp_path):
    with runs.MetricsWriter(tmp_path, after=None, tensorboard=False) as writer:
        for step, seconds in enumerate((9.0, 0.5, 0.4), start=1):
            writer.write("train", step, loss=1.0, penalty=0.0)
            lap = dict(step_seconds=seconds, tokens_per_second=100.0)
            lap |= {"input_wait": 0.0125} if step > 1 else {}  # older runs have none
            writer.write("speed", step, **lap)
    config = ml_collections.ConfigDict({"adapter": {"rank": 8}, "targets": ("query",)})
    text = io.StringIO()
    console = rich.console.Console(file=text, width=100)
    results = runs.report(tmp_path, RESULTS, config, title="a run", console=console)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"] == results
    assert results["step_seconds"] == 0.5  # the median: not the lap that warmed up
    assert results["input_wait"] == 0.0125
    assert "100 tokens/s, 1.2% of it waiting for rows" in text.getvalue()
    assert results["host_peak_bytes"] > 0 and results["after"] == {"accuracy": 0.9}
    assert report["config"] == {"adapter": {"rank": 8}, "targets": ["query"]}
    assert {"jax", "flax", "optax", "python", "devices"} <= report["versions"].keys()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for shown in ("0.1000", "0.9000 at the best step, 8; 0.8750 at the last", "1:35"):
        assert shown in text.getvalue()
    assert "123,456 of 12,345,678 parameters (1.00%)" in text.getvalue()


def test_the_last_table(tmp_path):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=60)
    rows = {"accuracy before": "0.2000", "adapter": "/a/very/long/" + "path/" * 12}
    runs.print_table(rows, title="[quickstart]", console=console)
    assert "accuracy before" in text.getvalue() and "0.2000" in text.getvalue()
    assert text.getvalue().count("path/") > 5  # folded, not cut off
