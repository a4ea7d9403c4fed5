"""One bad row: named, or left out and counted, in every kind of task."""

import inspect
import json

import numpy as np
import pytest
from data_toolbox import make_rows, make_tokenizer, toy_task

from jaxpeft import data

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['content'] }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS] {% endif %}"
)
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
# Of each form: columns, a good row, a bad one, and what is wrong with it.
FORMS = {
    "text": ({"text": "t"}, {"t": "w1"}, {"t": 5}, "'t' must be text; got int 5"),
    "completion": (
        {"prompt": "q", "completion": "a"},
        {"q": "w1", "a": " w2"},
        {"q": "w1", "a": None},
        "no value in column 'a'",
    ),
    "template": (
        {"prompt": "{q} w3", "completion": " {a}"},
        {"q": "w1", "a": "w2"},
        {"q": "w1"},
        "no column 'a'",
    ),
    "choice": (
        {"prompt": "q", "choices": "c", "answer": "a"},
        {"q": "w1", "c": [" w2", " w3"], "a": 1},
        {"q": "w1", "c": [" w2", " w3"], "a": 2},
        "a place from 0 to 1",
    ),
    "chat": (
        {"messages": "m"},
        {"m": CHAT},
        {"m": CHAT[:1]},
        "no message has the role 'assistant'",
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.eos_token, made.chat_template = "[SEP]", TEMPLATE
    return made


def encode(task, tokenizer):
    return data.tokenize(task, tokenizer, vocab_size=104, max_length=32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_writing_tasks(tokenizer, form, place):
    columns, good, bad, message = FORMS[form]
    rows = [good, good]
    rows.insert(place, bad)
    splits = {"train": rows, "validation": rows}
    make = lambda rows, **more: data.make_text_task("toy", rows, **columns, **more)
    with pytest.raises(ValueError, match=f"row {place}.*{message}"):
        encode(make(splits), tokenizer)
    found = encode(make(splits, bad_rows="skip"), tokenizer)
    alone = encode(make({"train": [good] * 2, "validation": [good] * 2}), tokenizer)
    for split in splits:
        np.testing.assert_array_equal(found[split].ids, alone[split].ids)
        np.testing.assert_array_equal(found[split].learn, alone[split].learn)
        facts = dict(found[split].facts)
        assert facts.pop("bad_rows") == 1 and facts["rows"] == 3
        assert f"row {place}" in facts.pop("first_bad_row")
        json.dumps(facts)
    nothing = make({"train": [bad, bad], "validation": [good]}, bad_rows="skip")
    with pytest.raises(ValueError, match=f"none of its 2 rows can be read.*{message}"):
        encode(nothing, tokenizer)


def test_tasks_of_a_user_s_rows_have_the_same_options():
    """What one of them takes to read files and to treat bad rows, all take."""
    reading, found = {"delimiter", "quoting", "encoding"}, set()
    for name, function in inspect.getmembers(data.tasks, inspect.isfunction):
        known = inspect.signature(function).parameters
        files = "train" in known and "Path" in str(known["train"].annotation)
        if files or {"dataset", "splits"} <= set(known):
            found.add(name)
            assert set(known) >= {"bad_rows"} | (reading if files else set()), name
    assert {"files", "texts", "choices", "alpaca", "tfds", "tfds_texts"} <= found
    splits = {"train": [{"t": "a"}], "test": [{"t": None}]}
    assert data.also_in_train(splits, ["t"], "skip") == {"test": 0}
    with pytest.raises(ValueError, match="`bad_rows` must be one of .* got 'skp'"):
        data.also_in_train(splits, ["t"], "skp")


@pytest.mark.parametrize("labels", [["a", "b", "c"], None])
def test_classes_and_numbers(tokenizer, labels):
    rows = make_rows(5)
    rows[3] = {"text": rows[3]["text"], "label": float("nan")}
    task = toy_task(rows, labels=labels)
    with pytest.raises(ValueError, match=r"row 3.*bad_rows='skip'"):
        encode(task, tokenizer)
    found = encode(toy_task(rows, labels=labels, bad_rows="skip"), tokenizer)["train"]
    alone = encode(toy_task(rows[:3] + rows[4:], labels=labels), tokenizer)["train"]
    for column in ("ids", "types", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(found, column), getattr(alone, column))
    assert found.facts["bad_rows"] == 1 and "nan" in found.facts["first_bad_row"]
    assert alone.facts is None


def test_by_name_in_a_config(tmp_path, tokenizer):
    """Also where rows are read when the task is made, and in a mixture."""
    path = tmp_path / "moods.jsonl"
    rows = [{"text": f"w{i}", "label": "ab"[i % 2]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": 5, "label": "a"}])))
    files = dict(name="files", train=str(path), text="text", label="label")
    files |= {"labels": ["a", "b"]}
    with pytest.raises(ValueError, match="row 40: column 'text' must be text"):
        data.task(files)
    task = data.task(files, bad_rows="skip")
    assert task.facts["bad_rows"]["train"]["bad_rows"] == 1
    assert sum(map(len, task.splits.values())) == 40
    asked = data.prompt_set(
        data.task(files, validation=str(path), bad_rows="skip"),
        template="{text}?",
        evaluated=99,
    )
    assert len(asked.evaluated) == 40
    assert asked.facts["bad_rows"]["validation"]["bad_rows"] == 1

    path.write_text('{"q": "w1", "c": ["w2", "w3"], "a": 0}\n{"q": "w1", "c": "w2"}')
    choices = dict(name="choices", train=str(path), validation=str(path), prompt="{q}")
    choices |= {"choices": "c", "answer": "a"}
    with pytest.raises(ValueError, match="row 1: column 'c' must be a list"):
        data.task(choices)
    task = data.task(choices, bad_rows="skip")
    assert task.facts["bad_rows"]["train"]["bad_rows"] == 1
    mixed = data.task(
        {"name": "mixture", "tasks": {"one": choices, "other": choices}},
        bad_rows="skip",
    )
    assert all(part.bad_rows == "skip" for part in mixed.parts.values())
    with pytest.raises(ValueError, match=r"`bad_rows` must be one of .* got 'drop'"):
        data.task(choices, bad_rows="drop")
    with pytest.raises(ValueError, match=r"`bad_rows` must be one of .* got 'drop'"):
        toy_task(make_rows(3), bad_rows="drop")
