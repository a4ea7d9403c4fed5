"""Which way each score is better."""

from typing import Literal

_MODES: dict[str, Literal["max", "min"]] = {
    "accuracy": "max",
    "accuracy_per_token": "max",
    "exact_match": "max",
    "f1": "max",
    "loss": "min",
    "macro_f1": "max",
    "matthews": "max",
    "pearson": "max",
    "perplexity": "min",
    "spearman": "max",
    "token_accuracy": "max",
}


def metric_mode(name: str) -> Literal["max", "min"]:
    """Returns whether the best of several scores is the largest or the smallest.

    Whatever keeps, marks or compares scores asks here.

    Args:
      name: of a metric, or "loss"; of a task in a mixture also "trec/accuracy".

    Returns:
      "max" or "min".

    Raises:
      ValueError: there is no such metric.

    Example:
      >>> metric_mode("perplexity"), metric_mode("trec/accuracy")
      ('min', 'max')
    """
    own = name.rpartition("/")[2]
    if own not in _MODES:
        raise ValueError(
            f"`name` {name!r} is no metric; there are {', '.join(sorted(_MODES))}."
        )
    return _MODES[own]
