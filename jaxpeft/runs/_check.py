"""What a run asks for, tried on shapes before weights or data are read."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key, PyTree

from jaxpeft import interop, models
from jaxpeft.runs._config import call, count_steps, make_adapter, said_of
from jaxpeft.runs._fields import check_fields
from jaxpeft.runs._ranks import check_estimate, read_allocation
from jaxpeft.runs._run_ranks import ranks_during
from jaxpeft.runs._workdir import check_workdir
from jaxpeft.training import adamw, check_rows, check_tokens, leaf_spec, make_mesh
from jaxpeft.tree import matrix_shape, nodes, partition, quantise

# (config, model, parameters or their shapes, two keys, ranks) -> the adapted tree
Attach = Callable[..., Any]

# Of config.model, for models.load.
_BUILD = ("dtype", "param_dtype", "scan_layers", "remat", "attention")
LONG = 10**6  # steps of an epoch, while the rows have not been counted


def check_run(
    config: ml_collections.ConfigDict,
    workdir: str | Path,
    attach: Attach,
    *,
    free: Sequence[str] = (),
) -> None:
    """Raises for whatever can be refused before any data or weights are read.

    Nothing is compiled, and nothing is written. The head that the task will need is
    not known yet: a site must be there with one of the heads that the model can have.

    Args:
        config: of ``load_config``.
        workdir: the run's folder.
        attach: as of ``rehearse``.
        free: as of ``open_workdir``.

    Raises:
        ValueError: a field of the config is missing, unknown or out of range, or names
            something that there is not.
        WorkdirError: the folder is in use, or of another run.
    """
    check_fields(config)
    check_workdir(workdir, config, free=free)
    mesh = call(make_mesh, config.mesh.to_dict(), "mesh")
    for field in ("batch_size", "eval_batch_size"):
        accumulate = config.accumulate if field == "batch_size" else 1
        if config[field] % jax.process_count():
            raise ValueError(
                f"`config.{field}` {config[field]} cannot be dealt out to "
                f"{jax.process_count()} processes; write a multiple of that."
            )
        rows = config[field] // jax.process_count()
        with said_of(field):
            check_rows(rows, mesh, accumulate)
    total_steps = count_steps(config.train_for, LONG, field="train_for")
    make_adapter(config)
    ranks_during(config, total_steps)
    if config.ranks.before and config.start:
        raise ValueError(
            "`config.ranks.before` is for a new adapter, `config.start` has its ranks"
            " already; leave one of them out."
        )
    if config.start:
        with said_of("start"):
            interop.adapter_info(config.start)
    errors = []
    for head, labels in (("causal_lm", None), ("classification", 2)):
        try:
            model = outline(config, head=head, num_labels=labels)
        except ValueError as error:
            errors.append(error)
            continue
        with said_of("mesh"):
            check_tokens(model, mesh, *config.lengths)
        try:
            return rehearse(config, model, attach, total_steps, head_known=False)
        except ValueError as error:
            errors.append(error)
    raise errors[-1]


def outline(
    config: ml_collections.ConfigDict, *, head: str, num_labels: int | None
) -> nn.Module:
    """Returns the model of a config without its weights.

    Args:
        config: the config.
        head: the head that its task needs.
        num_labels: the width of that.

    Raises:
        ValueError: as ``models.outline``.
    """
    settings = {name: config.model[name] for name in _BUILD}
    with said_of("model"):
        return models.outline(
            config.model.name, head=head, num_labels=num_labels, **settings
        )


def load_base(
    config: ml_collections.ConfigDict, task: Any, mesh: Mesh, key: Key[Array, ""]
) -> tuple[nn.Module, PyTree]:
    """Loads the pretrained model of a config, each leaf straight to its place.

    Args:
        config: the config.
        task: of ``data.task``; it says which head.
        mesh: the mesh.
        key: draws a head that the checkpoint does not have.

    Returns:
        ``(model, params)``, as of ``models.load``.
    """
    return models.load(
        config.model.name,
        head=task.head,
        num_labels=task.num_labels,
        sharding=lambda path, shape: NamedSharding(mesh, leaf_spec(path, shape, mesh)),
        key=key,
        quantise=config.model.quantise,
        **{name: config.model[name] for name in _BUILD},
    )


def abstract_params(config: ml_collections.ConfigDict, model: nn.Module) -> PyTree:
    """Returns the shapes of what ``load_base`` would load, quantised as it would be.

    Args:
        config: the config.
        model: of ``outline``.

    Raises:
        ValueError: a kernel cannot be quantised as the config says.
    """
    shapes = models.abstract(model)
    if config.model.quantise is None:
        return shapes
    with said_of("model.quantise"):
        return quantise(shapes, config.model.quantise, axes=model.axes)


def load_start(
    config: ml_collections.ConfigDict, model: nn.Module, params: PyTree
) -> PyTree:
    """Returns a model's parameters with the adapter that ``config.start`` names.

    Args:
        config: the config.
        model: of ``outline`` or ``load_base``.
        params: its parameters, or their shapes.

    Raises:
        ValueError: as of ``interop.load_adapter``; of parameters also where the
            adapter was trained on others.
    """
    shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    with said_of("start"):
        return interop.load_adapter(
            config.start, params, check_base=not shapes, names=model.names
        )


def rehearse(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    attach: Attach,
    total_steps: int,
    *,
    head_known: bool = True,
) -> None:
    """Attaches, stages and optimises shapes in place of parameters.

    Args:
        config: the config.
        model: of ``outline``.
        attach: ``(config, model, params, keys, ranks) -> adapted``, what the run will
            do with the parameters; it is given their shapes.
        total_steps: the number of updates.
        head_known: whether the model's head is that of the task.

    Raises:
        ValueError: what a run with this model would object to later.
    """
    tokens = jax.ShapeDtypeStruct((1, max(config.lengths)), jnp.int32)
    with said_of("lengths"):
        drawn = lambda tokens: model.init(jax.random.key(0), tokens)
        jax.eval_shape(drawn, tokens)
    shapes = abstract_params(config, model)
    ranks = stated_ranks(config, model, shapes)
    if config.start and not head_known:
        return  # its own head may be of any width
    made = []

    def make() -> None:  # here keys are traced: they need no program either
        keys = jax.random.split(jax.random.key(0))
        with warnings.catch_warnings():  # what is warned of, the run itself will say
            warnings.simplefilter("ignore")
            made.append(attach(config, model, shapes, keys, ranks))

    if config.start:  # a saved adapter draws nothing, and its values are looked at
        make()
    else:
        jax.eval_shape(make)
    field = "`config.adapter.rank` or `config.rank_pattern`"
    if ranks is not None or config.start:
        field = "`config.start`" if config.start else "`config.ranks.before`"
    _check_ranks(made[0], field)
    trainable, _ = partition(made[0])
    call(
        adamw,
        config.optimizer.to_dict(),
        "optimizer",
        trainable=trainable,
        total_steps=total_steps,
    )
    if allocator := ranks_during(config, total_steps):
        with said_of("ranks.during"):
            jax.eval_shape(allocator.init, trainable)


def stated_ranks(
    config: ml_collections.ConfigDict, model: nn.Module, shapes: PyTree
) -> Any:
    """Returns the ranks of the file that ``config.ranks.before`` names, if it is one.

    Ranks that are estimated need data: of these only the options are checked.
    """
    setting = config.ranks.before
    if not setting:
        return None
    sites = {"targets": config.targets, "exclude": config.exclude or None}
    if isinstance(setting, str) and Path(setting).is_file():
        return read_allocation(setting, shapes, axes=model.axes, **sites)
    check_estimate({"name": setting} if isinstance(setting, str) else setting.to_dict())
    return None


def _check_ranks(adapted: Any, field: str) -> None:
    """Raises for factors larger than any change of their kernel needs.

    A rank that is no size of a leaf beside the kernel (shared ones) is not looked at.
    """
    for node in nodes(adapted):
        if node.site.ranks is None or node.adapter.shared is not None:
            continue
        _, *sizes = matrix_shape(node.base.shape, node.site.roles)
        if max(node.site.ranks) > max(sizes):
            raise ValueError(
                f"{field} gives rank {max(node.site.ranks)} to site "
                f"{node.site.path!r}, a kernel of {sizes[0]} x {sizes[1]}: every "
                f"change of it has rank {min(sizes)} or less."
            )
