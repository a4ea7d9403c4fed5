"""The table of a GPU's steps, to its end on a toy and the CPU; no time is looked at."""

import json

import pytest

import jaxpeft as jp
from benchmarks import gpu_table
from benchmarks.peers import gpu_steps


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_toy_runs_to_its_end(tmp_path, monkeypatch, capsys):
    for name in ("WARM", "STEPS", "TURNS"):
        monkeypatch.setattr(gpu_table, name, 1)
    file = tmp_path / "new" / "table.json"
    measure, written = gpu_table.measure, []

    def measure_and_look(*arguments):
        if file.exists():  # the rows before are there when the next begins
            written.append(len(json.loads(file.read_text())["rows"]))
        return measure(*arguments)

    monkeypatch.setattr(gpu_table, "measure", measure_and_look)
    # Of ours the plainest, and the one with most leaves: each compiles for seconds.
    slow = ("ours/dora", "ours/bora")
    quick = [name for name in gpu_table.ROWS if name not in slow]
    told = ["--model", "toy", "--here", "--json", str(file), "--only", *quick]
    assert gpu_table.main(told) == 0
    record = json.loads(file.read_text())
    assert record["command"].startswith("python -m benchmarks.gpu_table --model toy")
    assert record["versions"]["jax"] and record["tokens_a_step"] == 64
    rows = record["rows"]
    assert list(rows) == quick and written == list(range(1, len(rows)))
    for name, row in rows.items():
        assert row.get("failed") == {} and row["tokens_per_second"] > 0, (name, row)
        assert row["parameters"] == rows["ours/lora"]["parameters"]
        assert row["trained"] >= rows["ours/lora"]["trained"]
    assert rows["hand/lora"]["trained"] == rows["peft/lora"]["trained"]
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in rows)
    for name in slow:
        given = gpu_table.ROWS[name], {**gpu_table.SHARED, **gpu_table.MODELS["toy"]}
        _, _, adapted = gpu_steps._adapted(*given, 64, gpu_table.RANK, (None, None))
        assert jp.count(adapted)[0] > rows["ours/lora"]["trained"]


def test_a_row_that_does_not_run_is_a_row(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    told = ["--model", "toy", "--json", str(file)]
    gpu_table.main([*told, "--minutes", "0", "--only", "ours/lora"])
    assert rows_of(file)["ours/lora"] == {"left_out": "no time was left"}
    # In a process of its own, which is cut off at once.
    gpu_table.main([*told, "--minutes", "0.005", "--only", "ours/dora"])
    assert rows_of(file)["ours/dora"] == {"left_out": "cut off after 0 s"}
    # What fits in no way says why.
    monkeypatch.setattr(gpu_table, "ELSEWHERE", ((None, "all of it"),))
    gpu_table.main([*told, "--here", "--only", "ours/lora"])
    row = rows_of(file)["ours/lora"]
    assert row["left_out"] == "it ran in no way" and "remat" in str(row["failed"])
    # PyTorch without a GPU is measured on the toy alone.
    monkeypatch.setitem(gpu_table.MODELS["toy"], "hidden_size", 128)
    gpu_table.main([*told, "--here", "--only", "peft/lora"])
    if not torch_sees_a_gpu():
        assert rows_of(file)["peft/lora"] == {"left_out": "PyTorch sees no GPU"}


def rows_of(file):
    return json.loads(file.read_text())["rows"]


def torch_sees_a_gpu():
    import torch

    return torch.cuda.is_available()


def test_mfu_is_of_the_chips_most(monkeypatch):
    facts = {"parameters": 8e9, "flops": 989e12, "peak": lambda: 5, "device": "x"}
    step = (lambda: None), facts
    monkeypatch.setattr(gpu_steps, "our_step", lambda *_: step)
    monkeypatch.setattr(gpu_table, "_timed", lambda _: [0.3, 0.25, 0.2])
    row = gpu_table.measure(gpu_table.ROWS["ours/lora"], "8b", 4096)
    # 16,384 tokens a second, 4 x 8e9 FLOPs each, of 989e12.
    assert row["mfu"] == pytest.approx(0.5301, abs=1e-4) and row["peak_bytes"] == 5
