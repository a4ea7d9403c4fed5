"""What a run is made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from jaxpeft import interop, training
from jaxpeft.runs._inputs import Inputs
from jaxpeft.runs._metrics import MetricsWriter
from jaxpeft.runs._progress import Progress
from jaxpeft.runs._stop import StopAsked


class Parts(NamedTuple):
    """What a run is made of, once it stands."""

    title: str
    config: ml_collections.ConfigDict
    inputs: Inputs
    folder: Path
    mesh: jax.sharding.Mesh
    specs: Any  # where on the mesh the parameters lie
    sizes: tuple[int, int]  # parameters that train, and all
    ranks: Any  # found before training; None: those of the adapter
    load_base: Callable[[], tuple[Any, Any]]  # (model, parameters)
    allocator: Any  # changes ranks in training; None: nothing does
    step_fn: Callable[..., Any]  # one update
    evaluate: Callable[..., Any]  # (trainable, frozen, split) -> (scores, routing)
    checkpoints: training.Checkpointer
    writer: MetricsWriter
    bar: Progress
    stop_asked: StopAsked
    seconds: Callable[[], float]  # of this run and of those that it resumes


def keep_adapter(parts: Parts, adapted: Any, step: int) -> None:
    """Saves an adapter as it is after a step, for good, in ``adapters/STEP``.

    Args:
        parts: of the run.
        adapted: the adapted tree.
        step: the number of updates done.
    """
    interop.save_adapter(
        adapted,
        parts.folder / f"adapters/{step}",
        metadata={**parts.inputs.metadata, "step": step},
        overwrite=True,  # by a run that was stopped right here
    )
