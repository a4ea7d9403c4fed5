import io
import json

import matplotlib.image
import ml_collections
import pytest
import rich.console

from jaxpeft import training


def test_curves_are_a_picture_of_what_was_measured(tmp_path):
    with pytest.raises(FileNotFoundError):
        training.plot_curves(tmp_path, score="accuracy", title="a run")
    with training.MetricsWriter(tmp_path, after=None, tensorboard=False) as writer:
        writer.write("eval", 0, loss=2.0, accuracy=0.1)
        with pytest.raises(ValueError, match="no training step to draw"):
            training.plot_curves(tmp_path, score="accuracy", title="a run")
        for step in range(1, 9):
            rates = {"learning_rate/adapter": 1e-3 / step, "learning_rate/head": 1e-3}
            writer.write("train", step, loss=2 / step, penalty=0.1, **rates)
        writer.write("eval", 8, loss=0.4, accuracy=0.9)
    before = training.plot_curves(tmp_path, score="accuracy", title="a run")
    assert before == tmp_path / "curves.png"
    image = matplotlib.image.imread(before)
    assert image.shape[0] > 500 and image.shape[1] > 800 and image.std() > 0.05
    with training.MetricsWriter(tmp_path, after=8, tensorboard=False) as writer:
        writer.write("train", 9, loss=float("nan"), penalty=0.1)
        writer.write("eval", 9, loss=3.0, accuracy=float("nan"))
    after = training.plot_curves(tmp_path, score="accuracy", title="a run")
    assert (matplotlib.image.imread(after) != image).any()


def test_the_report_has_config_and_versions_inside(tmp_path):
    config = ml_collections.ConfigDict({"adapter": {"rank": 8}, "targets": ("query",)})
    path = training.write_report(tmp_path, {"accuracy": 0.9}, config)
    report = json.loads(path.read_text())
    assert report["results"] == {"accuracy": 0.9}
    assert report["config"] == {"adapter": {"rank": 8}, "targets": ["query"]}
    assert {"jax", "flax", "optax", "python", "devices"} <= report["versions"].keys()


def test_the_last_table(tmp_path):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=60)
    rows = {"accuracy before": "0.2000", "adapter": "/a/very/long/" + "path/" * 12}
    training.print_results(rows, title="[quickstart]", console=console)
    assert "accuracy before" in text.getvalue() and "0.2000" in text.getvalue()
    assert text.getvalue().count("path/") > 5  # folded, not cut off
