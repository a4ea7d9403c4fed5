"""Some rows of a split, as they were."""

import numpy as np
import pytest

from jaxpeft import data
from jaxpeft.data._encoded import Mixed


def split(rows=40):
    sizes = np.random.default_rng(0).integers(1, 6, rows)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = np.repeat(np.arange(rows, dtype=np.int32), sizes)  # a row's own number
    labels = np.arange(rows, dtype=np.int32)
    task_ids = np.repeat(np.arange(2, dtype=np.int32), rows // 2)
    mixed = Mixed(("a", "b"), task_ids, (100, 1), None)
    return data.Encoded("t/train", ids, ids, offsets, labels, 0, 8, mixed=mixed)


def test_rows_stay_whole():
    whole = split()
    some = data.sample(whole, 15, seed=3)
    assert some.rows == len(set(some.labels.tolist())) == 15
    assert np.all(np.diff(some.labels) > 0)
    np.testing.assert_array_equal(some.lengths, whole.lengths[some.labels])
    for column in (some.ids, some.types):
        np.testing.assert_array_equal(column, np.repeat(some.labels, some.lengths))
    np.testing.assert_array_equal(some.mixed.task_ids, some.labels >= 20)
    assert sum(some.mixed.quotas) == 15 and min(some.mixed.quotas) > 1
    again = data.sample(whole, 15, seed=3)
    np.testing.assert_array_equal(again.labels, some.labels)
    other = data.sample(whole, 15, seed=4)
    assert not np.array_equal(other.labels, some.labels)
    assert data.sample(whole, 40) is whole
    batches = data.evaluation_batches(some, 4, lengths=[8])
    seen = [i for b in batches for i in b["input_ids"][b["valid"], 0].tolist()]
    assert sorted(seen) == some.labels.tolist()
    with pytest.raises(ValueError, match="`rows` must be at least 1, got 0"):
        data.sample(whole, 0)
