"""Tokens of every row, and every row checked before any training."""

import itertools

import numpy as np
import pytest
from data_toolbox import make_rows, make_tokenizer, toy_task

from jaxpeft import data


def rows_of(encoded, column="ids"):
    values = getattr(encoded, column)
    return [values[a:b].tolist() for a, b in itertools.pairwise(encoded.offsets)]


def test_rows_equal_the_tokenizer_called_on_each(tokenizer):
    rows = make_rows(2500, longest=80)  # several chunks, some rows cut
    encoded = data.tokenize(toy_task(rows), tokenizer, vocab_size=104, max_length=40)
    train = encoded["train"]
    assert list(encoded) == ["train", "validation"]
    assert train.rows == 2500
    assert rows_of(train) == [
        tokenizer(row["text"], truncation=True, max_length=40)["input_ids"]
        for row in rows
    ]
    assert train.lengths.max() == 40  # some were cut
    np.testing.assert_array_equal(train.labels, np.arange(2500) % 3)
    assert {name: getattr(train, name).dtype.name for name in ("ids", "labels")} == {
        "ids": "int32",
        "labels": "int32",
    }


def test_pairs_have_types_and_the_longer_text_is_cut(tokenizer):
    rows = [
        {"a": "w1 w2", "b": b"w3", "label": 0},
        {"a": "w1 " * 50, "b": "w2 w3", "label": 1},
    ]
    task = toy_task(rows, text=["a", "b"])
    train = data.tokenize(task, tokenizer, vocab_size=104, max_length=10)["train"]
    assert rows_of(train)[0] == [1, 5, 6, 2, 7, 2]
    assert rows_of(train, "types")[0] == [0, 0, 0, 0, 1, 1]
    assert rows_of(train)[1] == [1, 5, 5, 5, 5, 5, 2, 6, 7, 2]
    batch = data.batches(train, 2, seed=0, lengths=(12,))[0]
    order = np.argsort(batch["label"])
    assert batch["token_type_ids"][order[0]].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 6]


def test_a_tokenizer_without_types_gives_none(tokenizer):
    task = toy_task(make_rows(9))
    plain = data.tokenize(
        task, make_tokenizer(types=False), vocab_size=104, max_length=64
    )
    assert plain["train"].types is None
    assert "token_type_ids" not in data.batches(plain["train"], 4, seed=0)[0]
    typed = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
    assert "token_type_ids" in data.batches(typed["train"], 4, seed=0)[0]


def test_str_and_bytes_are_the_same_text(tokenizer):
    rows = make_rows(20)
    in_bytes = [{**row, "text": row["text"].encode()} for row in rows]
    encoded = [
        data.tokenize(toy_task(r), tokenizer, vocab_size=104, max_length=64)["train"]
        for r in (rows, in_bytes)
    ]
    np.testing.assert_array_equal(encoded[0].ids, encoded[1].ids)


def test_regression_labels_are_float32(tokenizer):
    rows = [
        {"text": "w1", "label": label} for label in (1, 0.5, np.float32(2), "-3e-1")
    ]
    task = toy_task(rows, labels=None)
    train = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)["train"]
    assert train.labels.dtype == np.float32
    assert train.labels.tolist() == [1.0, 0.5, 2.0, np.float32(-0.3)]
    assert data.batches(train, 4, seed=0)[0]["label"].dtype == np.float32


