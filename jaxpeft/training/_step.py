"""What a step is made of: the model, losses, the gradient, one compiled function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from jaxpeft import numerics
from jaxpeft.training._mesh import (
    BATCH_AXES,
    batch_sharding,
    check_tokens,
    replicated,
)
from jaxpeft.training._routed import call_adapted
from jaxpeft.training._state import TrainState
from jaxpeft.tree import combine

Batch = Mapping[str, jax.Array]
Forward = Callable[[Any, Batch, Any], tuple[Any, dict[str, Any]]]
Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
LossFn = Callable[[Any, Any, Batch, "StepKeys"], tuple[jax.Array, ...]]


def model_forward(model: Any, *, mesh: Mesh, dropout: bool = False) -> Forward:
    """Returns the function that runs an adapted tree of a classifier's parameters.

    Args:
        model: a Linen module called as ``apply({"params": params}, input_ids,
            attention_mask, token_type_ids=..., deterministic=...)``.
        mesh: the mesh.
        dropout: whether the model's own dropout is on in training steps. Evaluation
            is always without.

    Returns:
        ``forward(adapted, batch, key) -> (logits, seen)``, for a loss and for
        ``eval_step``; ``key`` is ``None`` in evaluation. What is seen is by site what
        its router says of the rows (``numerics.routing_sums``), for
        ``mixtures.auxiliary``; empty where adapters have none.

    Raises:
        ValueError: the mesh cuts tokens, and the model cannot have it
            (``check_tokens``); when called, also for the rows' length.
    """
    check_tokens(model, mesh)

    def forward(adapted, batch, key):
        deterministic = key is None or not dropout

        def apply(params, inputs, rngs):
            return apply_model(
                model, params, inputs, mesh=mesh, deterministic=deterministic, rngs=rngs
            )

        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        rngs = {} if deterministic else {"dropout": key}
        return call_adapted(apply, adapted, batch, inputs, rngs)

    return forward


def apply_model(
    model: Any,
    params: Any,
    inputs: Batch,
    *,
    mesh: Mesh,
    deterministic: bool,
    rngs: Mapping[str, Any],
) -> Any:
    """Runs a model; what each of its modules returns keeps its rows where they are.

    Left alone, the compiler may cut features in place of rows, because frozen kernels
    are cut too (``param_specs``), and hold the whole batch on every device. The model
    finds the mesh in context: a kernel such as splash attention needs it.
    """
    rows, tokens = inputs["input_ids"].shape[:2]
    check_tokens(model, mesh, tokens)

    def keep_rows(x):
        if getattr(x, "ndim", 0) < 2 or x.shape[0] != rows:
            return x
        free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        where = NamedSharding(mesh, PartitionSpec(BATCH_AXES, *free))
        return jax.lax.with_sharding_constraint(x, where)

    def intercept(method, args, kwargs, context):
        outputs = method(*args, **kwargs)
        if context.method_name != "__call__":
            return outputs
        return jax.tree.map(keep_rows, outputs)

    with in_context(mesh), nn.intercept_methods(intercept):
        return model.apply(
            {"params": params}, **inputs, deterministic=deterministic, rngs=rngs
        )


def in_context(mesh: Mesh) -> Any:
    """Where a model finds the mesh while it is traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def cross_entropy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of classification, row by row.

    Args:
        logits: ``[rows, classes]``.
        batch: with ``"label"`` (int, ``[rows]``), ``"weight"`` (float, ``[rows]``), and
            where not every class is open to every row ``"label_mask"`` (bool,
            ``[rows, classes]``): the others have probability 0 and no gradient.

    Returns:
        ``(values, weights)``, both float32 ``[rows]``: minus the log-probability of
        each label, and the rows' weights.

    Raises:
        ValueError: labels that are not integers, or logits of another form.
    """
    label = batch["label"]
    if not jnp.issubdtype(label.dtype, jnp.integer) or logits.ndim != label.ndim + 1:
        raise ValueError(
            "cross_entropy needs logits [rows, classes] and integer labels [rows], got "
            f"{logits.shape} and {label.dtype} {label.shape}; for numbers as labels "
            "take training.squared_error"
        )
    logits = logits.astype(jnp.float32)
    if "label_mask" in batch:
        logits = jnp.where(batch["label_mask"], logits, -jnp.inf)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return values, batch["weight"]


def squared_error(predictions: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of regression, row by row.

    Args:
        predictions: ``[rows]`` or ``[rows, 1]``.
        batch: with ``"label"`` (float, ``[rows]``) and ``"weight"``.

    Returns:
        ``(values, weights)``, both float32 ``[rows]``: squared differences, weights.

    Raises:
        ValueError: predictions of another form.
    """
    label = batch["label"].astype(jnp.float32)
    if predictions.size != label.size:
        raise ValueError(
            f"squared_error needs one prediction a row, got {predictions.shape} for "
            f"{label.shape} labels; load the model with head='regression'"
        )
    difference = predictions.astype(jnp.float32).reshape(label.shape) - label
    return jnp.square(difference), batch["weight"]


