"""What a config's step needs on a machine: compiled from shapes, without a run."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from jaxpeft import data, hlo, models
from jaxpeft.runs._check import LONG, Attach, abstract_params, outline, stated_ranks
from jaxpeft.runs._config import call, count_steps, said_of
from jaxpeft.runs._fields import check_fields
from jaxpeft.runs._stages import enter_stage, stage_config
from jaxpeft.training import (
    StepEstimate,
    Target,
    batch_sharding,
    check_tokens,
    estimate_step,
    find_target,
    make_mesh,
)

# (config, model, adapted, key, mesh=, total_steps=) -> (.., state, frozen, .., step)
MakeStep = Callable[..., Any]

ASSUMED_LABELS = 2
# From what keeps the most to what keeps the least (``models.from_config``).
REMATS = (None, "names", "unscaled", "full")
LONG_ROW = 8192  # tokens, from which on rows are cut, too


class Try(NamedTuple):
    """One way that a step was compiled.

    Attributes:
        changes: fields of the config that differ, ``{"model.remat": "full"}``.
        estimate: what it needs.
    """

    changes: dict[str, Any]
    estimate: StepEstimate


def estimate(
    config: ml_collections.ConfigDict,
    *,
    attach: Attach,
    make_step: MakeStep,
    target: str | Target | None = None,
    slices: int = 1,
    num_labels: int | None = None,
) -> StepEstimate:
    """Compiles the step of a config for a machine, from shapes alone.

    No weights and no rows are read: of the model its config is enough. (A packaged
    model is fetched, which brings its weights.) The rows are as long as
    ``config.lengths`` allows.

    Args:
        config: of ``load_config``. With stages, the first one's step is meant.
        attach: what the run does with its parameters, as of ``rehearse``.
        make_step: ``(config, model, adapted, key, mesh=..., total_steps=...)``, what it
            then makes: the second, third and last of what it returns are the state,
            the frozen tree and the step of ``training.compile_step``.
        target: of ``training.find_target``, or its name; ``None``: this computer.
        slices: as of ``training.find_target``.
        num_labels: the width of a classification head, 1 of a regression's, where the
            rows alone tell it; ``None``: 2, and the estimate's notes say so.

    Returns:
        The estimate.

    Raises:
        ValueError: there is no such machine; the mesh, the batch or the heads do not
            fit each other; or a field is wrong. Before anything is compiled.
        ImportError: libtpu is needed, and is not installed.

    Example:
        ``estimate(config, target="v5e:2x2", attach=train.attach_all,
        make_step=train.make_step).peak``, of the project's ``train.py``.
    """
    if not isinstance(target, Target):
        target = find_target(target, slices=slices)
    step, arguments, mesh, notes = _assembled(
        config, attach, make_step, target.devices, num_labels
    )
    return estimate_step(step, *arguments, mesh=mesh, target=target, notes=notes)


def step_flops(
    config: ml_collections.ConfigDict,
    *,
    attach: Attach,
    make_step: MakeStep,
    num_labels: int | None = None,
    stage: int = 0,
) -> float:
    """Counts the FLOPs of the matmuls in a config's step, which is traced alone.

    They are counted as written, on all devices together, before a compiler leaves
    anything out or computes it twice; the rows are as long as ``config.lengths``
    allows.

    Args:
        config: as for ``estimate``.
        attach: the same.
        make_step: the same.
        num_labels: the same.
        stage: of ``config.stages``, which one's step is meant; experts that stages
            before it train are there.

    Returns:
        The count.

    Raises:
        ValueError: as of ``estimate``.
    """
    devices = find_target(None).devices
    step, arguments, _, _ = _assembled(
        config, attach, make_step, devices, num_labels, stage
    )
    return hlo.traced_flops(step.trace(*arguments).jaxpr)


def _assembled(config, attach, make_step, devices, num_labels: int | None, stage=0):
    """``(step, (state, frozen, batch), mesh, notes)`` of a config, as shapes."""
    check_fields(config)
    staged: tuple[str, ...] = ()
    if config.stages:
        staged = (f"of the stages the first, {config.stages[0]!r}",)
        whole, config = config, stage_config(config, stage, Path()).unlock()
        config.start = whole.start  # what the stage before it saves may not be there
        check_fields(config.lock())
        attach = _entered(attach, whole.stages[:stage])
    mesh = call(make_mesh, config.mesh.to_dict(), "mesh", devices=devices)
    form, notes = _form(config, num_labels)
    notes += staged
    _check_rows(config, mesh)
    config = _with_dtype(config)
    classes = form.num_labels if form.head == "classification" else None
    model = outline(config, head=form.head, num_labels=classes)
    check_heads(model.config, mesh)
    with said_of("mesh"):
        check_tokens(model, mesh, *config.lengths)
    if config.ranks.before and not _is_file(config):
        notes += ("ranks found before training are not known: config.adapter's",)
    total_steps = count_steps(config.train_for, LONG, field="train_for")
    adapted = _adapted(config, model, attach)
    key = jax.eval_shape(lambda: jax.random.key(0))
    made = make_step(config, model, adapted, key, mesh=mesh, total_steps=total_steps)
    shapes = form.batch(
        config.batch_size,
        max(config.lengths),
        types=getattr(model.config, "type_vocab_size", 0) > 1,
        num_labels=classes or 1,
    )
    where = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes
    )
    return made[-1], (made[1], made[2], batch), mesh, notes


def _is_file(config: ml_collections.ConfigDict) -> bool:
    setting = config.ranks.before
    return isinstance(setting, str) and Path(setting).is_file()


def _form(config, num_labels: int | None) -> tuple[data.TaskOutline, tuple[str, ...]]:
    """The task's form, and what had to be assumed of it."""
    with said_of("data"):
        form = data.outline(config.data)
    if form.head == "causal_lm":
        return form, ()
    if num_labels is not None:
        head = "regression" if num_labels == 1 else "classification"
        return form._replace(head=head, num_labels=num_labels), ()
    if form.num_labels is not None:
        return form, ()
    note = f"a head of {ASSUMED_LABELS} classes: the rows alone tell how many"
    return form._replace(num_labels=ASSUMED_LABELS), (note,)


