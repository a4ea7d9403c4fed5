"""Texts out of several columns: templates, and Alpaca's rows."""

import json

import pytest
from data_toolbox import make_tokenizer

from jaxpeft import data

ROWS = [
    {"question": "w1", "facts": {"n": 3}, "answer": 4},
    {"question": "w2", "facts": {"n": 5}, "answer": 6},
]


def written(rows, **columns):
    """The ids of the training rows' prompts and completions."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, **columns)
    encoded = data.tokenize(task, tokenizer, vocab_size=104, max_length=32)["train"]
    return encoded.ids.tolist(), encoded.learn.tolist()


def test_a_template_is_the_text_it_makes():
    by_hand = [
        {
            "q": f"w9 {{w8}} {row['question']} w{row['facts']['n']} :",
            "a": f" w{row['answer']}",
        }
        for row in ROWS
    ]
    plain = written(by_hand, prompt="q", completion="a")
    templates = dict(
        prompt="w9 {{w8}} {question} w{facts/n} :", completion=" w{answer}"
    )
    assert written(ROWS, **templates) == plain
    one = written([{"t": row["q"] + row["a"]} for row in by_hand], text="t")
    joined = templates["prompt"] + templates["completion"]
    assert written(ROWS, text=joined) == one


def test_missing_columns_and_bad_templates_are_named():
    splits = {"train": ROWS, "validation": ROWS}
    for template, message in [
        ("Q: {qestion}", "no column 'qestion'. Did you mean 'question'"),
        ("Q: {question/n}", "column 'question' has no parts"),
        ("Q: {facts/m}", "no column 'm'"),
        ("Q: {question", "`prompt` 'Q: {question' is no template: expected '}'"),
        ("Q: {question:>9}", "no more than their names"),
        ("{{Q}}", "`prompt` '{{Q}}' must have columns in braces"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.make_text_task("toy", splits, prompt=template, completion="question")
    lacking = [*ROWS, {"question": "w3"}]
    with pytest.raises(ValueError, match="row 2 has no column 'answer'"):
        written(lacking, prompt="question", completion=" {answer}")


def test_templates_over_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"q": f"w{i}", "a": i} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = data.tasks.texts(train=path, prompt="Q: {q}\nA:", completion=" {a}")
    assert {split: len(r) for split, r in task.splits.items()}.keys() >= {"validation"}
    assert sum(map(len, task.splits.values())) == 40
    record = data.prompt_set(task, train=1, validation=1).train[0]
    assert record.input.startswith("Q: w") and record.output == record.input[4:-3]


def test_alpaca(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    rows = [
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"instruction": "Greet {me}.", "input": "", "output": "Hello"},
        {"instruction": "Stop.", "output": "ok"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = dict(name="alpaca", train=str(path), validation=str(path))
    task = data.task(given)
    assert task.form == "completion" and [dict(r) for r in task.splits["train"]] == [
        {
            "prompt": "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n",
            "completion": "4",
        },
        {
            "prompt": "### Instruction:\nGreet {me}.\n\n### Response:\n",
            "completion": "Hello",
        },
        {
            "prompt": "### Instruction:\nStop.\n\n### Response:\n",
            "completion": "ok",
        },
    ]
    chats = data.task(given, chat=True)
    assert chats.form == "chat" and chats.splits["train"][0]["messages"] == [
        {"role": "user", "content": "Add.\n\n2, 2"},
        {"role": "assistant", "content": "4"},
    ]
    path.write_text("\n".join(map(json.dumps, [*rows, {"instruction": "x"}])))
    with pytest.raises(ValueError, match="row 3 has no column 'output'"):
        data.task(given)
    skipping = data.task(given, bad_rows="skip")
    assert len(skipping.splits["train"]) == 3
    assert skipping.facts["bad_rows"]["train"]["bad_rows"] == 1
