"""Batches: few shapes, every row once, the same bytes after a restart."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest

from jaxpeft import data

LENGTHS = (16, 32, 64)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


def texts(batch, valid=None):
    """The rows of a batch without their padding, as tuples that can be counted."""
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["label"], strict=True)
    found = [(*ids[mask > 0], "label", label) for ids, mask, label in rows]
    return found if valid is None else list(itertools.compress(found, valid))


def all_rows(encoded):
    return [
        (*encoded.ids[a:b], "label", label)
        for (a, b), label in zip(
            itertools.pairwise(encoded.offsets), encoded.labels, strict=True
        )
    ]


def test_a_batch_is_padded_on_the_right(encoded):
    dataset = data.batches(encoded, 8, seed=0, lengths=LENGTHS)
    assert isinstance(dataset, grain.MapDataset)
    seen = set()
    for batch in take(iter(dataset), 50):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        shapes = {name: (v.shape, v.dtype.name) for name, v in batch.items()}
        seen.add(ids.shape[1])
        assert shapes == {
            "input_ids": (ids.shape, "int32"),
            "attention_mask": (ids.shape, "int32"),
            "token_type_ids": (ids.shape, "int32"),
            "label": ((8,), "int32"),
        }
        assert np.all(np.diff(mask) <= 0)  # ones, then zeros
        assert np.all((ids == encoded.pad) == (mask == 0))
        assert np.all(ids[:, 0] == 1)  # [CLS]
        assert set(texts(batch)) <= set(all_rows(encoded))
    assert seen == set(LENGTHS)


def test_short_rows_are_not_padded_to_the_longest(encoded):
    plan = take(iter(data.batches(encoded, 8, seed=0, lengths=LENGTHS)), 25)
    used = sum(batch["attention_mask"].sum() for batch in plan)
    bucketed = sum(batch["attention_mask"].size for batch in plan)
    longest = 25 * 8 * 64
    assert used / bucketed > 0.6 > used / longest


def test_an_epoch_has_each_row_at_most_once_and_epochs_differ(encoded):
    each = data.batches_per_epoch(encoded, 8)
    assert each == 203 // 8 == 25
    batches = take(iter(data.batches(encoded, 8, seed=0, epochs=40)), 41 * each)
    assert len(batches) == 40 * each
    left_out = []
    for epoch in range(40):
        part = batches[epoch * each : (epoch + 1) * each]
        rows = [row for batch in part for row in texts(batch)]
        assert len(set(rows)) == len(rows) == 200
        left_out.append(frozenset(set(all_rows(encoded)) - set(rows)))
    # The three rows without a place are others every time.
    assert len(set(left_out)) == 40
    firsts = [tuple(texts(batches[epoch * each])) for epoch in range(40)]
    assert len(set(firsts)) == 40


def test_short_batches_do_not_come_first(encoded):
    dataset = data.batches(encoded, 8, seed=0, lengths=LENGTHS)
    shapes = [batch["input_ids"].shape[1] for batch in take(iter(dataset), 25)]
    assert shapes != sorted(shapes)


def test_the_seed_decides_and_nothing_else(encoded):
    runs = [take(iter(data.batches(encoded, 8, seed=seed)), 60) for seed in (0, 0, 1)]
    for left, right in zip(runs[0], runs[1], strict=True):
        assert_same(left, right)
    assert texts(runs[0][0]) != texts(runs[2][0])
    random_access = data.batches(encoded, 8, seed=0)
    for i in (59, 3, 30, 0):  # across epochs, in any order
        assert_same(random_access[i], runs[0][i])


@pytest.mark.parametrize("stop", [0, 1, 13, 25, 37])
def test_a_restored_iterator_reads_the_same_bytes(encoded, stop):
    iterator = iter(data.batches(encoded, 8, seed=3, lengths=LENGTHS))
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 40)  # mid-epoch into the next one, all buckets

    restored = iter(data.batches(encoded, 8, seed=3, lengths=LENGTHS))
    restored.set_state(state)
    for left, right in zip(take(restored, 40), expected, strict=True):
        assert_same(left, right)
    # Control: an iterator without the state reads something else.
    if stop:
        fresh = iter(data.batches(encoded, 8, seed=3, lengths=LENGTHS))
        assert texts(next(fresh)) != texts(expected[0])


def test_transformed_and_prefetched_it_still_resumes(encoded):
    def make():
        dataset = data.batches(encoded, 8, seed=3).map(lambda b: b["input_ids"])
        return iter(dataset.to_iter_dataset(grain.ReadOptions(4, 8)))

    iterator = make()
    take(iterator, 30)
    state = iterator.get_state()
    restored = make()
    restored.set_state(state)
    for left, right in zip(take(restored, 5), take(iterator, 5), strict=True):
        np.testing.assert_array_equal(left, right)


TRAVEL = """
import pickle, sys, cloudpickle, numpy as np
from jaxpeft import data
heavy = {"grain", "tensorflow_datasets", "transformers", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
ids = np.arange(40, dtype=np.int32)
offsets = np.arange(0, 41, 4)
encoded = data.Encoded("toy/train", ids, None, offsets, ids[:10], 0, 8)
dataset = data.batches(encoded, 4, seed=0)
there = pickle.loads(cloudpickle.dumps(dataset))
assert (there[5]["input_ids"] == dataset[5]["input_ids"]).all()
print("arrived")
"""


def test_it_is_light_to_import_and_travels_to_another_process():
    """As Grain's worker processes need it: cloudpickled.

    In a process of its own, since the checks of shapes that tests run under put
    functions into closures that cannot travel.
    """
    found = subprocess.run(
        [sys.executable, "-c", TRAVEL],
        cwd=Path(data.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert found.stdout == "arrived\n", found.stderr


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_each_batch(encoded, count):
    whole = data.batches(encoded, 8, seed=0, lengths=LENGTHS)
    shards = [
        data.batches(
            encoded, 8, seed=0, lengths=LENGTHS, process_index=i, process_count=count
        )
        for i in range(count)
    ]
    for i in (0, 7, 24, 25, 60):
        parts = [shard[i] for shard in shards]
        assert len({part["input_ids"].shape for part in parts}) == 1
        rows = [texts(part) for part in parts]
        assert len(set(sum(rows, []))) == 8  # disjoint
        assert_same(
            {name: np.concatenate([p[name] for p in parts]) for name in parts[0]},
            whole[i],
        )


@pytest.mark.parametrize("batch_size", [1, 8, 29, 203, 400])
@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_reads_every_row_once(encoded, batch_size, count):
    batch_size *= count
    shards = [
        data.evaluation_batches(
            encoded, batch_size, lengths=LENGTHS, process_index=i, process_count=count
        )
        for i in range(count)
    ]
    found = []
    for parts in zip(*shards, strict=True):
        assert len({part["input_ids"].shape for part in parts}) == 1
        for batch in parts:
            assert len(batch["label"]) == batch_size // count
            assert batch["valid"].dtype == bool
            assert batch["attention_mask"].any(1).all()  # padding rows too
            found += texts(batch, batch["valid"])
    # Once each, and the sizes tell that no row stands in for another.
    assert sorted(map(str, found)) == sorted(map(str, all_rows(encoded)))
    assert len(shards[0]) == -(-203 // batch_size)
    assert all(batch["valid"].all() for batch in list(shards[0])[:-1])


def test_padding_rows_would_change_the_metric(encoded):
    """The control of the mask: without it, the score is another."""
    dataset = data.evaluation_batches(encoded, 40)
    labels = np.concatenate([batch["label"] for batch in dataset])
    valid = np.concatenate([batch["valid"] for batch in dataset])
    assert len(labels) == 240
    guess = np.zeros(240, np.int32)
    real = data.metrics.accuracy(guess[valid], labels[valid])
    assert real == data.metrics.accuracy(np.zeros(203, np.int32), encoded.labels)
    assert real != data.metrics.accuracy(guess, labels)


def test_default_lengths_double_up_to_the_longest(encoded):
    assert data.bucket_lengths(512) == (32, 64, 128, 256, 512)
    shapes = {b["input_ids"].shape[1] for b in data.evaluation_batches(encoded, 8)}
    assert shapes == {32, 64}


def test_impossible_batches_are_refused(encoded):
    with pytest.raises(ValueError, match="`batch_size` 204 .* 203 rows of toy/train"):
        data.batches(encoded, 204, seed=0)
    with pytest.raises(ValueError, match="`batch_size` 0"):
        data.batches(encoded, 0, seed=0)
    with pytest.raises(ValueError, match="9 is not divisible among 2 .* that is: 8"):
        data.batches(encoded, 9, seed=0, process_index=0, process_count=2)
    with pytest.raises(ValueError, match="`process_index` .* 0 and 1; got 2"):
        data.evaluation_batches(encoded, 8, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="ends at 32, .* row of 52 tokens"):
        data.batches(encoded, 8, seed=0, lengths=(16, 32))
    with pytest.raises(ValueError, match=r"`lengths` must be rising .* \(64, 32\)"):
        data.batches(encoded, 8, seed=0, lengths=(64, 32))
    with pytest.raises(ValueError, match="`seed` must be a whole number"):
        data.batches(encoded, 8, seed=-1)
    with pytest.raises(ValueError, match="`epochs` must be at least 1"):
        data.batches(encoded, 8, seed=0, epochs=0)


def test_the_order_of_a_seed_is_the_same_for_ever():
    """A run that is resumed after an update of the library reads the same rows."""
    ids, offsets = np.arange(30, dtype=np.int32), np.arange(31, dtype=np.int64)
    labels = np.zeros(30, np.int32)
    encoded = data.Encoded("toy/train", ids, None, offsets, labels, 0, 4)
    batches = data.batches(encoded, 10, seed=3, lengths=(4,))
    first = [24, 2, 7, 10, 21, 28, 25, 22, 9, 23]
    assert batches[0]["input_ids"][:, 0].tolist() == first
    second_epoch = [9, 27, 7, 8, 3, 19, 5, 21, 26, 6]
    assert batches[4]["input_ids"][:, 0].tolist() == second_epoch
