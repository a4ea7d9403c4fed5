"""Scores of predictions against labels, as plain numpy functions.

Every function here takes ``(predictions, labels)``, two vectors of one length, and
returns a float where more is better. Where the textbook formula divides by zero, each
docstring says what is returned instead, so that a run never reports a NaN.
"""

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

ClassIds = Integer[ndarray, " n"]
Scores = Float[ndarray, " n"] | Integer[ndarray, " n"]


def accuracy(predictions: ClassIds, labels: ClassIds) -> float:
    """Returns the share of predictions that equal their label.

    Args:
      predictions: predicted class ids, [n].
      labels: true class ids, [n].

    Returns:
      A number between 0 and 1.

    Raises:
      ValueError: if the two differ in length or are empty.

    Example:
      >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0]))
      0.6666666666666666

    References:
      ``sklearn.metrics.accuracy_score``.
    """
    _check(predictions, labels)
    return float(np.mean(predictions == labels))


def f1(predictions: ClassIds, labels: ClassIds) -> float:
    """Returns F1 of class 1, the harmonic mean of precision and recall.

    Args:
      predictions: predicted class ids, 0 or 1, [n].
      labels: true class ids, 0 or 1, [n].

    Returns:
      A number between 0 and 1; 0 where class 1 is neither predicted nor true anywhere.

    Raises:
      ValueError: if the two differ in length, are empty, or have other ids than 0, 1.

    Example:
      >>> f1(np.array([0, 1, 1]), np.array([0, 1, 0]))
      0.6666666666666666

    References:
      ``sklearn.metrics.f1_score``; the score of MRPC and QQP in GLUE (Wang et al.,
      arXiv 1804.07461, table 1).
    """
    _check(predictions, labels)
    for name, values in (("predictions", predictions), ("labels", labels)):
        other = np.flatnonzero((values != 0) & (values != 1))
        if other.size:
            raise ValueError(
                f"`{name}` of f1 are 0 or 1; got {values[other[0]]} at position "
                f"{other[0]}. For more than two classes, use macro_f1."
            )
    return _f1_of_class(predictions, labels, 1)


def macro_f1(predictions: ClassIds, labels: ClassIds) -> float:
    """Returns the mean over the classes of each class's F1.

    The classes are those that occur in ``predictions`` or in ``labels``; rare ones
    weigh as much as frequent ones.

    Args:
      predictions: predicted class ids, [n].
      labels: true class ids, [n].

    Returns:
      A number between 0 and 1.

    Raises:
      ValueError: if the two differ in length or are empty.

    Example:
      >>> macro_f1(np.array([0, 1, 1]), np.array([0, 1, 0]))
      0.6666666666666666

    References:
      ``sklearn.metrics.f1_score(average="macro")``.
    """
    _check(predictions, labels)
    classes = np.union1d(predictions, labels)
    return float(np.mean([_f1_of_class(predictions, labels, int(c)) for c in classes]))


def matthews(predictions: ClassIds, labels: ClassIds) -> float:
    r"""Returns Matthews' correlation coefficient, for two or more classes.

    .. math:: \frac{c n - \sum_k p_k t_k}
        {\sqrt{(n^2 - \sum_k p_k^2)(n^2 - \sum_k t_k^2)}}

    with n rows, c of them right, p_k and t_k rows predicted as and truly of class k.

    Args:
      predictions: predicted class ids, [n].
      labels: true class ids, [n].

    Returns:
      A number between -1 and 1; 0 where either side is all of one class (0 / 0: such a
      prediction says nothing about the label).

    Raises:
      ValueError: if the two differ in length or are empty.

    Example:
      >>> matthews(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]))
      0.5773502691896258

    References:
      Gorodkin, Computational Biology and Chemistry 28 (2004), eq. 8;
      ``sklearn.metrics.matthews_corrcoef``; the score of CoLA in GLUE.
    """
    _check(predictions, labels)
    # Python integers: n^4 leaves int64 at 55,000 rows.
    classes = np.union1d(predictions, labels)
    predicted = [int(np.sum(predictions == c)) for c in classes]
    true = [int(np.sum(labels == c)) for c in classes]
    n = len(labels)
    right = int(np.sum(predictions == labels))
    covariance = right * n - sum(p * t for p, t in zip(predicted, true, strict=True))
    spread = (n * n - sum(p * p for p in predicted)) * (
        n * n - sum(t * t for t in true)
    )
    return covariance / spread**0.5 if spread else 0.0


def pearson(predictions: Scores, labels: Scores) -> float:
    """Returns Pearson's correlation: how well a straight line relates the two.

    Args:
      predictions: predicted scores, [n].
      labels: true scores, [n].

    Returns:
      A number between -1 and 1; 0 where either side is constant (0 / 0).

    Raises:
      ValueError: if the two differ in length, are empty, or hold a NaN or infinity.

    Example:
      >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])), 6)
      1.0

    References:
      ``scipy.stats.pearsonr``; the score of STS-B in GLUE.
    """
    _check(predictions, labels)
    x = np.asarray(predictions, np.float64)
    y = np.asarray(labels, np.float64)
    # Asked of the values, not of the spread: the mean of equal floats can round, and
    # then a constant would correlate with whatever the rounding left.
    if np.all(x == x[0]) or np.all(y == y[0]):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    # Divided before they meet, so that neither very small nor large scores overflow.
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.clip(x @ y, -1.0, 1.0))


def spearman(predictions: Scores, labels: Scores) -> float:
    """Returns Spearman's correlation: Pearson's, of the ranks.

    Equal values share the mean of their ranks.

    Args:
      predictions: predicted scores, [n].
      labels: true scores, [n].

    Returns:
      A number between -1 and 1; 0 where either side is constant.

    Raises:
      ValueError: if the two differ in length, are empty, or hold a NaN or infinity.

    Example:
      >>> round(spearman(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.5, 0.6])), 6)
      1.0

    References:
      ``scipy.stats.spearmanr``; the second score of STS-B in GLUE.
    """
    _check(predictions, labels)
    return pearson(_ranks(predictions), _ranks(labels))


def _f1_of_class(predictions: ClassIds, labels: ClassIds, of: int) -> float:
    both = np.sum((predictions == of) & (labels == of))
    either = np.sum(predictions == of) + np.sum(labels == of)
    return float(2 * both / either) if either else 0.0


def _ranks(values: Scores) -> Float[ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the rank, from 1, of the last of each group of equals
    return (last - (counts - 1) / 2)[inverse]


def _check(predictions: ndarray, labels: ndarray) -> None:
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            f"`predictions` and `labels` are two vectors of one length; got shapes "
            f"{predictions.shape} and {labels.shape}. Of logits [n, classes] take "
            f"np.argmax(logits, axis=-1)."
        )
    if not len(labels):
        raise ValueError("`labels` has no rows: there is nothing to score.")
    for name, values in (("predictions", predictions), ("labels", labels)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(
                f"`{name}` must be finite; got {values[bad[0]]} at position {bad[0]} "
                f"({bad.size} of {len(values)} are not)."
            )
