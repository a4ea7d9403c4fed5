"""Batches on the devices ahead of the step: the same ones, from the same places."""

import json
import time

import grain
import jax
import numpy as np
import pytest

from jaxpeft import training

MESH = training.make_mesh(devices=jax.devices()[:2])
made = []


def batch(index):
    made.append(index)
    return {"x": np.full((4, 3), index, np.float32), "valid": np.arange(4) < 3}


DATA = grain.MapDataset.range(40).map(batch)


def until(ready):
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_they_are_the_same_and_go_on_from_the_same_place(size):
    batches = training.batches_ahead(DATA, MESH, size=size)
    for number in range(5):
        host, device = next(batches)
        assert (host["x"] == number).all() and (device["x"] == number).all()
        assert device["weight"].tolist() == [1, 1, 1, 0] and "valid" in host
        assert device["x"].sharding == training.batch_sharding(MESH)
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    # That of a plain iterator: each may go on where the other stopped.
    plain = iter(DATA)
    plain.set_state(state)
    assert state == {"next_index": 5} and next(plain)["x"][0, 0] == 5
    again = training.batches_ahead(DATA, MESH, size=size)
    next(again)
    again.set_state(state)
    assert [next(again)[0]["x"][0, 0] for _ in range(3)] == [5, 6, 7]
    again.close()


def test_the_next_are_there_before_they_are_asked_for(monkeypatch):
    put, plain = [], training._ahead.put_batch
    counted = lambda *given, **options: put.append(1) or plain(*given, **options)
    monkeypatch.setattr(training._ahead, "put_batch", counted)
    batches = training.batches_ahead(DATA, MESH, size=2)
    next(batches)
    until(lambda: len(put) == 4)  # the one taken, two that wait, one in hand
    time.sleep(0.1)
    assert len(put) == 4  # and no more
    next(batches)
    until(lambda: len(put) == 5)
    batches.close()
    made.clear()
    late = training.batches_ahead(DATA, MESH, size=0)
    put.clear()
    next(late)
    time.sleep(0.1)
    assert len(put) == 1
    late.close()


def test_an_error_of_the_thread_is_raised_where_its_batch_is_asked_for():
    def fails(index):
        if index == 3:
            raise ValueError("row 3 has no text")
        return batch(index)

    batches = training.batches_ahead(grain.MapDataset.range(9).map(fails), MESH, size=2)
    for _ in range(3):
        next(batches)
    with pytest.raises(ValueError, match="row 3 has no text"):
        next(batches)
    batches.close()
    ragged = grain.MapDataset.range(9).map(lambda i: {"x": np.zeros((3, 2))})
    batches = training.batches_ahead(ragged, MESH)
    with pytest.raises(ValueError, match="a batch of 3 rows on this process"):
        next(batches)
    batches.close()
    with pytest.raises(ValueError, match="`size` must be 0 or more; got -1"):
        training.batches_ahead(DATA, MESH, size=-1)
