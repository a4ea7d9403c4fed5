"""Prompts of tasks: the exact texts, and which demonstrations they show."""

import json

import pytest
from data_toolbox import make_rows, make_tokenizer, toy_task

from jaxpeft import data
from jaxpeft.data import Record

A, B, C = (Record(f"{x}?", x.upper()) for x in "abc")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ([], "c?\n"),
        ([A], "a?\nA\n\nc?\n"),
        ([B, A], "b?\nB\n\na?\nA\n\nc?\n"),
    ],
    ids=["none", "one", "two"],
)
def test_the_exact_prompt(shown, text):
    assert data.write_prompt(C, shown) == text
    assert C.combined == "c?\nC"


def test_official_draws():
    """Those of the study's own code: random.Random(42), question by question."""
    draw = lambda k: data.draw_demonstrations(5000, 1000, k)
    five = draw(5)
    assert five[0] == (654, 114, 25, 759, 281)
    assert draw(2)[:2] == [(654, 114), (25, 759)]
    assert len(five) == 5000 and all(len(set(one)) == 5 for one in five)
    assert draw(0) == [()] * 5000
    assert data.draw_demonstrations(3, 1000, 2, seed=1) != draw(2)[:3]


def test_nested_and_disjoint_draws():
    three, nine = (data.draw_demonstrations(50, 60, k, "nested") for k in (3, 9))
    assert [one[:3] for one in nine] == three
    assert all(len(set(one)) == 9 for one in nine)
    assert {i for one in nine for i in one} == set(range(60))  # none is left out
    assert data.draw_demonstrations(2, 9, 9, "nested")[0] != (0, 1, 2, 3, 4, 5, 6, 7, 8)
    apart = data.draw_demonstrations(20, 60, 3, "disjoint")
    assert sorted(i for one in apart for i in one) == list(range(60))
    with pytest.raises(ValueError, match="need 63 training records .* there are 60"):
        data.draw_demonstrations(21, 60, 3, "disjoint")
    with pytest.raises(ValueError, match="`shots` 61 .* there are 60"):
        data.draw_demonstrations(1, 60, 61)
    with pytest.raises(ValueError, match="'official', 'nested', 'disjoint'.*'nest'"):
        data.draw_demonstrations(1, 60, 1, "nest")


def test_a_task_with_classes():
    rows = make_rows(90)
    task = toy_task(rows[:50])
    task = task._replace(splits={"train": rows[:50], "validation": rows[50:60]})
    options = dict(template="{text}\nWhich?", words=["x", "y", "z"], validation=5)
    found = data.prompt_set(task, train=20, evaluated=18, **options)
    assert (len(found.train), len(found.validation), len(found.evaluated)) == (
        20,
        5,
        18,
    )
    assert found.facts["evaluated_from"] == {"validation": 10, "train": 8}
    every = [*found.train, *found.validation, *found.evaluated]
    right = {f"{row['text']}\nWhich?": "xyz"[row["label"]] for row in rows}
    assert all(right[record.input] == record.output for record in every)
    assert len({record.input for record in every}) == 43  # none in two
    again = data.prompt_set(task, train=20, evaluated=18, **options)
    assert again.key == found.key
    other = data.prompt_set(task, train=20, evaluated=18, seed=1, **options)
    assert other.key != found.key and other.train != found.train
    tested = task._replace(splits={**task.splits, "test": rows[60:]})
    found = data.prompt_set(tested, train=20, evaluated=18, **options)
    assert found.facts["evaluated_from"] == {"test": 18, "train": 0}
    held = {f"{row['text']}\nWhich?" for row in rows[50:60]}
    assert {record.input for record in found.validation} < held


def test_choices_are_lettered():
    rows = [
        {"p": "2 + 2?\nAnswer:", "c": [" 3", " 4", " 5"], "a": 1},
        {"p": "1 + 1?\nAnswer:", "c": [" 2", " 7"], "a": 0},
    ]
    task = data.make_text_task(
        *("sums", {"train": rows[1:], "validation": rows[:1]}),
        **dict(prompt="p", choices="c", answer="a"),
    )
    found = data.prompt_set(task)
    text = "2 + 2?\nA. 3\nB. 4\nC. 5\nWhich letter is right?"
    assert found.evaluated == (Record(text, "B"),)
    assert found.labels == ("A", "B", "C") and found.train[0].output == "A"
    many = [{"p": "Which?", "c": [f" {i}" for i in range(27)], "a": 26}]
    splits = {"train": many, "validation": many}
    columns = dict(prompt="p", choices="c", answer="a")
    with pytest.raises(ValueError, match="row 0: it has 27 choices.* 26 letters"):
        data.prompt_set(data.make_text_task("many", splits, **columns))
    none = [{"p": "Which?", "c": " 3", "a": 0}]
    splits = {"train": none, "validation": none}
    task = data.make_text_task("none", splits, bad_rows="skip", **columns)
    with pytest.raises(ValueError, match="none of its 1 rows can be read"):
        data.prompt_set(task)


