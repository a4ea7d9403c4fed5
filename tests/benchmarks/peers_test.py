"""The comparison with HF PEFT, at a size where only its honesty shows."""

import json
import os

import pytest

from benchmarks import against_peers

CORE = min(os.sched_getaffinity(0))


@pytest.mark.interop
def test_both_sides_take_the_same_step(tmp_path, monkeypatch, capsys):
    size = against_peers.Size("toy", 32, 1, 2, batch=2, length=8, vocabulary=64)
    monkeypatch.setattr(against_peers, "SIZES", (size,))
    against_peers.write_model(tmp_path, "decoder", size)
    row = against_peers.compare(tmp_path, "decoder", size, "dora", 2, 1, True, CORE)
    assert row.time[1] <= row.time[0] <= row.time[2]
    assert 0 < row.frozen[1] <= row.frozen[0] <= row.frozen[2]
    assert row.memory == pytest.approx(row.memory_mb[0] / row.memory_mb[1], rel=1e-2)
    monkeypatch.setattr(against_peers, "compare", lambda *args: row)
    arguments = ["--sizes", "toy", "--methods", "dora"]
    file = tmp_path / "new" / "peers.json"
    assert against_peers.main([*arguments, "--json", str(file)]) == 0
    assert "| toy decoder | dora |" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["rows"]) == 2


@pytest.mark.interop
def test_another_step_is_not_compared(tmp_path, monkeypatch):
    class Worker:
        def __init__(self, module, settings):
            self.first = 1.0 if module.endswith("jaxpeft") else 1.01

    monkeypatch.setattr(against_peers, "Worker", Worker)
    with pytest.raises(RuntimeError, match="first losses differ"):
        size = against_peers.SIZES[0]
        against_peers.compare(tmp_path, "encoder", size, "lora", 2, 1, True, CORE)