class StepKeys(NamedTuple):
    """The keys of one micro-batch, for ``with_dropout`` and the model.

    Attributes:
        adapter: for dropout on inputs of adapters.
        leaves: for methods that drop entries of their own leaves; the same in all
            micro-batches of a step.
        model: for the model's own dropout.
    """

    adapter: Key[Array, ""]
    leaves: Key[Array, ""]
    model: Key[Array, ""]


def loss_and_gradient(
    loss_fn: LossFn,
    penalty: Callable[[Any], jax.Array],
    *,
    mesh: Mesh,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[dict[str, jax.Array], Any]]:
    r"""Returns the function that takes a step's loss and its gradient.

    .. math:: L = \frac{\sum_i w_i \ell_i}{\sum_i w_i} + \text{penalty}

    Sums run over the whole batch, whatever ``accumulate`` and the mesh are, so rows
    of weight 0 are as if they were not there. The penalty of the leaves is no sum over
    rows and is taken once a step. What ``loss_fn`` returns beside its rows (the
    routers' balance) is none either, but is of each micro-batch: of these the weighted
    mean is taken.

    Args:
        loss_fn: ``(trainable, frozen, batch, keys) -> (values, weights, auxiliary)``:
            of a micro-batch, with ``StepKeys``. Values and weights are float32 of equal
            shapes, one entry a row, or a token; ``auxiliary`` is a scalar that is added
            to the loss.
        penalty: of an adapted tree, ``jaxpeft.penalty``.
        mesh: the mesh.
        accumulate: cut the batch into so many micro-batches, run one after another.
        clip_norm: the largest global norm of the gradient; ``None``: no clipping.

    Returns:
        ``gradient(state, frozen, batch) -> (losses, grads)``, for ``compile_step``.
        Losses are float32 scalars: ``loss`` (the task's), ``penalty`` (with the
        auxiliary), ``total``, ``grad_norm`` (before clipping) and ``weight`` (the sum
        of weights; where that is 0, the task's loss and gradient are 0). Gradients are
        of the total, clipped.

    Raises:
        ValueError: ``accumulate`` or ``clip_norm`` is out of range; when called, a
            batch that ``accumulate`` times the mesh does not divide.

    Example:
        See ``compile_step``.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1, got {accumulate}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(
            f"`clip_norm` must be positive, or None for no clipping; got {clip_norm}"
        )

    def summed(trainable, frozen, batch, key, leaves_key):
        adapter_key, model_key = jax.random.split(key)
        keys = StepKeys(adapter_key, leaves_key, model_key)
        values, weights, auxiliary = loss_fn(trainable, frozen, batch, keys)
        weight = jnp.sum(weights)
        value = jnp.sum(numerics.where_shown(weights, values) * weights)
        return value + auxiliary * weight, (weight, auxiliary * weight)

    task_grad = jax.value_and_grad(summed, has_aux=True)

    def accumulated(trainable, frozen, batch, key, leaves_key):
        """The sums over all micro-batches: loss, weight, gradient."""

        def body(sums, part):
            number, micro = part
            (value, parts), grads = task_grad(
                trainable, frozen, micro, jax.random.fold_in(key, number), leaves_key
            )
            return jax.tree.map(jnp.add, sums, (value, parts, grads)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        parts = jax.tree.map(lambda x: _micro_batches(x, accumulate, mesh), batch)
        numbers = jnp.arange(accumulate, dtype=jnp.uint32)
        sums, _ = jax.lax.scan(body, (zero, (zero, zero), zeros), (numbers, parts))
        return sums

    def gradient(state, frozen, batch):
        trainable = state.trainable
        key = jax.random.fold_in(state.key, state.step)
        # What drops entries of its own leaves does so once a step: apart from the
        # micro-batches' keys, whose numbers are small.
        leaves_key = jax.random.fold_in(key, np.uint32(2**32 - 1))
        inputs = (trainable, frozen, batch, key, leaves_key)
        if accumulate == 1:
            (value, parts), grads = task_grad(*inputs)
        else:
            value, parts, grads = accumulated(*inputs)
        weight, auxiliary = parts
        divisor = jnp.where(weight == 0, 1.0, weight)  # 0, and not nan
        own, own_grads = jax.value_and_grad(lambda t: penalty(combine(t, frozen)))(
            trainable
        )
        grads = jax.tree.map(
            lambda g, p: g / divisor.astype(g.dtype) + p, grads, own_grads
        )
        value, auxiliary = (value - auxiliary) / divisor, auxiliary / divisor
        penalties = own + auxiliary
        norm = optax.tree.norm(grads)
        if clip_norm is not None:
            scale = clip_norm / jnp.maximum(norm, clip_norm)
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        losses = {
            "loss": value,
            "penalty": penalties,
            "total": value + penalties,
            "grad_norm": norm,
            "weight": weight,
        }
        return losses, grads

    return gradient


def compile_step(
    update: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    frozen: Any,
    *,
    mesh: Mesh,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]:
    """Compiles (at its first call) one update of the trainable leaves.

    Args:
        update: ``(state, frozen, batch) -> (state, metrics)``, pure.
        state: the state, or its shapes (``init_state``); its shardings are kept.
        frozen: the second half of ``jaxpeft.partition`` of a tree on the mesh, or
            its shapes.
        mesh: the mesh.

    Returns:
        ``step(state, frozen, batch) -> (state, metrics)``, a ``jax.jit`` object.
        ``state`` is donated: its arrays are gone after the call. ``batch`` comes from
        ``put_batch``. Metrics stay on the device.

    Example:
        >>> import jaxpeft as jp
        >>> from jaxpeft import training
        >>> mesh = training.make_mesh(devices=jax.devices()[:1])
        >>> params = {"w": {"kernel": jnp.ones((3, 2))}}
        >>> adapted = jp.attach(params, jp.lora(1), ["w"], key=jax.random.key(0))
        >>> adapted = training.place(adapted, mesh, training.param_specs(params, mesh))
        >>> trainable, frozen = jp.partition(adapted)
        >>> optimizer = training.adamw(trainable, total_steps=9, learning_rate=0.1)
        >>> key = jax.random.key(1)
        >>> state = training.init_state(trainable, optimizer, key=key, mesh=mesh)
        >>> forward = jp.adapt(lambda params, x: x @ params["w"]["kernel"])
        >>> def loss_fn(trainable, frozen, batch, keys):
        ...     y = forward(jp.combine(trainable, frozen), batch["x"])
        ...     return jnp.sum(y**2, 1), batch["weight"], 0.0  # no routers
        >>> gradient = training.loss_and_gradient(loss_fn, jp.penalty, mesh=mesh)
        >>> def update(state, frozen, batch):
        ...     losses, grads = gradient(state, frozen, batch)
        ...     down = lambda x, g: x - 0.1 * g
        ...     trainable = jax.tree.map(down, state.trainable, grads)
        ...     made = (grads, trainable, state.opt_state)
        ...     return training.advance(state, losses, *made), losses
        >>> step = training.compile_step(update, state, frozen, mesh=mesh)
        >>> batch = training.put_batch({"x": np.ones((4, 3), np.float32)}, mesh)
        >>> state, losses = step(state, frozen, batch)
        >>> int(state.step), float(losses["loss"])
        (1, 18.0)
    """
    where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(
        update,
        in_shardings=(where(state), where(frozen), batch_sharding(mesh)),
        out_shardings=(where(state), replicated(mesh)),
        donate_argnums=0,
    )


def _micro_batches(column, accumulate: int, mesh: Mesh):
    """``[rows, ...]`` as ``[accumulate, rows / accumulate, ...]``."""
    rows = column.shape[0]
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    if rows % (accumulate * shards):
        raise ValueError(
            f"a batch of {rows} rows cannot be cut into accumulate={accumulate} "
            f"micro-batches over {shards} shards; take a multiple of "
            f"{accumulate * shards}"
        )
    # Every accumulate-th row makes a micro-batch, so that each device already holds
    # its share of every one and nothing moves between devices.
    parts = column.reshape(rows // accumulate, accumulate, *column.shape[1:])
    spec = PartitionSpec(None, BATCH_AXES)
    return jax.lax.with_sharding_constraint(
        jnp.moveaxis(parts, 1, 0), NamedSharding(mesh, spec)
    )
