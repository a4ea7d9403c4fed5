"""The ranks of a run: found before it trains, changed while it does, reported."""

from pathlib import Path
from typing import Any

import jax
import ml_collections
from jaxtyping import PyTree

from jaxpeft import adapters, allocate, training
from jaxpeft.allocate import Allocation, Allocator
from jaxpeft.runs._config import call_named, make_adapter, said_of
from jaxpeft.runs._gather import Draw
from jaxpeft.runs._metrics import MetricsWriter
from jaxpeft.runs._progress import Progress
from jaxpeft.runs._ranks import starting_allocation
from jaxpeft.tree import attach

DECIDED_FILE = "decided.json"


def ranks_before(
    config: ml_collections.ConfigDict,
    folder: Path,
    model: Any,
    params: PyTree,
    draw: Draw,
) -> Allocation | None:
    """Returns the ranks that a run starts with; ``None``: those that the adapter says.

    Args:
        config: the config, of which ``ranks.before`` says where they come from.
        folder: the run's folder, which keeps them.
        model: of ``models.load``.
        params: its parameters.
        draw: as in ``estimate_allocation``.

    Raises:
        ValueError: as of ``starting_allocation``.
    """
    setting = config.ranks.before
    if not setting:
        return None
    return starting_allocation(
        setting if isinstance(setting, str) else setting.to_dict(),
        *(folder, model, params, draw),
        adapter=make_adapter(config),
        targets=config.targets,
        exclude=config.exclude or None,
    )


def ranks_during(
    config: ml_collections.ConfigDict, total_steps: int
) -> Allocator | None:
    """Returns what changes ranks in training, ``None`` where nothing does.

    Args:
        config: the config, of which ``ranks.during`` says what.
        total_steps: the number of updates.

    Raises:
        ValueError: an unknown name or argument.

    Example:
        >>> fields = {"name": "importance", "target_rank": 2}
        >>> config = ml_collections.ConfigDict({"ranks": {"during": fields}})
        >>> ranks_during(config, 100).settled <= 100
        True
    """
    if not (fields := config.ranks.during):
        return None
    return call_named(
        allocate, fields, "ranks.during", total_steps=total_steps, leave="biases"
    )


def attach_biases(adapted: PyTree, config: ml_collections.ConfigDict) -> PyTree:
    """Trains the biases among which what changes ranks chooses, beside the components.

    Args:
        adapted: the tree, or its shapes.
        config: the config, of which ``ranks.during.biases`` names the modules.

    Returns:
        The tree; the one that was given where the config names none.

    Raises:
        ValueError: as of ``attach``.
    """
    if not config.ranks.during or not (biases := config.ranks.during.get("biases")):
        return adapted
    nothing_drawn = jax.random.key(0)
    with said_of("ranks.during.biases"):
        return attach(adapted, adapters.bitfit(), targets=biases, key=nothing_drawn)


def decide_ranks(
    allocator: Allocator,
    state: training.TrainState,
    frozen: PyTree,
    folder: Path,
    writer: MetricsWriter,
    bar: Progress,
) -> training.TrainState:
    """Lets an allocator decide between two updates, and writes down what it chose.

    Args:
        allocator: of ``ranks_during``, one that has a ``decide``.
        state: the state after update ``allocator.settled``.
        frozen: the other half of the tree.
        folder: the run's folder, for ``decided.json``.
        writer: for the ``decided`` event.
        bar: for a line that says so.

    Returns:
        The state, as of ``training.decide``.

    Raises:
        NonFiniteError: an update so far was not finite.
    """
    state, chosen = training.decide(allocator, state, frozen)
    if jax.process_index() == 0:
        chosen.save(folder / DECIDED_FILE)
    kept = {n: chosen.facts[n] for n in ("nodes", "chosen", "trained", "stored")}
    writer.write("decided", allocator.settled, **kept)
    bar.note(f"After step {allocator.settled}: {kept}; {DECIDED_FILE} says which.")
    return state


def ranks_report(
    folder: Path,
    adapted: PyTree,
    before: Allocation | None,
    allocator: Allocator | None,
) -> dict[str, Any]:
    """Returns what a report says of a run's ranks, JSON-able.

    Args:
        folder: the run's folder.
        adapted: the tree after training.
        before: of ``ranks_before``.
        allocator: of ``ranks_during``.

    Returns:
        ``"ranks"``, the ranks by site after training, where something changed them;
        ``"allocation"``, ranks and facts of those found before.
    """
    found: dict[str, Any] = {}
    if allocator and allocator.decide:
        found["ranks"] = Allocation.load(folder / DECIDED_FILE).ranks()
    elif allocator:
        found["ranks"] = allocate.kept_ranks(adapted)
    if before is not None:
        found["allocation"] = {"ranks": before.ranks(), "facts": before.facts}
    return found
