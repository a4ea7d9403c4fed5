"""A comparison by the command line: real runs, what is read when, and going on."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jaxpeft import compare
from jaxpeft.cli import main

TEXT = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    rows = dict(name="files", text="text", label="label", labels=("a", "b", "c"))
    changes = dict(
        data=dict(train={train!r}, test={test!r}, **rows),
        **dict(train_for="4 steps", evaluate_every="2 steps", save_every="2 steps"),
    )
    config.tasks = dict(abc=dict(config={tiny!r}, changes=changes))
    config.methods = dict(
        lora=dict(changes=dict(adapter=dict(name="lora", rank=2, alpha=4.0))),
        ia3=dict(changes=dict(adapter=dict(name="ia3")), grid=dict()),
    )
    config.grid = dict(optimizer=dict(learning_rate=(1e-2, 1e-5)))
    config.seeds, config.choose_with, config.reference = (0,), (0,), "lora"
    config.budget = dict()
    return config
"""


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("compare") / "compare_tiny.py"
    lines = Path(tiny).with_name("rows.jsonl").read_text().splitlines(keepends=True)
    rows = {name: str(file.with_name(f"{name}.jsonl")) for name in ("train", "test")}
    Path(rows["train"]).write_text("".join(lines[:180]))
    Path(rows["test"]).write_text("".join(lines[180:]))
    file.write_text(TEXT.format(tiny=str(tiny), **rows))
    return file


@pytest.fixture(scope="module")
def out(asked):
    """The folder of a whole comparison."""
    out = asked.parent / "out"
    assert main(["compare", str(asked), "--out", str(out)]) == 0
    return out


def contents(folder):
    return {p: p.read_text() for p in sorted(folder.rglob("*.json"))}


def test_it_is_chosen_on_validation_and_scored_on_test(out, asked):
    lora = compare.read_comparison(asked).rows["abc", "lora"]
    choice = json.loads((out / "results/abc/lora/choice.json").read_text())
    found = {row.at: compare.read_row(out / "results", row) for row in lora}
    scores = {at: one["validation"]["accuracy"] for at, one in found.items()}
    assert choice["validation"] == {at: [score] for at, score in scores.items()}
    assert choice["point"] == max(scores, key=scores.get)
    for at, one in found.items():  # nothing of what was not chosen is known
        assert ("test" in one) == (at == choice["point"])
        assert "after" not in json.dumps(one)
    one = found[choice["point"]]
    report = out / "results" / one["run"] / "report.json"
    after = json.loads(report.read_text())["results"]["after"]
    assert one["test"]["scores"] == after
    right = compare.unpacked(one["test"])
    assert len(right) == one["test"]["rows"]
    assert right.mean() == pytest.approx(after["accuracy"])
    assert one["cost"]["processor_seconds"] > 1 and one["cost"]["peak_bytes"] > 1e8
    # query, key, value, output of two layers, 32 wide.
    assert one["trainable"] == 2 * 4 * 2 * (32 + 32)
    assert one["stored"] == one["trainable"] + 8  # and a scale a site
    table = json.loads((out / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    assert set(rows) == {"lora", "ia3"}
    # LoRA: forward and backward of 8 rows of 16 tokens through eight thin pairs; IA3
    # multiplies by vectors.
    thin = 3 * 2 * 8 * 16 * one["trainable"]
    more = rows["lora"]["flops_a_step"] - rows["ia3"]["flops_a_step"]
    assert more == pytest.approx(thin, rel=0.25)
    assert (out / "table.png").stat().st_size > 5000


def test_it_goes_on_and_a_row_repeats(out, asked, capfd):
    before = contents(out / "results")
    table = (out / "table.json").read_text()
    row = compare.read_comparison(asked).rows["abc", "ia3"][0]
    file = out / "results/abc/ia3/as-given,seed=0.json"
    first = json.loads(file.read_text())
    file.unlink()
    shutil.rmtree(out / "runs/abc/ia3")
    assert row.name in first["command"] and "--only" in first["command"]
    assert main(["compare", str(asked), "--out", str(out), "--only", row.name]) == 0
    said = capfd.readouterr().out
    assert f"{row.name} ..." in said and "lora" not in said
    again = json.loads(file.read_text())
    assert again["validation"] == first["validation"] and "test" not in again
    assert main(["compare", str(asked), "--out", str(out)]) == 0
    assert "..." not in capfd.readouterr().out  # no run
    assert json.loads(file.read_text())["test"] == first["test"]
    same = contents(out / "results").items() - before.items()
    assert [p for p, _ in same] == [file]  # its cost and nothing else
    rows = lambda text: [(r["method"], r["scores"]) for r in json.loads(text)["rows"]]
    assert rows((out / "table.json").read_text()) == rows(table)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found | {"format": 0}, "results of format 0, not 1"),
        (lambda found: found | {"config": {}}, "results of another config"),
        (lambda found: found | {"versions": {}}, "'jax': None.*and here is"),
        (lambda found: [], "damaged"),
    ],
)
def test_a_file_that_does_not_belong(out, asked, tmp_path, change, words):
    row = compare.read_comparison(asked).rows["abc", "ia3"][0]
    name = "abc/ia3/as-given,seed=0.json"
    (tmp_path / name).parent.mkdir(parents=True)
    found = change(json.loads((out / "results" / name).read_text()))
    (tmp_path / name).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=words):
        compare.read_row(tmp_path, row)


def test_where_a_row_ran_is_no_other_config(out, asked, tmp_path):
    row = compare.read_comparison(asked).rows["abc", "ia3"][0]
    name = "abc/ia3/as-given,seed=0.json"
    (tmp_path / name).parent.mkdir(parents=True)
    found = json.loads((out / "results" / name).read_text())
    found["config"] |= {"mesh": {"data": 4}, "input": {"workers": 2}, "log": {}}
    (tmp_path / name).write_text(json.dumps(found))
    assert compare.read_row(tmp_path, row) == found


def test_what_cannot_meet_the_budget_is_left_out(out, asked, capfd):
    text = asked.read_text().replace(
        "config.budget = dict()", "config.budget = dict(trainable=500, tolerance=0.1)"
    )
    other = asked.with_name("compare_budget.py")
    other.write_text(text)
    found = str(out / "results")
    given = ["compare", str(other), "--out", str(out / "budget"), "--results", found]
    assert main(given) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "abc/lora is left out: 1,024 parameters" in said and "..." not in said
    table = json.loads((out / "budget/table.json").read_text())
    assert "the budget is 500 within 10%" in table["left_out"]["abc/lora"]


def test_a_task_without_test_rows(asked, tmp_path, capfd):
    other = asked.with_name("compare_untested.py")
    other.write_text(re.sub(r"test='[^']*', ", "", asked.read_text()))
    assert main(["compare", str(other), "--out", str(tmp_path)]) == 2
    assert "'abc' has no test rows" in capfd.readouterr().err


def test_no_such_row(asked, capfd):
    assert main(["compare", str(asked), "--only", "abc/dora"]) == 2
    assert "'abc/dora' is no row" in capfd.readouterr().err


def test_a_run_that_fails_is_one_message(asked, tmp_path, capfd):
    model = "changes = dict(model=dict(name='/nowhere'),"
    other = asked.with_name("compare_nowhere.py")
    other.write_text(asked.read_text().replace("changes = dict(", model, 1))
    given = ["compare", str(other), "--out", str(tmp_path)]
    assert main([*given, "--only", "abc/ia3"]) == 2
    said = capfd.readouterr().err
    assert "abc/ia3/as-given/seed=0 ended with status 2" in said and "/nowhere" in said
    assert not (tmp_path / "results").exists()
