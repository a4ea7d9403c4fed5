"""Multiple choice: tokens as in training, and the likeliest choice counts."""

import hashlib
import json

import numpy as np
import pytest

from jaxpeft import data

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(40))]
BOS, EOS, W = 1, 2, 4
COLUMNS = {"prompt": "q", "choices": "c", "answer": "a"}
ROWS = [
    {"q": "w1 w2", "c": [" w3", " w4 w5"], "a": 1},
    {"q": b"w6", "c": np.array([b" w7", b" w8", b" w9"], object), "a": " w7"},
]


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"},
        unk_token="[UNK]",
        model_max_length=64,
    )


def make_task(rows, **options):
    splits = {"train": rows, "validation": rows}
    return data.make_text_task("toy", splits, **COLUMNS, **options)


def encode(tokenizer, rows, max_length=16, **options):
    return data.tokenize(
        make_task(rows, **options), tokenizer, vocab_size=44, max_length=max_length
    )


def test_held_out_rows_are_their_choices_and_training_rows_the_right_one(tokenizer):
    encoded = encode(tokenizer, ROWS, pack=True)
    held = encoded["validation"]
    pairs = list(zip(held.offsets, held.offsets[1:], strict=False))
    rows = [(held.ids[a:b].tolist(), held.learn[a:b].sum()) for a, b in pairs]
    assert rows == [
        ([BOS, W + 1, W + 2, W + 3], 1),
        ([BOS, W + 1, W + 2, W + 4, W + 5], 2),
        ([BOS, W + 6, W + 7], 1),
        ([BOS, W + 6, W + 8], 1),
        ([BOS, W + 6, W + 9], 1),
    ]
    for (_, end), (_, count) in zip(pairs, rows, strict=True):
        assert held.learn[end - count : end].all()
    assert held.labels.tolist() == [
        [1, 0, 0, 2, 0],
        [2, 0, 1, 2, 1],
        [1, 1, 0, 3, 1],
        [1, 1, 1, 3, 0],
        [1, 1, 2, 3, 0],
    ]
    assert held.facts == {"rows": 2, "choices": 5, "tokens": 18}
    (batch,) = data.evaluation_batches(held, 8, lengths=(8,))
    assert batch["label"].shape == (8, 5) and batch["valid"].sum() == 5
    np.testing.assert_array_equal(batch["target_weights"].sum(1), batch["label"][:, 0])
    learnt = encoded["train"]
    assert learnt.rows == 1
    assert learnt.ids.tolist() == [
        *[BOS, W + 1, W + 2, W + 4, W + 5, EOS],
        *[BOS, W + 6, W + 7, EOS],
    ]
    assert learnt.learn.astype(int).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]


def test_scores_in_any_order():
    task = make_task(ROWS)
    labels = np.array(
        [
            *([1, 0, 0, 2, 0], [4, 0, 1, 2, 1]),
            *([2, 1, 0, 3, 1], [1, 1, 1, 3, 0], [2, 1, 2, 3, 0]),
        ]
    )
    losses = np.array([2.0, 3.0, 5.0, 4.0, 4.0])
    outputs = np.stack([losses, labels[:, 0], np.zeros(5)], 1).astype(np.float32)
    # By sums: the first choice of question 0, the second of question 1; both wrong.
    wanted = {"accuracy": 0.0, "accuracy_per_token": 0.5}
    assert data.score(task, outputs, labels) == wanted
    order = np.array([3, 0, 4, 2, 1])
    assert data.score(task, outputs[order], labels[order]) == wanted
    outputs[:, 0] = [3, 3, 4, 4, 4]  # of equal ones the first: wrong, then right
    assert data.score(task, outputs[order], labels[order])["accuracy"] == 0.5
    only = make_task(ROWS, metrics="accuracy_per_token")
    assert data.score(only, outputs, labels) == {"accuracy_per_token": 1.0}
    assert only.best == {"metric": "accuracy_per_token", "mode": "max"}
    with pytest.raises(ValueError, match="count 10 learnt tokens, `labels` 11"):
        data.score(task, outputs, labels + np.eye(5, dtype=int) * [1, 0, 0, 0, 0])
    for lost in range(5):
        kept = np.arange(5) != lost
        with pytest.raises(ValueError, match=f"once, .* question {int(lost > 1)} has"):
            data.score(task, outputs[kept], labels[kept])
    outputs[4, 0] = np.nan
    with pytest.raises(ValueError, match="question 1, choice 2 of task 'toy' has nan"):
        data.score(task, outputs, labels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"a": 2},
            r"column 'a' must be a place from 0 to 1 or .* got 2",
        ),
        ({"a": -1}, "got -1"),
        ({"a": True}, "got True"),
        ({"a": "w5"}, "or the text of one of the choices .*; got 'w5'"),
        ({"c": ["w3"]}, "two or more different choices; got .'w3'"),
        ({"c": ["w3", "w3 "]}, "two or more different choices"),
        ({"c": "w3 w4"}, "column 'c' must be a list of texts; got 'w3 w4'"),
        ({"c": ["w3", 4]}, r"column 'c\[1\]' must be text; got int 4"),
        ({"c": ["w3", " "]}, "row 0: choice 1, ' ', has no token to score"),
        ({"q": "w1 " * 9}, "choice 0 has 11 tokens .* and 2 .* max_length=11"),
    ],
)
def test_bad_rows(tokenizer, row, message):
    rows = [{"q": "w1", "c": ["w3", "w4"], "a": 0} | row]
    with pytest.raises(ValueError, match=message):
        data.tokenize(
            make_task(rows),
            tokenizer,
            vocab_size=44,
            max_length=8,
            splits=["validation"],
        )