@pytest.mark.parametrize(
    ("labels", "values", "ids"),
    [
        (["a", "b", "c"], ["c", b"a", 1, np.array(2), True], [2, 0, 1, 2, 1]),
        # Stars from 1 to 3: the number 1 is the name "1", not the second class.
        (["1", "2", "3"], [1, "3", np.int64(2)], [0, 2, 1]),
    ],
)
def test_labels_are_ids_or_names(tokenizer, labels, values, ids):
    rows = [{"text": "w1", "label": value} for value in values]
    task = toy_task(rows, labels=labels)
    train = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)["train"]
    assert train.labels.tolist() == ids


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "w", "label": 3},
            {},
            "`label` 3 is outside the 3 classes.* 0 to 2",
        ),
        ({"text": "w", "label": -1}, {}, "`label` -1 is outside"),
        ({"text": "w", "label": "aa"}, {}, "'aa' is none of .* mean 'a'"),
        ({"text": "w", "label": "2"}, {}, r"'2' is none .* labels=\['0', '1', '2'\]"),
        ({"text": "w", "label": 1.0}, {}, "1.0 is a float; a class is its integer"),
        ({"text": "w", "label": 4}, {"labels": ["1", "2"]}, "`label` 4 is none of"),
        ({"text": "w", "label": None}, {}, "no value in column 'label'"),
        ({"text": "w"}, {}, "no column 'label'.* There is: text"),
        ({"label": 1}, {}, "no column 'text'"),
        ({"text": None, "label": 1}, {}, "no value in column 'text'"),
        ({"text": 5, "label": 1}, {}, "column 'text' must be text; got int 5"),
        ({"text": b"\xff", "label": 1}, {}, "column 'text' is not UTF-8"),
        ({"text": "a\ud800", "label": 1}, {}, "column 'text' .* lone surrogate"),
        ({"text": "w", "label": np.nan}, {"labels": None}, "must be finite .* nan"),
        ({"text": "w", "label": 1e39}, {"labels": None}, "must be finite .* 1e\\+39"),
        ({"text": "w", "label": "x"}, {"labels": None}, "must be a number .* 'x'"),
        ({"text": "w", "label": True}, {"labels": None}, "must be a number .* True"),
    ],
)
def test_a_bad_row_is_named_with_its_value(tokenizer, row, options, message):
    good = make_rows(7)
    if options.get("labels"):
        good = [{**row, "label": 1} for row in good]
    task = toy_task([*good, row], **options)
    with pytest.raises(ValueError, match=f"split 'train', row 7.*{message}"):
        data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
    # Control: without it, all is well.
    data.tokenize(toy_task(good, **options), tokenizer, vocab_size=104, max_length=64)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    task = toy_task(make_rows(5))
    data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
    with pytest.raises(ValueError, match="'w99' has id 103.* has 103 rows"):
        data.tokenize(task, tokenizer, vocab_size=103, max_length=64)
    with pytest.raises(ValueError, match="no padding token"):
        data.tokenize(task, make_tokenizer(pad=False), vocab_size=104, max_length=64)
    with pytest.raises(ValueError, match="`max_length` 65 must lie between 3 .* 64"):
        data.tokenize(task, tokenizer, vocab_size=104, max_length=65)
    with pytest.raises(ValueError, match="`max_length` 2 must lie between 3"):
        data.tokenize(task, tokenizer, vocab_size=104, max_length=2)
    with pytest.raises(ValueError, match="must be a tokenizer .* got str"):
        data.tokenize(task, "minilm", vocab_size=104, max_length=64)
    with pytest.raises(ValueError, match="'trian', not in task 'toy'.* 'train'"):
        data.tokenize(task, tokenizer, vocab_size=104, max_length=64, splits=["trian"])


def test_only_the_splits_asked_for_are_read(tokenizer):
    bad = [{"text": "w1", "label": 9}]
    task = data.make_task(
        "toy",
        {"train": bad, "validation": make_rows(3)},
        text="text",
        label="label",
        labels=["a", "b", "c"],
    )
    found = data.tokenize(
        task, tokenizer, vocab_size=104, max_length=64, splits=["validation"]
    )
    assert list(found) == ["validation"]


def test_progress_is_shown_for_large_splits_alone(tokenizer, capsys):
    for rows, shown in ((make_rows(5000, longest=3), True), (make_rows(50), False)):
        task = toy_task(rows)
        for progress in (True, False):
            data.tokenize(
                task, tokenizer, vocab_size=104, max_length=64, progress=progress
            )
            written = "".join(capsys.readouterr())
            assert ("Tokenising toy/train" in written) == (shown and progress)


class Counted(tuple):
    """Names of classes that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        Counted.passes += 1
        return super().__iter__()

    def index(self, *given):
        Counted.passes += 1
        return super().index(*given)

    def __contains__(self, name):
        Counted.passes += 1
        return super().__contains__(name)


@pytest.mark.parametrize("kind", [int, str])
def test_labels_cost_a_look_and_no_search(tokenizer, kind):
    names = [f"class {i}" for i in range(1000)]
    passes = {}
    for count in (50, 400):
        numbers = [i * 7 % 1000 for i in range(count)]
        labels = numbers if kind is int else [names[i] for i in numbers]
        rows = [{"text": f"w{i % 9}", "label": y} for i, y in enumerate(labels)]
        task = toy_task(rows, labels=names)._replace(labels=Counted(names))
        Counted.passes = 0
        found = data.tokenize(task, tokenizer, vocab_size=104, max_length=8)["train"]
        assert found.labels.tolist() == numbers
        passes[count] = Counted.passes
    assert passes[50] == passes[400] > 0


def test_of_very_many_names_an_error_shows_some():
    names = [f"class {i}" for i in range(10_000)]
    task = toy_task([{"text": "w1", "label": "class 10"}], labels=names)
    read = data._labels.label_reader(task)
    for label in ("clas 77", 10_000, 1.5, "12"):
        with pytest.raises(ValueError, match="and 9,800 more") as error:
            read({"label": label}, "row 0")
        assert len(str(error.value)) < 6000
    with pytest.raises(ValueError, match="Did you mean 'class 77"):
        read({"label": "clas 77"}, "row 0")
