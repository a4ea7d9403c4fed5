"""A run in stages: each goes on from the adapter that the one before it saved."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from jaxpeft import mixtures
from jaxpeft.runs._config import said_of
from jaxpeft.runs._fields import check_fields
from jaxpeft.runs._report import REPORT_FILE, print_table
from jaxpeft.runs._workdir import check_workdir
from jaxpeft.training import as_folder


def stage_config(
    config: ml_collections.ConfigDict, index: int, folder: Path
) -> ml_collections.ConfigDict:
    """Returns the config of one stage: an ordinary run's.

    Args:
        config: the config of the whole. ``stages`` names the stages in order:
            "universal", "domain:NAME" or "router" (see ``jaxpeft.mixtures.stage``).
            ``stage_changes`` has a section for each kind of stage, with the fields of
            the config that are different there.
        index: which stage, from 0.
        folder: the folder of the whole run.

    Returns:
        the config: ``stage`` names it, ``start`` is the folder of the adapter of the
        stage before, and of a mixture of tasks "domain:NAME" trains on NAME alone,
        "router" on all domains that there are by then.

    Raises:
        ValueError: a stage or a field that there is none of.
    """
    name = config.stages[index]
    kind, _, domain = name.partition(":")
    if kind not in config.stage_changes or (kind == "domain") != bool(domain):
        raise ValueError(
            f"`config.stages` has {name!r}; write 'universal', 'domain:NAME' or "
            f"'router'. Of these, `config.stage_changes` has "
            f"{sorted(config.stage_changes)}."
        )
    if kind != "universal" and config.data.name != "mixture":
        raise ValueError(
            f"`config.stages` has {name!r}, which trains on some tasks of a mixture, "
            f"but `config.data.name` is {config.data.name!r}; write 'mixture' and its "
            "tasks, each called after a domain."
        )
    changed = config.copy_and_resolve_references().unlock()
    known = [n.partition(":")[2] for n in config.stages[:index]]
    only = {"domain": (domain,), "router": tuple(filter(None, dict.fromkeys(known)))}
    if only.get(kind):  # a router may also begin, on what another run has trained
        changed.data.only = only[kind]
    changed.stages, changed.stage, changed.stage_changes = (), name, {}
    if index:
        changed.start = str(stage_folder(config, index - 1, folder) / "adapter")
        changed.ranks.before = None  # the ranks are those of what it goes on from
    changed.lock()
    try:
        changed.update(config.stage_changes[kind])
    except (KeyError, TypeError) as error:
        raise ValueError(f"`config.stage_changes.{kind}`: {error.args[0]}") from error
    return changed


def stage_folder(config: ml_collections.ConfigDict, index: int, folder: Path) -> Path:
    """Returns the folder of a stage, "02_domain_code"."""
    return folder / f"{index + 1:02}_{config.stages[index].replace(':', '_')}"


def stage_folders(config: ml_collections.ConfigDict, folder: Path) -> list[Path]:
    """Returns the folders of a run's reports: one a stage, or without any its own."""
    each = range(len(config.stages))
    return [stage_folder(config, index, folder) for index in each] or [folder]


def run_stages(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    run: Callable[[ml_collections.ConfigDict, Path], dict[str, Any]],
    *,
    free: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs all stages of a config, each in a folder of its own below ``workdir``.

    A stage that is complete is not run again; one that was stopped goes on where it
    stood. More stages may be added at the end of ``config.stages``.

    Args:
        config: see ``stage_config``.
        workdir: the folder of the whole.
        run: runs one stage.
        free: fields that may differ when a stage is resumed.

    Returns:
        the results of the last stage, with those of all under ``"stages"``.

    Raises:
        ValueError: see ``stage_config`` and ``check_fields``, before any stage is run.
        WorkdirError: a stage's folder is in use, or of another config.
    """
    folder = as_folder(workdir)
    configs = [stage_config(config, i, folder) for i in range(len(config.stages))]
    for changed in configs:  # all, before the first is trained
        check_fields(changed)
    results = {}
    for index, changed in enumerate(configs):
        own = stage_folder(config, index, folder)
        check_workdir(own, changed, free=free)
        done = own / REPORT_FILE
        found = json.loads(done.read_text())["results"] if done.exists() else None
        results[own.name] = run(changed, own) if found is None else found
    metric = results[own.name]["metric"]
    show = lambda r: f"{r['before'][metric]:.4f}, {r['after'][metric]:.4f}"
    rows = {name: show(result) for name, result in results.items()}
    print_table(rows, title=f"{folder.name}: {metric} before and after each stage")
    return results[own.name] | {"stages": results}


def enter_stage(adapted: Any, config: ml_collections.ConfigDict) -> Any:
    """Returns the tree in a run's stage; a domain that it does not have yet is added.

    Args:
        adapted: a tree of a method with stages; of shapes the names alone are checked.
        config: the run's config. ``stage`` is "universal", "domain:NAME" or "router";
            empty: the tree stays as it is. ``seed`` is of a new domain's leaves, which
            its name decides with it.

    Raises:
        ValueError: as ``mixtures.stage``.
    """
    if not config.stage:
        return adapted
    with said_of("stage"):
        _, _, domain = config.stage.partition(":")
        if domain and domain not in mixtures.domain_names(adapted):
            # The run's own keys are 0 to 3.
            key = jax.random.fold_in(jax.random.key(config.seed), 4)
            add = lambda tree, key: mixtures.add_domain(tree, domain, key=key)
            leaves = jax.tree.leaves(adapted)
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
                add = functools.partial(jax.eval_shape, add)
            adapted = add(adapted, key)
        return mixtures.stage(adapted, config.stage)


def save_routing(
    folder: Path, routes: mixtures.RoutingReport, *, title: str
) -> dict[str, Any]:
    """Writes ``routing.png``, prints the routing's table and returns it as plain data.

    Args:
        folder: the run's folder.
        routes: from ``mixtures.routing_report``.
        title: stands above picture and table.
    """
    if jax.process_index() == 0:
        mixtures.plot_routing(routes, folder / "routing.png", title=title)
        print_table(routes.summary(), title=f"{title}: routing, held out")
    return routes.to_json()