def _check_rows(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    rows, accumulate = config.batch_size, config.accumulate
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * accumulate):
        raise ValueError(
            f"`config.batch_size` {rows} cannot be cut into accumulate={accumulate} "
            f"micro-batches over {shards} shards (data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}); write a multiple of {shards * accumulate}."
        )


def check_heads(model_config: Any, mesh: Mesh) -> None:
    """Raises where the mesh would cut through the heads of an attention.

    Args:
        model_config: sizes of the model, ``model.config``.
        mesh: the mesh.

    Raises:
        ValueError: the tensor axis does not divide the heads.
    """
    tensor = mesh.shape["tensor"]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model_config, name, None)
        if heads and heads % tensor:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"`config.mesh.tensor` {tensor} does not divide the model's {heads} "
                f"heads ({name}); write one of {fits}."
            )


def _with_dtype(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with the dtype that the model's files would have, where it has none.

    A ``config.json`` says it under one of two names; it is float32 where it does not.
    """
    if config.model.param_dtype is not None:
        return config
    with said_of("model.name"):
        folder = models.find_checkpoint(config.model.name, weights=False)
        raw = models.read_model_config(folder)
    inner = raw.get("text_config") or {}
    found = [one.get(n) for one in (raw, inner) for n in ("dtype", "torch_dtype")]
    changed = config.copy_and_resolve_references().unlock()
    with changed.model.ignore_type():
        changed.model.param_dtype = next(filter(None, found), "float32")
    return changed.lock()


def _entered(attach: Attach, before: tuple[str, ...]) -> Attach:
    """``attach``, and then one stage after the other, to the config's own."""

    def attached(config, *given):
        def at(name):
            known = config.copy_and_resolve_references().unlock()
            known.stage = name
            return known.lock()

        first, *others = (*before, config.stage)
        adapted = attach(at(first), *given)
        for name in others:
            adapted = enter_stage(adapted, at(name))
        return adapted

    return attached


def _adapted(config: ml_collections.ConfigDict, model: Any, attach: Attach) -> Any:
    """The adapted tree of a config, as shapes."""
    params = abstract_params(config, model)
    ranks = stated_ranks(config, model, params)
    made = []

    def make() -> None:  # here keys are traced: they need no program
        keys = jax.random.split(jax.random.key(0))
        made.append(attach(config, model, params, keys, ranks))

    if config.start:  # a saved adapter draws nothing, and its values are looked at
        make()
    else:
        jax.eval_shape(make)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, made[0])