def test_bad_tasks():
    with pytest.raises(ValueError, match="of the multiple-choice task 'toy' has 'f1'"):
        make_task(ROWS, metrics="f1")
    with pytest.raises(ValueError, match="or `prompt`, `choices` and `answer`; got"):
        data.make_text_task("toy", {}, prompt="q", choices="c")


def test_files_of_several_kinds(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": {"stem": "{one}"}, "options": ["x", "y"], "key": "B"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = dict(name="choices", train=str(path), validation=str(path))
    task = data.task(
        given,
        prompt="Q: {question/stem}\nA:",
        choices="options",
        answer="key",
        answers=("A", "B"),
    )
    expected = {"prompt": "Q: {one}\nA:", "choices": [" x", " y"], "answer": 1}
    assert task.splits["train"] == [expected]
    assert (task.name, task.form, task.head) == ("rows", "choice", "causal_lm")
    csv = tmp_path / "rows.csv"
    csv.write_text("q,one,two,label\nw1,w2,w3,2\n")
    given = dict(train=csv, validation=csv, answer="label", lead="")
    task = data.tasks.choices(
        **given, prompt="{q}", choices=("one", "two"), answers=("1", "2")
    )
    expected = {"prompt": "w1", "choices": ["w2", "w3"], "answer": 1}
    assert task.splits["validation"] == [expected]
    options = dict(prompt="{q}", choices=("one", "two"), answers=(1, 2))
    assert data.tasks.choices(**given, **options).splits == task.splits
    csv.write_text("q,one,two,label\nw1,w2,w3,AB\n")
    with pytest.raises(ValueError, match=r"one of `answers` \('A', 'B'\); got 'AB'"):
        data.tasks.choices(**given, **(options | {"answers": "AB"}))
    csv.write_text("q,one,two,label\nw1,w2,w3,2\n")
    for options, message in [
        ({"choices": "one"}, "'one' must be a list of texts; got 'w2'. Of columns"),
        ({"answers": ("A", "B")}, r"one of `answers` \('A', 'B'\); got '2'"),
        ({"prompt": "q"}, "`prompt` 'q' must have columns in braces"),
        ({"prompt": "{q:9}"}, "no more than their names"),
        ({"prompt": "{q"}, "is no template: expected '}'"),
        ({"prompt": "{w}"}, "row 0 has no column 'w'"),
        ({"prompt": "{q/stem}"}, "column 'q' has no parts, as 'q/stem' asks"),
    ]:
        usual = dict(prompt="{q}", choices=("one", "two"), answers=("1", "2"))
        with pytest.raises(ValueError, match=message):
            data.tasks.choices(**given, **{**usual, **options})


def test_tfds_without_tensorflow():
    """Rows of TFDS's own kind, made up by its own mock."""
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=5):
        task = data.task(
            "tfds_choices/piqa",
            splits={"train": "train", "validation": "validation"},
            prompt="{goal}\nAnswer:",
            choices=("sol1", "sol2"),
            answer="label",
        )
    assert [len(rows) for rows in task.splits.values()] == [5, 5]
    row = task.splits["train"][0]
    assert row["prompt"].endswith("\nAnswer:") and len(row["choices"]) == 2
    assert int(row["answer"]) in (0, 1)


# Sizes, and the beginning of the sha256 of all rows as JSON: if one of these moves,
# every score reported on the task so far is of another task.
PINNED = {
    "openbookqa": ([398, 55, 43], "1def988bf70ebfca", 4),
    "socialiqa": ([1539, 193, 188], "08d16fbbad3f507f", 3),
    "boolq": ([10172, 1276, 1247], "752b0c44f8a93b58", 2),
}


@pytest.mark.parametrize("name", PINNED)
def test_packaged_tasks_are_what_they_have_always_been(name):
    task = data.task(name, progress=False)
    sizes, digest, count = PINNED[name]
    assert [len(rows) for rows in task.splits.values()] == sizes
    found = hashlib.sha256(json.dumps(task.splits).encode()).hexdigest()
    assert found[:16] == digest
    for rows in task.splits.values():
        for row in rows:
            choices = row["choices"]
            assert len(choices) == len({c.strip() for c in choices}) == count
            assert all(c[0] == " " and c[1:].strip() == c[1:] for c in choices)
            assert 0 <= row["answer"] < count
            assert row["prompt"].endswith("\nAnswer:")
    assert task.facts["kept"] == sum(sizes)


def test_known_questions_have_their_answers():
    rows = {
        row["prompt"].split("\n")[-2]: row["choices"][row["answer"]]
        for name in PINNED
        for rows in data.task(name, progress=False).splits.values()
        for row in rows
    }
    assert rows["There is most likely going to be fog around:"] == " a marsh"
    assert rows["Question: did the iphone 6 come out before the iphone se?"] == " yes"
    tracy = "Tracy didn't go home that evening and resisted Riley's attacks. "
    key = tracy + "What does Tracy need to do before this?"
    assert rows[key] == " Find somewhere to go"
