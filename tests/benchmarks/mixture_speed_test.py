"""Mixtures beside one LoRA of their width, at a size where only honesty shows."""

import json

import pytest

from benchmarks import mixture_speed

TOY = mixture_speed.Size(64, 96, 1, 64, batch=2, length=8, experts=3, rank=2)


def test_steps_are_counted_and_take_turns():
    rows = mixture_speed.compare(TOY, turns=1, names=("modula_res",))
    assert [r.method for r in rows] == ["lora", "modula_res"]
    assert rows[0].time == rows[0].processor == (1.0, 1.0, 1.0)
    for row in rows:
        assert row.flops == pytest.approx(1, abs=0.1)
        assert row.time[0] == row.time[1] == row.time[2] > 0
        assert row.step_ms > 0


def test_a_slow_mixture_is_a_failure(monkeypatch, tmp_path, capsys):
    def compare(size, turns):
        assert (size.rank, turns) == (3, 2)
        made = {"lora": 1.0, "mola": 1.2 if size.experts > 4 else 1.0}
        return [
            mixture_speed.Row(n, 1.0, 1.0, 5.0, (t, t, t), (t, t, t))
            for n, t in made.items()
        ]

    monkeypatch.setattr(mixture_speed, "compare", compare)
    file = tmp_path / "new" / "figures.json"
    given = ["--turns", "2", "--rank", "3", "--json", str(file)]
    assert mixture_speed.main(given) == 1
    assert (
        "| mola | 1.000 | 1.000 | 5 | 1.200 (1.20 to 1.20)" in capsys.readouterr().out
    )
    record = json.loads(file.read_text())
    assert record["size"]["rank"] == 3 and record["limit"] == 1.05
    assert mixture_speed.main([*given, "--experts", "4"]) == 0
