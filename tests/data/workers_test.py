"""Tokenising in processes: the same bits, the same errors, and one for a death."""

import signal

import numpy as np
import pytest
from data_toolbox import make_rows, make_tokenizer, toy_task

from jaxpeft import data
from jaxpeft.data import _tokenize, _workers

LIMITS = dict(vocab_size=104, max_length=16)


@pytest.fixture(scope="module")
def writer():
    """One that opens texts and ends none: for rows with labels and for writing."""
    import tokenizers

    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    opens = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    tokenizer.backend_tokenizer.post_processor = opens
    return tokenizer


@pytest.fixture(scope="module")
def pool(writer):
    """Two processes for all tests: they take seconds to begin."""
    with _workers.Workers(writer, 2) as workers:
        assert workers._begun(1, toy_task(make_rows(3)))
        yield workers._pool


@pytest.fixture
def tokenize(writer, pool, monkeypatch):
    """Tokenises in this process and in two, chunks of 50 rows."""
    monkeypatch.setattr(_tokenize, "_CHUNK", 50)
    monkeypatch.setattr(_workers, "_started", lambda count, sent: pool)
    monkeypatch.setattr(pool, "shutdown", lambda **_: None)
    calls, submit = [], pool.submit
    monkeypatch.setattr(pool, "submit", lambda *a: calls.append(a) or submit(*a))

    def tokenize(task, workers):
        calls.clear()
        found = data.tokenize(task, writer, workers=workers, **LIMITS)
        assert bool(calls) == bool(workers)
        return found

    return tokenize


def assert_same(left, right):
    assert left.keys() == right.keys()
    for split, one in left.items():
        np.testing.assert_equal(one._asdict(), right[split]._asdict(), err_msg=split)
        for name, value in one._asdict().items():
            kind = getattr(value, "dtype", None)
            assert kind == getattr(getattr(right[split], name), "dtype", None), name


def rows_with(count, **bad):
    rows = make_rows(count)
    for number, row in bad.items():
        rows[int(number[1:])] = row
    return rows


class Unread:
    """Rows that are made as they are read, one of which cannot be."""

    def __len__(self):
        return 120

    def __getitem__(self, index):
        if index == 70:
            raise ValueError("row 70 cannot be made")
        return {"text": f"w{index % 50}", "label": 0}


def test_it_is_the_same_to_the_bit(tokenize):
    rows = rows_with(170, _3={"text": "w1", "label": 8}, _60={"text": "w1", "label": 9})
    short = [{"text": "w1", "label": 8}] * 60 + make_rows(20)  # a chunk without a row
    made = dict(text="text", label="label", labels=["a", "b", "c"], bad_rows="skip")
    labelled = data.make_task("a", {"train": rows, "validation": short}, **made)
    alone = tokenize(labelled, 0)
    assert alone["train"].facts["bad_rows"] == 2 and alone["train"].rows == 168
    assert alone["validation"].facts["bad_rows"] == 60
    assert_same(tokenize(labelled, 2), alone)
    unread = {"train": Unread(), "validation": rows[:2]}
    task = data.make_task("b", unread, **made)
    assert_same(tokenize(task, 2), tokenize(task, 0))
    asked = [
        {"q": row["text"], "c": [" w1", " w2 w3"], "a": i % 2}
        for i, row in enumerate(make_rows(130, longest=12))
    ]
    splits = {"train": asked, "validation": asked[:70]}
    choice = data.make_text_task("c", splits, prompt="q", choices="c", answer="a")
    texts = {"train": make_rows(120), "validation": make_rows(9)}
    written = data.make_text_task("d", texts, text="text")  # longer ones go on
    for task in (choice, written):
        alone = tokenize(task, 0)
        assert_same(tokenize(task, 2), alone)
    assert alone["train"].facts["continued"] > 50
    mixed = data.mix({"c": choice, "e": choice._replace(name="e")})
    assert_same(tokenize(mixed, 2), tokenize(mixed, 0))


def test_the_error_is_that_of_the_first_bad_row(tokenize):
    bad = {"text": "w1", "label": 8}
    task = toy_task(rows_with(160, _155=bad, _70=bad))
    said = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match="split 'train', row 70.*bad_rows='skip'"):
            try:
                tokenize(task, workers)
            except ValueError as error:
                said.append(str(error))
                raise
    assert said[0] == said[1]


class Deadly:
    """Whoever reads it from a pipe is no more."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_process_that_dies_is_one_error(writer):
    rows = make_rows(5)
    rows[2] = {"text": "w1", "label": 0, "other": Deadly()}
    with pytest.raises(RuntimeError, match="tokenised toy/train has died.*workers=0"):
        data.tokenize(toy_task(rows), writer, workers=1, **LIMITS)


def test_what_cannot_be_sent_is_done_here_unless_workers_are_asked_for(
    writer, monkeypatch
):
    monkeypatch.setattr(_workers, "ROWS_OF_A_WORKER", 1)
    monkeypatch.setattr(writer, "note", lambda: None, raising=False)
    task = toy_task(make_rows(5))
    assert data.tokenize(task, writer, workers=None, **LIMITS)["train"].rows == 5
    with pytest.raises(ValueError, match="`workers` 2: tokenizer or task cannot be se"):
        data.tokenize(task, writer, workers=2, **LIMITS)
    with pytest.raises(ValueError, match="`workers` must be 0 or more, or None; got -"):
        data.tokenize(task, writer, workers=-1, **LIMITS)


def test_as_many_as_pay(monkeypatch):
    cores = set(range(16))
    monkeypatch.setattr(_workers.os, "sched_getaffinity", lambda _: cores)
    found = [_workers.workers_for(n, None) for n in (39_999, 40_000, 10**7)]
    assert found == [0, 2, 8] and _workers.workers_for(5, 3) == 3
    cores -= set(range(1, 16))
    assert _workers.workers_for(10**7, None) == 0
