"""Tasks that reasoning-gym generates: no row of one split in another, and no seed."""

import json
import sys

import ml_collections
import pytest

from jaxpeft import data

SUMS = {"min_terms": 3, "max_terms": 3, "min_digits": 4, "max_digits": 4}


def prompts(task):
    return {s: [row["prompt"] for row in rows] for s, rows in task.splits.items()}


def test_rows_are_the_generators_and_splits_share_none():
    import reasoning_gym

    config = ml_collections.ConfigDict(
        dict(name="reasoning_gym/chain_sum", options=SUMS, train=60, test=20)
    )
    config.validation = 10
    task = data.task(config)
    assert task.name == "reasoning_gym/chain_sum"
    assert (task.form, task.pack, task.best["metric"]) == (
        "completion",
        True,
        "exact_match",
    )
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sizes == {"train": 60, "validation": 10, "test": 20}
    theirs = list(reasoning_gym.create_dataset("chain_sum", seed=0, size=90, **SUMS))
    ours = [*task.splits["test"], *task.splits["validation"], *task.splits["train"]]
    for row, their in zip(ours, theirs, strict=True):
        question, answer = their["question"], their["answer"]
        assert row == {
            "prompt": f"{question}\nAnswer:",
            "completion": f" {answer}",
        }
        sum_ = question.split(":")[1].strip(" =")
        assert eval(sum_) == int(answer)
    # The library's own seeds lie one row apart: the next would share 89 of 90 rows.
    shifted = list(reasoning_gym.create_dataset("chain_sum", seed=1, size=89, **SUMS))
    assert [r["question"] for r in shifted] == [r["question"] for r in theirs[1:]]
    other = data.task(config, seed=1)
    every = lambda t: {p for split in prompts(t).values() for p in split}
    assert len(every(task) & every(other)) < 5
    json.dumps(task.facts)
    # More training rows leave the held-out ones alone.
    more = prompts(data.task(config, train=80))
    assert {**more, "train": more["train"][:60]} == prompts(task)


def test_a_question_that_came_before_is_dropped_and_counted():
    options = {"max_terms": 2, "max_digits": 1}
    task = data.tasks.reasoning_gym(
        "chain_sum",
        train=900,
        validation=60,
        test=60,
        options=options,
        prompt="{question}",
        completion="{answer}.",
    )
    found = prompts(task)
    joined = [p for split in found.values() for p in split]
    # Two digits and an operator: there are no more than 200.
    assert len(set(joined)) == len(joined) <= 200
    for split, rows in found.items():
        assert task.facts["drawn"][split] - task.facts["repeated"][split] == len(rows)
    assert task.facts["repeated"]["train"] > 700
    assert task.splits["test"][0]["prompt"].endswith("=")
    assert task.splits["test"][0]["completion"].endswith(".")
    with pytest.raises(ValueError, match="different ones, all used up before .*'valid"):
        data.tasks.reasoning_gym(
            "chain_sum", train=1, validation=2000, test=2000, options=options
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generator": "chain_sums"}, "'chain_sums' is not .* 'chain_sum'.*There is: "),
        ({"options": {"terms": 2}}, "have 'terms'.*There is: min_terms, .*"),
        ({"options": {"min_terms": 9}}, "refused by reasoning-gym's 'chain_sum': max"),
        ({"options": {"seed": 3}}, "`options` of 'chain_sum' have 'seed'"),
        ({"train": 0}, "`train` must be at least 1 rows; got 0"),
        ({"seed": 256}, "`seed` must be a whole number from 0 to 255; got 256"),
        ({"train": 2**24}, "rows in all; a seed has 16777216"),
        ({"prompt": "Q"}, r"`prompt` must have \{question\} in it, once; got 'Q'"),
        ({"completion": ""}, r"`completion` must have \{answer\} in it, once"),
        ({"generator": "rubiks_cube"}, "has no answers to write: a program"),
    ],
)
def test_what_does_not_do(given, message):
    given = {"generator": "chain_sum", "train": 3, "validation": 2, "test": 0, **given}
    with pytest.raises(ValueError, match=message):
        data.task({"name": "reasoning_gym", **given})


def test_no_test_rows_no_split():
    task = data.tasks.reasoning_gym("gcd", train=3, validation=2, test=0)
    assert list(task.splits) == ["train", "validation"]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxpeft\[reasoning\]'"):
        data.task("reasoning_gym/gcd")


def test_a_name_with_a_stroke():
    with pytest.raises(ValueError, match="'asdiv' cannot be given 'x': it takes none"):
        data.task("asdiv/x")
    with pytest.raises(ValueError, match="'gcd': 'generator' is given"):
        data.task("reasoning_gym/gcd", generator="gcd")
