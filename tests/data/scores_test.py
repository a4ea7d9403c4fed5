"""Every metric against scikit-learn or scipy, and where they have no answer."""

import inspect

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from jaxpeft import data
from jaxpeft.data import metrics
from jaxpeft.data._choices import CHOICE_METRICS
from jaxpeft.data._task import CLASSIFICATION_METRICS, REGRESSION_METRICS
from jaxpeft.data._texts import TEXT_METRICS

NAMES = sorted(name for name, _ in inspect.getmembers(metrics, inspect.isfunction))
OF_CLASSES = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": sklearn.metrics.f1_score,
    "macro_f1": lambda y, p: sklearn.metrics.f1_score(y, p, average="macro"),
    "matthews": sklearn.metrics.matthews_corrcoef,
}
OF_NUMBERS = {
    "pearson": lambda y, p: scipy.stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: scipy.stats.spearmanr(y, p).statistic,
}


def test_each_metric_has_an_oracle():
    assert sorted({*OF_CLASSES, *OF_NUMBERS}) == NAMES


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_classes_equal_scikit_learn(name, classes):
    if name == "f1" and classes > 2:
        with pytest.raises(ValueError, match="use macro_f1"):
            metrics.f1(np.array([0, 3]), np.array([0, 1]))
        return
    random = np.random.default_rng(0)
    scores = []
    for rows in (3, 40, 1000):
        labels = random.integers(0, classes, rows)
        guesses = random.integers(0, classes, rows)
        predictions = np.where(random.random(rows) < 0.6, labels, guesses)
        ours = getattr(metrics, name)(predictions, labels)
        assert ours == pytest.approx(OF_CLASSES[name](labels, predictions), abs=1e-12)
        scores.append(ours)
    # Control: not a constant, and not what the labels in another order would score.
    assert len(set(scores)) == 3
    assert getattr(metrics, name)(np.roll(predictions, 1), labels) < scores[-1] - 0.1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_equal_scipy(name, ties):
    random = np.random.default_rng(1)
    for rows in (3, 40, 1000):
        labels = random.normal(size=rows)
        predictions = labels**3 + random.normal(size=rows)
        if ties:
            labels, predictions = np.round(labels), np.round(predictions)
        ours = getattr(metrics, name)(predictions.astype(np.float32), labels)
        theirs = OF_NUMBERS[name](labels, predictions.astype(np.float32))
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert (
        abs(
            metrics.pearson(predictions, labels) - metrics.spearman(predictions, labels)
        )
        > 0.01
    )


@pytest.mark.parametrize("name", NAMES)
def test_perfect_is_one_and_reversed_is_less(name):
    labels = np.array([0, 1, 1, 0, 1])
    assert getattr(metrics, name)(labels, labels) == pytest.approx(1.0, abs=1e-12)
    assert getattr(metrics, name)(1 - labels, labels) <= 0.0


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 0]])
def test_a_constant_prediction_scores_zero(name, labels):
    assert getattr(metrics, name)(np.array([0, 0, 0]), np.array(labels)) == 0.0
    if name != "f1":
        assert getattr(metrics, name)(np.array(labels), np.array([0, 0, 0])) == 0.0


def test_a_constant_whose_mean_rounds_scores_zero():
    constant = np.full(3, 0.1)
    assert constant.mean() != 0.1  # the trap: a spread of 1e-17, not of 0
    labels = np.array([0.1, 0.2, 0.4])
    assert metrics.pearson(constant, labels) == 0.0
    assert metrics.spearman(constant, labels) == 0.0


def test_matthews_does_not_overflow():
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 200_000)  # 200,000**4 is beyond int64
    predictions = np.where(random.random(200_000) < 0.8, labels, 1 - labels)
    assert metrics.matthews(predictions, labels) == pytest.approx(
        sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_bad_vectors_are_refused(name):
    metric = getattr(metrics, name)
    with pytest.raises(ValueError, match="nothing to score"):
        metric(np.array([], np.int32), np.array([], np.int32))
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        # Past the test-time check of shapes, which a user does not have.
        inspect.unwrap(metric)(np.array([0, 1]), np.array([0, 1, 1]))


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_a_nan_is_named(name):
    with pytest.raises(ValueError, match="`predictions` .* got nan at position 1"):
        getattr(metrics, name)(np.array([0.5, np.nan]), np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="`labels` .* got inf at position 0"):
        getattr(metrics, name)(np.array([0.5, 0.1]), np.array([np.inf, 0.2]))


@pytest.mark.parametrize("name", sorted({*CLASSIFICATION_METRICS, *REGRESSION_METRICS}))
def test_a_metric_is_better_the_way_it_is_said(name):
    labels = np.array([0, 1, 1, 0, 1, 0])
    wrong = np.array([1, 1, 0, 1, 0, 0])
    right, worse = (getattr(metrics, name)(x, labels) for x in (labels, wrong))
    best = {"max": max, "min": min}[data.metric_mode(name)]
    assert right != worse and best(right, worse) == right


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_metric_of_writing_is_better_the_way_it_is_said(name):
    rows = [{"q": "2 + 2 =", "a": " 4"}]
    task = data.make_text_task(
        "sums",
        {"train": rows, "validation": rows},
        prompt="q",
        completion="a",
        metrics=name,
    )
    assert task.best == {"metric": name, "mode": data.metric_mode(name)}
    right, worse = (
        data.score(task, np.array([[loss, 2.0, hits]]), np.array([2.0]))[name]
        for loss, hits in ((0.1, 2.0), (5.0, 1.0))
    )
    best = {"max": max, "min": min}[data.metric_mode(name)]
    assert right != worse and best(right, worse) == right


def test_every_metric_that_a_task_may_name_has_a_direction():
    named = {*CLASSIFICATION_METRICS, *REGRESSION_METRICS}
    named |= {*TEXT_METRICS, *CHOICE_METRICS}
    assert {data.metric_mode(name) for name in named} == {"max", "min"}
    assert data.metric_mode("sums/perplexity") == data.metric_mode("loss") == "min"
    with pytest.raises(ValueError, match="`name` 'acuracy' is no metric"):
        data.metric_mode("acuracy")
