"""Several tasks as one: shares, streams, one head, scores by task."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpeft import data, training

SIZES = {"small": 30, "middle": 70, "large": 200}


def toy(name, rows, labels=("no", "yes"), **options):
    rows = [{"text": f"{name} {i}", "label": i % len(labels)} for i in range(rows)]
    splits = {"train": rows, "validation": rows[:7]}
    return data.make_task(
        name, splits, text="text", label="label", labels=labels, **options
    )


def sums(name, rows, **options):
    rows = [{"q": f"{i} + 1 =", "a": f" {i + 1}"} for i in range(rows)]
    splits = {"train": rows, "validation": rows[:7]}
    return data.make_text_task(name, splits, prompt="q", completion="a", **options)


class Words:
    """As much of a tokenizer as a row of text needs; a word is its own token."""

    pad_token_id, eos_token_id, eos_token, model_max_length = 0, 1, "<end>", 64
    bos_token_id = bos_token = None
    model_input_names = ("input_ids",)

    def __init__(self):
        self.ids = {"<pad>": 0, "<end>": 1} | {str(i): i + 2 for i in range(300)}
        self.ids |= {w: 310 + i for i, w in enumerate([*SIZES, "+", "="])}

    def get_vocab(self):
        return self.ids

    def num_special_tokens_to_add(self, pair=False):
        return 0

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        return {"input_ids": [[self.ids[w] for w in t.split()] for t in texts]}


def encoded(mixed):
    options = dict(vocab_size=400, max_length=16, progress=False)
    return data.tokenize(mixed, Words(), **options)


@pytest.fixture(scope="module")
def three():
    labels = {"small": ("no", "yes"), "middle": ("a", "b", "c"), "large": ("x", "y")}
    return {name: toy(name, n, labels[name]) for name, n in SIZES.items()}


def test_shares_are_those_of_the_formula():
    rows = [100, 400, 1600]
    assert np.allclose(data.mixture_shares(rows), np.array([1, 4, 16]) / 21)
    square = data.mixture_shares(rows, temperature=2.0)
    assert np.allclose(square, np.array([1, 2, 4]) / 7)
    equal = data.mixture_shares(rows, temperature=math.inf)
    assert np.allclose(equal, np.ones(3) / 3)
    assert np.allclose(data.mixture_shares(rows, cap=500), [0.1, 0.4, 0.5])
    assert np.isfinite(data.mixture_shares([1, 10**9], temperature=1e-3)).all()


def stream(split, batches, seed=0, start=0):
    drawn = data.batches(split, 10, seed=seed, lengths=(16,))
    return [drawn[i] for i in range(start, start + batches)]


@pytest.mark.parametrize("temperature, cap", [(1.0, None), (math.inf, None), (1.0, 50)])
def test_an_epoch_has_the_shares_and_no_row_twice_too_early(three, temperature, cap):
    split = encoded(data.mix(three, temperature=temperature, cap=cap))["train"]
    shares = data.mixture_shares([*SIZES.values()], temperature=temperature, cap=cap)
    each = data.batches_per_epoch(split, 10)
    assert each * 10 == split.epoch_rows  # so that no row of an epoch is left over
    epochs = 4
    seen = stream(split, epochs * each)
    tasks = np.concatenate([b["task_id"] for b in seen])
    found = np.bincount(tasks) / len(tasks)
    assert np.abs(found - shares).max() < 1 / split.epoch_rows
    texts = np.concatenate([b["input_ids"][:, 1] for b in seen])
    for task, (name, rows) in enumerate(SIZES.items()):
        drawn = texts[tasks == task]
        times = np.bincount(drawn, minlength=rows + 2)[2 : rows + 2]
        assert times.max() - times.min() <= 1, name  # over any number of epochs
        assert times.sum() == len(drawn)


def test_the_stream_is_the_seeds_and_goes_on_where_it_stood(three):
    split = encoded(data.mix(three, temperature=2.0))["train"]
    one, same = stream(split, 40), stream(split, 40)
    other = stream(split, 40, seed=1)
    for a, b in zip(one, same, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(one[0]["input_ids"], other[0]["input_ids"])
    first, second = (one[i]["input_ids"] for i in (0, 30))
    assert not np.array_equal(first, second)
    iterator = iter(data.batches(split, 10, seed=0, lengths=(16,)))
    for _ in range(33):  # into the second epoch
        next(iterator)
    again = iter(data.batches(split, 10, seed=0, lengths=(16,)))
    again.set_state(iterator.get_state())
    assert np.array_equal(next(again)["input_ids"], one[33]["input_ids"])


def test_each_task_has_its_own_columns_of_one_head(three):
    mixed = data.mix(three)
    assert mixed.num_labels == 7 and mixed.head == "classification"
    splits = encoded(mixed)
    names, starts = list(SIZES), np.array([0, 2, 5])
    widths = np.array([2, 3, 2])
    for batch in stream(splits["train"], 6):
        tasks = batch["task_id"]
        words = [Words().ids[names[t]] for t in tasks]
        assert np.array_equal(batch["input_ids"][:, 0], words)
        numbers = batch["input_ids"][:, 1] - 2
        assert np.array_equal(batch["label"], starts[tasks] + numbers % widths[tasks])
        column = np.arange(7)[None]
        low = starts[tasks][:, None]
        mask = (low <= column) & (column < low + widths[tasks][:, None])
        assert np.array_equal(batch["label_mask"], mask)
    middle = splits["validation/middle"]
    assert middle.labels.tolist() == [2, 3, 4, 2, 3, 4, 2]
    (batch,) = data.evaluation_batches(middle, 8, lengths=(16,))
    assert batch["label_mask"].tolist() == [[False] * 2 + [True] * 3 + [False] * 2] * 8


def test_scores_are_of_each_task_and_their_mean(three):
    mixed = data.mix(three)
    splits = encoded(mixed)
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(7, 7))
    outputs[:, 0] += 100  # a class of another task is never the answer
    found = {}
    for name, (split, score) in data.held_out(mixed, splits, "validation").items():
        found[name] = score(outputs, split.labels) | {"loss": 1.0}
    column = outputs[:, 2:5].argmax(1)
    assert found["middle"]["accuracy"] == np.mean(column == np.arange(7) % 3)
    scores = data.gather_scores(mixed, found)
    each = [scores[f"{name}/accuracy"] for name in SIZES]
    assert scores["mean"] == pytest.approx(np.mean(each))
    assert mixed.best == {"metric": "mean", "mode": "max"}
    with pytest.raises(ValueError, match="'test' is not in task 'small"):
        data.held_out(mixed, splits, "test")


def test_some_tasks_may_be_there_for_evaluation_alone(three):
    mixed = data.mix(three, only=("large", "small"))
    splits = encoded(mixed)
    assert splits["train"].epoch_rows == 230 and mixed.num_labels == 7
    seen = stream(splits["train"], 23)
    assert set(np.concatenate([b["task_id"] for b in seen])) == {0, 2}
    values = {"small": 0.0, "middle": 5.0, "large": 2.0}
    found = {name: {"accuracy": v, "loss": v} for name, v in values.items()}
    scores = data.gather_scores(mixed, found)
    assert scores["mean"] == scores["loss"] == 1 and scores["middle/accuracy"] == 5
    with pytest.raises(ValueError, match="`only` has 'midle'. Did you mean 'middle'"):
        data.mix(three, only=["midle"])


def test_the_loss_asks_a_row_about_its_own_classes_alone():
    import jax

    logits = np.array([[1.0, 2.0, 3.0], [0.5, 9.0, 9.0]], np.float32)
    mask = np.array([[False, True, True], [True, False, False]])
    batch = {"label": np.array([1, 0]), "weight": np.ones(2), "label_mask": mask}
    batch = jax.tree.map(jax.numpy.asarray, batch)
    loss = lambda x: training.cross_entropy(x, batch)[0].sum()
    values, gradient = jax.value_and_grad(loss)(jax.numpy.asarray(logits))
    assert float(values) == pytest.approx(math.log(1 + math.e), rel=1e-6)
    assert np.all(np.asarray(gradient)[~mask] == 0)
    share = math.e / (1 + math.e)  # of the wrong one
    assert np.allclose(gradient[0, 1:], [-share, share], rtol=1e-5)


def test_writing_tasks_mix_too_packed_and_not():
    parts = {"small": sums("a", 30, pack=True), "large": sums("b", 200, pack=True)}
    mixed = data.mix(parts)
    assert mixed.num_labels is None and mixed.best["mode"] == "min"
    splits = encoded(mixed)
    batch = stream(splits["train"], 1)[0]
    assert "label_mask" not in batch and set(batch["task_id"]) <= {0, 1}
    assert batch["segment_ids"].max() > 1
    assert splits["train"].facts["large"]["sequences"] > 0
    assert {*splits} == {"train", "validation/small", "validation/large"}
    # One packed and one not: the other's sequences are a text each.
    batch = next(
        batch
        for batch in stream(
            encoded(data.mix(parts | {"large": sums("b", 200)}))["train"], 2
        )
        if set(batch["task_id"]) == {0, 1}
    )
    alone, mask = batch["task_id"] == 1, batch["attention_mask"]
    assert batch["segment_ids"][~alone].max() > 1
    assert np.array_equal(batch["segment_ids"][alone], mask[alone])
    steps = np.arange(mask.shape[1]) * mask[alone]
    assert np.array_equal(batch["positions"][alone], steps)


def test_a_config_names_its_tasks():
    config = ConfigDict(dict(name="mixture", tasks=("trec", "sms"), temperature=2.0))
    task = data.task(config, progress=False)
    assert list(task.parts) == ["trec", "sms"] and task.num_labels == 8
    assert list(task.splits) == ["train", "validation", "test"]
    mixed = dict(name="mixture", tasks=("sms", "opinions/nyt"), progress=False)
    assert list(data.task(mixed).parts) == ["sms", "nyt"]
    named = data.task(mixed | dict(tasks=dict(b="sms", a="opinions/tweets")))
    assert list(named.parts) == ["a", "b"] and named.classes("b") == slice(2, 4)
    with pytest.raises(ValueError, match="two or more names that differ"):
        data.task(dict(name="mixture", tasks=("sms", "sms")))
    with pytest.raises(ValueError, match="'treck' is no task. Did you mean 'trec'"):
        data.task(dict(name="mixture", tasks=("treck", "sms")))
    with pytest.raises(ValueError, match="'sms' has no option 'seed'"):
        data.task(dict(name="mixture", tasks=("sms", "trec"), seed=1))


def test_what_does_not_go_together_is_refused(three):
    one, *_ = three.values()
    number = one._replace(labels=None, metrics=("pearson",))
    with pytest.raises(ValueError, match="two or more; got \\['one'\\]"):
        data.mix({"one": one})
    with pytest.raises(ValueError, match="'b' is a number to regress on"):
        data.mix({"a": one, "b": number})
    with pytest.raises(ValueError, match="'a' \\(classification.*cannot be mixed"):
        data.mix({"a": one, "b": sums("b", 9)})
    with pytest.raises(ValueError, match="cannot be mixed"):
        exact = sums("c", 9, metrics="exact_match")
        data.mix({"a": sums("b", 9), "b": exact})
    with pytest.raises(ValueError, match="names without '/'"):
        data.mix({"a/b": one, "c": one})
    with pytest.raises(ValueError, match="`temperature` must be above 0; got 0"):
        data.mix(three, temperature=0.0)
    with pytest.raises(ValueError, match="`cap` must be at least 1 row"):
        data.mix(three, cap=0)
    with pytest.raises(ValueError, match="leave task 'small' with no row"):
        encoded(data.mix(three, temperature=0.1))
