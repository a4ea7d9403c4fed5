"""The state that a training step carries."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Key, PyTree

from jaxpeft.allocate import Allocation, Allocator
from jaxpeft.training._mesh import replicated
from jaxpeft.training._optimizer import Optimizer
from jaxpeft.tree import flat, unflat


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or what an update made of the leaves was not finite.

    Attributes:
        step: the number of the update (from 1) that was not applied.
    """

    def __init__(self, step: int, kept: str = ""):
        """See the class; ``kept`` is a sentence on what is left of the run."""
        self.step = step
        super().__init__(
            f"the loss, its gradient or the updated leaves were not finite at step "
            f"{step}; that update was not applied. {kept}{' ' if kept else ''}Lower "
            "the learning rate, lengthen the warm-up, or set `clip_norm`; a batch "
            "whose weights are all 0 does it too"
        )

    def keeping(self, latest: int | None) -> "NonFiniteError":
        """Returns the same error, which also says what is left of the run.

        Args:
            latest: the step of the last checkpoint, ``None`` where there is none.
        """
        if latest is None:
            return NonFiniteError(self.step, "No checkpoint had been saved before it.")
        return NonFiniteError(
            self.step, f"The last good checkpoint is kept, step {latest}."
        )


class TrainState(NamedTuple):
    """What changes from step to step; the frozen tree stays beside it.

    Attributes:
        trainable: the first half of ``jaxpeft.partition``.
        opt_state: the optimiser's state, laid out like its parameters.
        step: the number of updates done, an int32 scalar.
        key: the typed key of the run; each step folds its own number in.
        bad_step: the number (from 1) of the first update that was not finite, -1
            while there was none. From then on nothing changes any more.
        allocation: the state of what decides about ranks; empty without it.
    """

    trainable: PyTree
    opt_state: PyTree
    step: Int[Array, ""] | jax.ShapeDtypeStruct
    key: Key[Array, ""] | jax.ShapeDtypeStruct
    bad_step: Int[Array, ""] | jax.ShapeDtypeStruct
    allocation: PyTree = ()


