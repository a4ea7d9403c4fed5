"""The comparison of writing with transformers, at a size where only honesty shows."""

import json

import pytest

from benchmarks import against_peers, decoding
from benchmarks.peers import write_with_jaxpeft, write_with_transformers

PROMPTS = [[5, 9, 33, 2], [7, 11]]


@pytest.mark.interop
def test_both_sides_write_the_same(tmp_path):
    size = against_peers.Size("toy", 32, 1, 2, batch=2, length=8, vocabulary=64)
    against_peers.write_model(tmp_path, "decoder", size)
    settings = {"weights": str(tmp_path), "prompts": PROMPTS, "new": 5, "scan": False}
    ours = write_with_jaxpeft.build(settings)()
    assert ours == write_with_transformers.build(settings)()
    assert [len(row) for row in ours] == [5, 5] and ours[0] != ours[1]


def test_speeds_are_ratios_of_turns(tmp_path, monkeypatch, capsys):
    answers = {"ours": [9, 1.0, 2.0, 4.0], "theirs": [9, 3.0, 4.0, 4.0]}

    class Worker:
        def __init__(self, module, settings):
            side = "theirs" if module.endswith("transformers") else "ours"
            self.left = list(answers[side])
            self.first = self.left.pop(0)

        def ask(self, command):
            return {"seconds": self.left.pop(0)}

        def close(self):
            assert not self.left

    monkeypatch.setattr(decoding, "Worker", Worker)
    row = decoding.compare(tmp_path, PROMPTS, 4, False, 3, quiet=True)
    assert row.speed == (2.0, 1.0, 3.0)
    assert row.tokens_a_second == (4.0, 2.0)
    monkeypatch.setattr(decoding, "compare", lambda *args, **options: row)
    monkeypatch.setattr(decoding, "material", lambda: (tmp_path, PROMPTS))
    file = tmp_path / "new" / "decoding.json"
    assert decoding.main(["--batches", "1", "--json", str(file)]) == 0
    assert "| unrolled | 2 | 4.0 / 2.0 | 2.00" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["rows"]) == 2

    monkeypatch.undo()
    answers["ours"][0] = 8
    monkeypatch.setattr(decoding, "Worker", Worker)
    with pytest.raises(RuntimeError, match="they write differently"):
        decoding.compare(tmp_path, PROMPTS, 4, False, 3, quiet=True)