def test_prompts_and_completions_are_taken_as_they_are():
    rows = [{"q": "2 + 2 =", "a": " 4"}]
    task = data.make_text_task(
        *("sums", {"train": rows, "validation": rows}), prompt="q", completion="a"
    )
    found = data.prompt_set(task)
    assert found.evaluated == (Record("2 + 2 =", "4"),) and found.labels is None


def test_files(tmp_path):
    path = tmp_path / "moods.jsonl"
    rows = [{"input": "oh", "output": "bad"}, {"input": "ah", "output": "good"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = data.prompt_files(path, path)
    assert found.evaluated == (Record("oh", "bad"), Record("ah", "good"))
    assert found.labels == ("bad", "good") and found.name == "moods"
    assert data.prompt_files(path, path, labels=["good", "bad"]).labels[0] == "good"
    with pytest.raises(ValueError, match="lack the output 'good'"):
        data.prompt_files(path, path, labels=["bad"])
    path.write_text('{"input": "oh"}')
    with pytest.raises(ValueError, match="record 0 has no column 'output'"):
        data.prompt_files(path, path)


def test_what_has_no_prompts():
    task = toy_task(make_rows(9))
    wrong = {
        "'toy' has no wording of ours.*{text}": {},
        "asks for the column 'txt'.*Did you mean 'text'": {"template": "{txt}?"},
        "must have the task's columns in braces, text": {"template": "Which?"},
        "a different one for each of the classes a, b, c": {
            "template": "{text}",
            "words": ["x", "x", "y"],
        },
        "`train` must be at least 1; got 0": {"train": 0},
        "`validation` must be at least 0; got -2": {"validation": -2},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            data.prompt_set(task, **options)
    with pytest.raises(ValueError, match="is of numbers and has no prompts"):
        data.prompt_set(toy_task(make_rows(9), labels=None))


@pytest.fixture
def forms(monkeypatch):
    """The small rows as a task of ours with a wording."""
    from jaxpeft.data import _prompts, tasks

    task = toy_task(make_rows(40))
    monkeypatch.setattr(tasks, "toy", lambda: task, raising=False)
    monkeypatch.setitem(_prompts.FORMS, "toy", ("{text} ?", ("x", "y", "z")))
    return task


def test_a_task_to_fine_tune_on(forms):
    """The records that are demonstrated and asked, as text or as completions."""
    records = data.prompt_set(forms, train=10, evaluated=5, validation=3)
    sizes = dict(train=10, test=5, validation=3)
    task = data.task("prompted/toy", **sizes)
    assert task.form == "text" and task.name == "prompted/toy"
    texts = lambda split: [row["text"] for row in task.splits[split]]
    assert texts("train") == [record.combined for record in records.train]
    assert texts("test") == [record.combined for record in records.evaluated]
    assert task.facts["records"] == records.key
    task = data.task("prompted/toy", loss="completion", **sizes)
    first = records.train[0]
    assert task.splits["train"][0] == {
        "prompt": f"{first.input}\n",
        "completion": first.output,
    }
    with pytest.raises(ValueError, match="'completion'"):
        data.task("prompted/toy", loss="complete")


def test_which_tokens_are_learnt(forms):
    """All but the first of a text; of a completion those behind the prompt."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    sizes = dict(train=10, test=5, validation=3)
    learnt = {}
    for loss in ("text", "completion"):
        encoded = data.tokenize(
            data.task("prompted/toy", loss=loss, **sizes),
            tokenizer,
            **dict(vocab_size=104, max_length=64, splits=["train"]),
        )["train"]
        (batch,) = data.evaluation_batches(encoded, 10, lengths=[64])
        learnt[loss] = batch["target_weights"].sum(1), batch["attention_mask"].sum(1)
    assert (learnt["text"][0] == learnt["text"][1] - 1).all()
    assert (learnt["completion"][0] == 2).all()  # the word and the end
