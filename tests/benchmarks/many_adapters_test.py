"""The comparison of mixed batches, at a size where only honesty shows."""

import json

import numpy as np
import pytest

from benchmarks import many_adapters
from benchmarks.many_adapters import Size

TOY = Size(64, 96, 1, 64, rows=4, adapters=2, rank=2, tokens=8, prompt=4, new=2)


def test_all_ways_give_every_row_the_same(monkeypatch):
    model, params, slots, trees = many_adapters.build(TOY, False, None)
    calls = many_adapters.ways(TOY, params, slots, trees)
    forward = many_adapters.jp.adapt(lambda p, x: model.apply({"params": p}, x))
    ids = np.arange(TOY.rows * 6, dtype=np.int32).reshape(TOY.rows, 6)
    ((mixed, rows),) = calls["mixed"]
    assert rows == TOY.rows
    together, at = np.asarray(forward(mixed, ids)), 0
    for tree, rows in calls["apart"]:  # each adapter has its own two rows
        alone = np.asarray(forward(tree, ids[at : at + rows]))
        assert np.abs(alone - together[at : at + rows]).max() < 1e-5
        at += rows
    one = np.asarray(forward(calls["one"][0][0], ids))
    assert np.abs(one[2:] - together[2:]).max() > 1e-3
    assert at == TOY.rows

    monkeypatch.setattr(
        many_adapters, "build", lambda *_: (model, params, slots, trees)
    )
    reading, writing = many_adapters.compare(TOY, False, None, turns=1)
    assert (reading.task, writing.task, reading.how) == ("reading", "writing", "gather")
    assert reading.ratios["one"] == (1.0, 1.0, 1.0)
    assert reading.flops["base"] < reading.flops["mixed"] == pytest.approx(1)


def test_a_slow_mixed_batch_is_a_failure(monkeypatch, tmp_path, capsys):
    def compare(size, scan, how, turns):
        assert (size.rank, how, turns) == (3, "ragged", 2)
        middle = {"one": 1.0, "mixed": 1.4 if scan else 1.2}
        ratios = {way: (m, m, m) for way, m in middle.items()}
        return [
            many_adapters.Row("reading", str(scan), how, middle, ratios, middle, middle)
        ]

    monkeypatch.setattr(many_adapters, "compare", compare)
    file = tmp_path / "figures.json"
    given = ["--turns", "2", "--how", "ragged", "--rank", "3", "--json", str(file)]
    assert many_adapters.main(given) == 1
    assert "1.40 times one" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["size"]["rank"] == 3 and len(record["rows"]) == 2
