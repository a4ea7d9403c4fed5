"""Evaluation: every row of a split through the model, once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft import numerics
from jaxpeft.training._batch import put_batch
from jaxpeft.training._mesh import batch_sharding, replicated
from jaxpeft.training._routed import add_sums, sum_rows
from jaxpeft.training._state import TrainState
from jaxpeft.training._step import Batch, Forward, Loss
from jaxpeft.tree import combine


class EvalOutput(NamedTuple):
    """What one evaluation step returns, whole on every process.

    Attributes:
        outputs: what ``forward`` returned for the global batch.
        label: the labels of the same rows.
        weight: ``[rows]``, 0 for padding.
        loss_sum: the weighted sum of the losses.
        weight_sum: the sum of their weights.
        routing: by site, the sums of its router over the batch; empty without one.
    """

    outputs: Any
    label: Any
    weight: Any
    loss_sum: Any
    weight_sum: Any
    routing: Any


class Predictions(NamedTuple):
    """The rows of a split, padding left out.

    Attributes:
        outputs: ``[rows, ...]``, numpy.
        labels: ``[rows]``, numpy.
        loss: the weighted mean of the losses.
        routing: by site, the sums of its router over all rows, for
            ``mixtures.routing_report``; empty where there is none.
    """

    outputs: np.ndarray
    labels: np.ndarray
    loss: float
    routing: dict[str, Any]


def eval_step(
    forward: Forward, loss: Loss, state: TrainState, frozen: Any, *, mesh: Mesh
) -> Callable[[Any, Any, Batch], EvalOutput]:
    """Compiles (once per bucket length) the model without dropout.

    Args:
        forward: ``(adapted, batch, None) -> (outputs, seen)`` (``model_forward``).
        loss: ``(outputs, batch) -> (values, weights)``.
        state: the state, or its shapes; its shardings are kept.
        frozen: the second half of ``jaxpeft.partition``.
        mesh: the mesh.

    Returns:
        ``step(trainable, frozen, batch) -> EvalOutput``, a ``jax.jit`` object.
        Nothing is donated.
    """

    def step(trainable, frozen, batch):
        adapted = combine(trainable, frozen)
        outputs, seen = forward(adapted, batch, None)
        values, weights = loss(outputs, batch)
        losses = numerics.where_shown(weights, values) * weights
        sums = jnp.sum(losses), jnp.sum(weights), sum_rows(seen)
        return EvalOutput(outputs, batch["label"], batch["weight"], *sums)

    where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(
        step,
        in_shardings=(where(state.trainable), where(frozen), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def run_split(
    step: Callable[[Any, Any, Batch], EvalOutput],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    mesh: Mesh,
    rows: int,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """Runs a split through the model.

    Args:
        step: from ``eval_step``.
        trainable: the trainable leaves (``state.trainable``).
        frozen: the frozen tree.
        batches: dicts of numpy arrays with ``"label"``; the same number of them on
            every process.
        mesh: the mesh.
        rows: each batch is padded to this many rows of this process, so that each
            bucket length compiles once.
        advance: called after each batch with its number of real rows, for progress.

    Returns:
        Outputs and labels of all real rows, of all processes, in the order of the
        batches, and the mean loss.

    Raises:
        ValueError: there is no row, or none with a loss to take the mean of.
    """
    outputs, labels = [], []
    loss_sum = weight_sum = 0.0
    routing = None

    def take(result: EvalOutput) -> None:
        nonlocal loss_sum, weight_sum, routing
        result = jax.device_get(result)
        routing = add_sums(routing, result.routing)
        real = result.weight > 0
        outputs.append(np.asarray(result.outputs)[real])
        labels.append(np.asarray(result.label)[real])
        loss_sum += float(result.loss_sum)
        weight_sum += float(result.weight_sum)
        if advance is not None:
            advance(int(real.sum()))

    waiting = None
    for batch in batches:
        # One batch stays in flight while the one before it is fetched.
        result = step(trainable, frozen, put_batch(batch, mesh, rows=rows))
        if waiting is not None:
            take(waiting)
        waiting = result
    if waiting is not None:
        take(waiting)
    if not sum(map(len, labels)):
        raise ValueError("`batches` has no row of non-zero weight: nothing to evaluate")
    if not weight_sum:
        raise ValueError("`batches` has rows, but nothing learnt in them: no mean loss")
    return Predictions(
        outputs=np.concatenate(outputs),
        labels=np.concatenate(labels),
        loss=loss_sum / weight_sum,
        routing=routing,
    )


def evaluate(
    step: Callable[[Any, Any, Batch], EvalOutput],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    mesh: Mesh,
    rows: int,
    score: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]],
    advance: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Scores a split.

    Args:
        step: from ``eval_step``.
        trainable: the trainable leaves.
        frozen: the frozen tree.
        batches: as for ``run_split``.
        mesh: the mesh.
        rows: as for ``run_split``.
        score: ``(outputs [rows, ...], labels [rows]) -> {name: number}``, on all real
            rows at once, so that metrics that are no means (F1, Matthews) are right.
        advance: as for ``run_split``.

    Returns:
        The scores and ``"loss"``.

    Raises:
        ValueError: there is no row, or ``score`` returns a ``"loss"`` of its own.
    """
    found = run_split(
        step, trainable, frozen, batches, mesh=mesh, rows=rows, advance=advance
    )
    return scores_of(found, score)


def scores_of(
    found: Predictions, score: Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
) -> dict[str, float]:
    """Returns the scores of predictions and ``"loss"``, as ``evaluate`` does.

    Args:
        found: from ``run_split``.
        score: as for ``evaluate``.

    Raises:
        ValueError: ``score`` returns a ``"loss"`` of its own.
    """
    scores = score(found.outputs, found.labels).items()
    scores = {name: float(value) for name, value in scores}
    if "loss" in scores:
        raise ValueError("`score` must not return 'loss': that name is the mean loss's")
    return {**scores, "loss": found.loss}
