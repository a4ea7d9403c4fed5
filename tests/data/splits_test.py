"""Splits by the hash of the text: no text twice, no order, no leak."""

import random

import pytest

from jaxpeft import data


def rows_of(count):
    return [{"text": f"row {i}", "label": i % 2} for i in range(count)]


def test_a_key_looks_past_case_spaces_and_punctuation():
    same = ["It's  good!", "it's good", "IT S GOOD", "“It's” (good)", "Ｉｔ's good"]
    assert len({data.text_key([text]) for text in same}) == 1
    other = ["its good", "it is good", ":)", ":(", "", "x"]
    assert len({data.text_key([text]) for text in [same[0], *other]}) == 7
    assert data.text_key(["a b", "c"]) != data.text_key(["a", "b c"])


def test_duplicates_go_and_the_order_does_not_matter():
    rows = [*rows_of(300), *rows_of(200), {"text": "Row 7!", "label": 1}]
    kept, counts = data.deduplicate(rows, text=["text"], label="label")
    assert counts == {"read": 501, "repeated": 201, "contradictory": 0, "kept": 300}
    # The one whose text sorts first stays.
    assert {row["text"] for row in kept} == {
        "Row 7!",
        *(f"row {i}" for i in range(300) if i != 7),
    }
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert data.deduplicate(shuffled, text=["text"], label="label")[0] == kept
    assert kept != sorted(kept, key=lambda row: row["text"])


def test_contradictory_classes_go_and_numbers_are_averaged():
    rows = [*rows_of(10), {"text": "ROW 3", "label": 0}, {"text": "row 3", "label": 1}]
    kept, counts = data.deduplicate(rows, text=["text"], label="label")
    assert counts == {"read": 12, "repeated": 2, "contradictory": 1, "kept": 9}
    assert not any(row["text"].lower() == "row 3" for row in kept)

    for turned in (rows, rows[::-1]):
        kept, counts = data.deduplicate(
            turned, text=["text"], label="label", regression=True
        )
        assert counts == {"read": 12, "repeated": 2, "contradictory": 1, "kept": 10}
        # Each distinct value counts once: a copy is no second vote.
        assert {"text": "ROW 3", "label": 0.5} in kept


def test_splits_are_disjoint_cover_all_and_ignore_the_order():
    rows = [*rows_of(2000), *({"text": f"ROW {i}", "label": 0} for i in range(500))]
    splits = data.split_rows(rows, text=["text"])
    keys = {
        split: {data.text_key([row["text"]]) for row in part}
        for split, part in splits.items()
    }
    assert sum(map(len, splits.values())) == 2500
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 2000
    shares = {split: len(part) / 2500 for split, part in splits.items()}
    assert shares == pytest.approx(
        {"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03
    )
    turned = data.split_rows(rows[::-1], text=["text"])
    assert {split: part[::-1] for split, part in turned.items()} == splits
    # A row that comes later moves none of the others.
    more = data.split_rows([*rows, {"text": "new", "label": 0}], text=["text"])
    for split, part in splits.items():
        assert more[split][: len(part)] == part


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="`shares` must be positive and sum to 1"):
        data.split_rows(rows_of(3), text=["text"], shares={"train": 0.8, "test": 0.1})
    with pytest.raises(ValueError, match="`shares` must be positive"):
        data.split_rows(rows_of(3), text=["text"], shares={"train": 1.5, "test": -0.5})
