"""What a run reads before its model: the task, tokens, the lengths in steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jaxpeft import data, models
from jaxpeft.runs._check import outline
from jaxpeft.runs._config import count_steps, said_of
from jaxpeft.runs._progress import Progress
from jaxpeft.runs._stop import StopAsked
from jaxpeft.training import EvalOutput, batches_ahead, run_split, scores_of


class Inputs(NamedTuple):
    """A run's rows and lengths.

    Attributes:
        task: of ``data.task``.
        outline: the task's model without weights.
        splits: the tokens of each split, of ``data.tokenize``.
        batches: the training batches, without end, as they are and on the devices
            (``training.batches_ahead``); their place can be saved.
        sample: ``(samples, seed) -> (rows, batches)``, training texts one by one, for
            what is estimated before training (``estimate_allocation``).
        metadata: what is kept with every adapter that is saved, for all that is done
            with it.
        total_steps: updates of the whole run.
        evaluate_every: updates between evaluations.
        save_every: updates between checkpoints.
        keeps: whether the adapter of each such update is kept, too.
    """

    task: Any
    outline: nn.Module
    splits: dict[str, Any]
    batches: Any
    sample: Callable[[int, int], tuple[int, Any]]
    metadata: dict[str, Any]
    total_steps: int
    evaluate_every: int
    save_every: int
    keeps: bool

    @property
    def held_out(self) -> str:
        """The split that is scored before and after training.

        GLUE keeps the labels of its test splits; there, validation is all there is.
        """
        return "test" if "test" in self.task.splits else "validation"


def read_inputs(config: ml_collections.ConfigDict, mesh: Mesh) -> Inputs:
    """Reads a run's task and tokenizer; weights are not read.

    Args:
        config: of ``load_config``, checked.
        mesh: where batches are put.

    Returns:
        An ``Inputs``.

    Raises:
        ValueError: the task, the model or the tokenizer does not fit the config.
    """
    with said_of("data"):
        task = data.task(config.data)
    model = outline(config, head=task.head, num_labels=task.num_labels)
    with said_of("tokenizer"):
        tokenizer = models.tokenizer(config.model.name, **config.tokenizer)
    limits = dict(vocab_size=model.config.vocab_size, max_length=config.max_length)
    limits["workers"] = config.input.workers
    splits = data.tokenize(task, tokenizer, **limits)
    batches = data.batches(
        splits["train"], config.batch_size, seed=config.seed, lengths=config.lengths
    )
    per_epoch = data.batches_per_epoch(splits["train"], config.batch_size)
    count = lambda field, text: count_steps(text, per_epoch, field=field)
    saving = config.save_every.removesuffix(", kept")

    def sample(samples: int, seed: int):
        texts = splits["train"]
        if texts.segments is not None:  # several to a row
            single = data.tokenize(
                data.unpacked(task), tokenizer, **limits, splits=["train"]
            )
            texts = single["train"]
        drawn = data.sample(texts, samples, seed=seed)
        rows, lengths = config.eval_batch_size, config.lengths
        return drawn.rows, data.evaluation_batches(drawn, rows, lengths=lengths)

    return Inputs(
        task=task,
        outline=model,
        splits=splits,
        batches=batches_ahead(
            batches, mesh, accumulate=config.accumulate, size=config.input.prefetch
        ),
        sample=sample,
        metadata={
            "config": config.to_dict(),
            "tokenizer": models.tokenizer_options(tokenizer),
            **data.task_metadata(task),
        },
        total_steps=count("train_for", config.train_for),
        evaluate_every=count("evaluate_every", config.evaluate_every),
        save_every=count("save_every", saving),
        keeps=saving != config.save_every,
    )


def score_split(
    config: ml_collections.ConfigDict,
    inputs: Inputs,
    eval_fn: Callable[..., EvalOutput],
    trainable: Any,
    frozen: Any,
    split: str,
    *,
    mesh: Mesh,
    bar: Progress,
    stop_asked: StopAsked,
    keep: Path | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs a split of all tasks through the model, and scores it.

    Args:
        config: the run's config.
        inputs: of ``read_inputs``.
        eval_fn: of ``training.eval_step``.
        trainable: the trainable leaves.
        frozen: the frozen tree.
        split: ``"validation"`` or ``"test"``.
        mesh: the mesh.
        bar: shows how far it is.
        stop_asked: asked after each batch.
        keep: a file of numpy arrays (``.npz``) for what was scored, ``outputs`` and
            ``labels`` of all rows; of a mixture ``trec/outputs`` and so on.

    Returns:
        ``(scores, routing)``: the scores by name, and by task the sums of its routers,
        for ``mixtures.routing_report``; empty without routers.

    Raises:
        Stopped: SIGTERM came.
    """
    rows, scores, routing, kept = config.eval_batch_size, {}, {}, {}
    held_out = data.held_out(inputs.task, inputs.splits, split)
    for name, (encoded, score) in held_out.items():
        with bar.phase(f"{split} {name}".strip(), encoded.rows) as show:

            def advance(count: int, show=show) -> None:
                show(count)
                stop_asked.raised("in an evaluation")

            found = run_split(
                eval_fn,
                trainable,
                frozen,
                data.evaluation_batches(encoded, rows, lengths=config.lengths),
                mesh=mesh,
                rows=rows // jax.process_count(),
                advance=advance,
            )
        scores[name] = scores_of(found, score)
        for kind in ("outputs", "labels") if keep else ():
            kept[f"{name}/{kind}".strip("/")] = getattr(found, kind)
        if found.routing:
            routing[name or inputs.task.name] = found.routing
    if keep and jax.process_index() == 0:
        np.savez_compressed(keep, allow_pickle=False, **kept)
    return data.gather_scores(inputs.task, scores), routing
