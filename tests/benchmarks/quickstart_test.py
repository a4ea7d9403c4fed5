"""The README's curve: what is kept of a run, and that it is drawn."""

import json

from benchmarks import quickstart


def test_a_run_is_kept_and_drawn(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    events = [{"event": "eval", "step": 0, "accuracy": 0.25, "loss": 1.7}]
    events += [{"event": "train", "step": n, "loss": 1 / n} for n in (1, 2, 3)]
    events += [{"event": "eval", "step": 3, "accuracy": 0.98765, "loss": 0.3}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    results = {"split": "test", "before": {}, "after": {"accuracy": 0.9}, "seconds": 1}
    report = {"versions": {"jax": "0"}, "results": results}
    (run / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(quickstart, "RESULTS", tmp_path)
    assert quickstart.main(["--run", str(run)]) == 0
    kept = json.loads((tmp_path / "quickstart.json").read_text())
    assert kept["validation_accuracy"] == [[0, 0.25], [3, 0.9877]]
    assert kept["loss"] == [[1, 1.0], [2, 0.5], [3, 0.3333]]
    assert "seconds" not in kept["results"]  # this machine's
    assert (tmp_path / "quickstart.png").stat().st_size > 1000
