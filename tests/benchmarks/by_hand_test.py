"""Our train step beside one written by hand: the same numbers at the same cost."""

import json

import pytest

from benchmarks import by_hand

TOY = by_hand.Size(32, 2, 2, 1, hidden=48, vocabulary=64, batch=4, length=16, rank=2)


def test_it_is_the_same_step_at_the_same_cost(monkeypatch, tmp_path, capsys):
    rows = [by_hand.compare(TOY, scan, turns=1) for scan in (True, False)]
    for row in rows:
        # Measured: 1 and at most 1.005.
        assert row.flops == pytest.approx(1.0, abs=1e-3)
        assert row.temporaries < 1.03
        assert row.time[0] == row.time[1] == row.time[2] > 0
    monkeypatch.setattr(by_hand, "compare", lambda *args: rows[0])
    file = tmp_path / "new" / "by_hand.json"
    assert by_hand.main(["--json", str(file)]) == 0
    assert "| scanned |" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"][0]["flops"] == rows[0].flops


def test_another_step_is_not_compared(monkeypatch):
    written = by_hand.written_by_hand

    def wrong(size, scan):
        loss = written(size, scan)
        return lambda *args: 1.0001 * loss(*args)

    monkeypatch.setattr(by_hand, "written_by_hand", wrong)
    with pytest.raises(RuntimeError, match="the losses differ"):
        by_hand.compare(TOY, True, turns=1)