def fit(
    config: ml_collections.ConfigDict,
    *,
    target: str | Target | None = None,
    slices: int = 1,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> list[Try]:
    """Looks for changes of a config with which its step fits a machine.

    Tried in this order, each on top of those before it: what a layer keeps for its
    backward pass (``model.remat``), micro-batches (``accumulate``, so that each device
    has fewer rows at a time), the axes of the mesh, of which the sum of devices stays
    (``sequence`` where rows have 8,192 tokens or more), and last a base of 4 bits
    (``model.quantise``), which alone changes what is computed. Rows, lengths and the
    adapter are left alone: they are what is trained.

    Args:
        config: as for ``estimate``.
        target: as for ``estimate``.
        slices: as for ``estimate``.
        tell: is told what is tried, and why something cannot be.
        **options: ``attach``, ``make_step`` and ``num_labels`` of ``estimate``.

    Returns:
        What was tried, in order; the first is the config as it is, the last fits, or
        else nothing does.

    Raises:
        ValueError: as ``estimate``.
    """
    if not isinstance(target, Target):
        target = find_target(target, slices=slices)
    tried: list[Try] = []
    for changes in _changes(config, len(target.devices)):
        changed = _changed(config, changes)
        try:
            found = estimate(changed, target=target, **options)
        except ValueError as error:  # a split that the model's heads do not allow
            if not changes:
                raise
            tell(f"{as_flags(changes)}: {error}")
            continue
        tried.append(Try(changes, found))
        tell(f"{as_flags(changes) or 'as it is'}: {found.peak / 2**30:.2f} GiB")
        if found.fits:
            break
    return tried


def as_flags(changes: dict[str, Any]) -> str:
    """Returns changes of a config as they stand on a command line.

    Example:
        >>> as_flags({"model.remat": "full", "accumulate": 2})
        '--config.model.remat=full --config.accumulate=2'
    """
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def _changed(config: ml_collections.ConfigDict, changes: dict[str, Any]):
    changed = config.copy_and_resolve_references().unlock()
    for name, value in changes.items():
        *parents, last = name.split(".")
        holder = changed
        for parent in parents:
            holder = holder[parent]
        with holder.ignore_type():
            holder[last] = value
    return changed.lock()


def _changes(config, devices: int) -> Iterator[dict[str, Any]]:
    yield {}
    changes: dict[str, Any] = {}
    known = REMATS.index(config.model.remat) if config.model.remat in REMATS else 0
    for remat in REMATS[known + 1 :]:
        changes["model.remat"] = remat
        yield dict(changes)
    axes = ("data", "fsdp", "sequence", "tensor")
    sizes = {name: config.mesh.get(name, 1) for name in axes}
    rest = devices // max(1, math.prod(n for n in sizes.values() if n > 0))
    sizes = {name: rest if n == -1 else n for name, n in sizes.items()}
    for accumulate in _micro_batches(config, sizes["data"] * sizes["fsdp"]):
        changes["accumulate"] = accumulate
        yield dict(changes)
    long = max(config.lengths) >= LONG_ROW
    splits = [(tensor, sizes["sequence"]) for tensor in (1, 2, 4, 8)]
    splits += [(sizes["tensor"], sequence) for sequence in (2, 4, 8, 16) if long]
    for tensor, sequence in splits:
        fsdp = devices // (tensor * sequence)
        mesh = {"mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        if sequence != sizes["sequence"]:
            mesh["mesh.sequence"] = sequence
        same = all(sizes[name.partition(".")[2]] == n for name, n in mesh.items())
        less = tensor < sizes["tensor"] or sequence < sizes["sequence"]
        if devices % (tensor * sequence) or less or same:
            continue
        if config.batch_size % (fsdp * config.accumulate):
            continue
        most = max(_micro_batches(config, fsdp), default=config.accumulate)
        yield {**changes, "accumulate": most, **mesh}
    if config.model.quantise is None:
        yield {**changes, "model.quantise": "nf4"}


def _micro_batches(config, shards: int) -> list[int]:
    """Larger numbers of micro-batches that the rows of a shard allow, each twice."""
    found, accumulate = [], config.accumulate * 2
    while config.batch_size % (shards * accumulate) == 0:
        found.append(accumulate)
        accumulate *= 2
    return found