def init_state(
    trainable: Any,
    optimizer: Optimizer,
    *,
    key: Any,
    mesh: Mesh,
    allocator: Allocator | None = None,
) -> TrainState:
    """Makes the state of step 0.

    Args:
        trainable: the first half of ``jaxpeft.partition`` of a tree on the mesh
            (``training.place``); arrays, or ``jax.ShapeDtypeStruct`` with shardings.
            Arrays are copied: the step may then give their memory away.
        optimizer: from ``training.adamw``.
        key: a typed key.
        mesh: the mesh.
        allocator: what decides about ranks, such as ``allocate.importance``.

    Returns:
        The state; moments and scores lie where their parameters lie. Abstract if
        ``trainable`` is.

    Raises:
        ValueError: a leaf is not on the mesh.
        TypeError: the key is not a typed key.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError("`key` must be a typed key: write jax.random.key(seed)")
    for path, leaf in flat(trainable).items():
        where = getattr(leaf, "sharding", None)
        if not isinstance(where, NamedSharding) or where.mesh != mesh:
            raise ValueError(
                f"leaf {path!r} of `trainable` is not on the mesh; write "
                "adapted = training.place(adapted, mesh, specs) before "
                "jaxpeft.partition"
            )
    where = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    whole = replicated(mesh)

    def init(trainable, key):
        # A copy: a leaf trained whole may share its buffer with the frozen base.
        copied = jax.tree.map(jnp.copy, trainable)
        zero = jnp.zeros((), jnp.int32)
        with jax.numpy_dtype_promotion("standard"):
            opt_state = optimizer.transform.init(trainable)
        ranks = () if allocator is None else allocator.init(trainable)
        return TrainState(copied, opt_state, zero, key, zero - 1, ranks)

    shapes = jax.eval_shape(init, trainable, key)
    state_where = TrainState(
        where,
        optax.tree_utils.tree_map_params(
            optimizer.transform.init,
            lambda _, sharding: sharding,
            shapes.opt_state,
            where,
            transform_non_params=lambda _: whole,
        ),
        *(whole,) * 3,
        _beside(shapes.allocation, where, whole),
    )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(trainable)):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            state_where,
        )
    return jax.jit(init, out_shardings=state_where)(trainable, key)


def _beside(allocation: Any, where: Any, whole: NamedSharding) -> Any:
    """Shardings of trees that are named as the trainable leaves are, as theirs."""
    mine = flat(where)
    named = {n: mine.get(n.partition("/")[2], whole) for n in flat(allocation)}
    return unflat(allocation, named)


def advance(
    state: TrainState,
    losses: Mapping[str, jax.Array],
    grads: Any,
    trainable: Any,
    opt_state: Any,
    *,
    allocator: Allocator | None = None,
) -> TrainState:
    """Returns the state after an update, or the same where something is not finite.

    If the loss, the gradient's norm or an updated leaf is not finite, or all weights
    are 0, so that nothing was learnt, nothing is changed but ``bad_step``, and nothing
    ever after: the state is good whenever it is saved, and no step waits for the host.
    ``check_finite`` raises when the host next looks.

    Args:
        state: the state before.
        losses: of ``loss_and_gradient``.
        grads: of ``loss_and_gradient``, what the optimiser was given.
        trainable: the leaves that the optimiser made.
        opt_state: its own new state.
        allocator: what decides about ranks (``allocate.importance``), the one that
            ``init_state`` was given. It sees the leaves before and after the update
            and its gradient, and may change them once more.

    Returns:
        The state, one step further; or the one before, with ``bad_step``.
    """
    ranks = state.allocation
    if allocator is not None:
        ranks, trainable = allocator.update(
            ranks, trainable, grads, state.step + 1, state.trainable
        )
    # A finite gradient may still overflow a leaf: a rate of 1e38 does.
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(trainable)]
    finite = jnp.isfinite(losses["total"]) & jnp.isfinite(losses["grad_norm"])
    finite &= jnp.stack(leaves).all() & (losses["weight"] != 0)
    good = finite & (state.bad_step < 0)
    keep = lambda new, old: jnp.where(good, new, old)
    bad_step = jnp.where(good | (state.bad_step >= 0), state.bad_step, state.step + 1)
    return TrainState(
        trainable=jax.tree.map(keep, trainable, state.trainable),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        step=state.step + good.astype(jnp.int32),
        key=state.key,
        bad_step=bad_step,
        allocation=jax.tree.map(keep, ranks, state.allocation),
    )


def decide(
    allocator: Allocator, state: TrainState, frozen: PyTree
) -> tuple[TrainState, Allocation]:
    """Calls what an allocator does on the host, after update ``allocator.settled``.

    Args:
        allocator: such as ``allocate.ggm``; one that has a ``decide``.
        state: the state of just that update; every process has the same.
        frozen: the other half of the tree, with the scales of its sites.

    Returns:
        ``(state, chosen)``; leaves lie where they lay.

    Raises:
        ValueError: it is another update, or the allocator has nothing to decide.
        NonFiniteError: an update so far was not finite.
    """
    if allocator.decide is None:
        raise ValueError("`allocator` has nothing to decide: it does all in the step")
    check_finite(state)
    if int(state.step) != allocator.settled:
        raise ValueError(
            f"`allocator` decides after update {allocator.settled}, and `state` is "
            f"that of update {int(state.step)}"
        )
    ranks, trainable, chosen = allocator.decide(
        state.allocation, state.trainable, frozen
    )
    return state._replace(allocation=ranks, trainable=trainable), chosen


def check_finite(state: TrainState) -> None:
    """Raises if some update so far was not finite; waits for one scalar.

    Args:
        state: the state.

    Raises:
        NonFiniteError: naming the step. The state is that of the last finite update.
    """
    if (step := int(state.bad_step)) >= 0:
        raise NonFiniteError(step)
