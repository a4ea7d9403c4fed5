"""AdamW for adapted trees: schedules, groups of learning rates, decay by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft.tree import IN, OUT, AdaptedKernel, is_node, leaf_axes

# Rates, decays and moments are float32 numbers.
MOST = float(jnp.finfo(jnp.float32).max)
LEAST = float(jnp.finfo(jnp.float32).tiny)

Schedule = Callable[[jax.Array], jax.Array]

# The groups of learning rates.
ADAPTER, FAST, EMBEDDING, HEAD = "adapter", "adapter_fast", "embedding", "head"

# What a leaf that is trained whole is, by its own name in the model: "down" for a
# matrix, "vector" for what is never decayed.
PARAMETER_KINDS: dict[str, str] = {
    "kernel": "down",
    "weight": "down",
    "w": "down",
    "embedding": "down",
    "bias": "vector",
    "b": "vector",
    "scale": "vector",
}


class Optimizer(NamedTuple):
    """An optimiser and what it is made of.

    Attributes:
        transform: the optax transformation of the trainable tree's gradients.
        schedules: for each group of learning rates, the rate as a function of the
            number of updates done.
    """

    transform: optax.GradientTransformation
    schedules: dict[str, Schedule]

    def rates(self, step: Any) -> dict[str, Any]:
        """Returns ``{"learning_rate/<group>": rate}`` after ``step`` updates."""
        return {f"learning_rate/{n}": rate(step) for n, rate in self.schedules.items()}


def schedule(
    kind: str,
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    final_ratio: float = 0.0,
) -> Schedule:
    r"""Returns a learning-rate schedule with linear warm-up.

    .. math::
        \eta(t) = \eta \cdot \begin{cases}
            (t + 1) / (w + 1) & t < w \\
            \rho + (1 - \rho)\, f\big((t - w) / (T - w)\big) & t \ge w
        \end{cases}

    with :math:`f(u) = 1`, :math:`1 - u` or :math:`(1 + \cos \pi u) / 2`. The first
    update is at :math:`\eta / (w + 1)` and the last one still moves.

    Args:
        kind: what follows the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"``.
        peak: the highest rate.
        total_steps: the number of updates, ``T``.
        warmup_steps: the number of updates below the peak, ``w``.
        final_ratio: the rate at ``T`` over the peak, ``rho``; without effect for
            ``"constant"``.

    Returns:
        A function of the number of updates done, ``t`` (an integer scalar), to a
        float32 scalar.

    Raises:
        ValueError: an unknown kind, a negative rate, or a warm-up that leaves no
            step after it.

    Example:
        >>> rate = schedule("linear", 1.0, total_steps=4)
        >>> [float(rate(t)) for t in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    shapes = {
        "constant": lambda u: jnp.ones_like(u),
        "linear": lambda u: 1.0 - u,
        "cosine": lambda u: 0.5 * (1.0 + jnp.cos(jnp.pi * u)),
    }
    if kind not in shapes:
        raise ValueError(f"`schedule` must be one of {sorted(shapes)}, got {kind!r}")
    if not 0 <= peak < math.inf:
        raise ValueError(f"`peak` must be finite and not negative, got {peak}")
    if total_steps < 1:
        raise ValueError(f"`total_steps` must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"`warmup_steps` must be at least 0 and below the {total_steps} steps of "
            f"the run, got {warmup_steps}"
        )
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"`final_ratio` must be between 0 and 1, got {final_ratio}")

    def rate(step):
        t = jnp.asarray(step).astype(jnp.float32)
        rise = (t + 1.0) / (warmup_steps + 1.0)
        u = jnp.clip((t - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        fall = shapes[kind](u)
        if kind != "constant":
            fall = final_ratio + (1.0 - final_ratio) * fall
        return peak * jnp.where(t < warmup_steps, rise, fall)

    return rate


def adamw(
    trainable: Any,
    *,
    total_steps: int,
    learning_rate: float,
    head_learning_rate: float | None = None,
    schedule: str = "linear",
    warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    final_ratio: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    lora_plus_ratio: float | None = None,
    embedding_learning_rate: float | None = None,
    leaf_kinds: Mapping[str, str] | None = None,
) -> Optimizer:
    """Returns AdamW (arXiv 1711.05101) with the rates and the decay of adapters.

    Groups of learning rates: ``"head"`` (leaves trained whole, where
    ``head_learning_rate`` is given), ``"embedding"`` (factors at embedding tables,
    where they have a rate of their own), ``"adapter_fast"`` (with
    ``lora_plus_ratio``: the up-projections and every vector) and ``"adapter"`` (the
    rest). Only matrices are decayed: never biases, norms, sigmas or magnitudes.

    Args:
        trainable: the first half of ``jaxpeft.partition``; arrays or shapes.
        total_steps: the number of updates of the whole run.
        learning_rate: the peak rate.
        head_learning_rate: the peak rate of leaves trained whole (``jaxpeft.full``);
            ``None`` treats them like the rest.
        schedule: what follows the warm-up: ``"constant"``, ``"linear"`` or
            ``"cosine"`` (see ``training.schedule``).
        warmup_steps: updates below the peak rate; or
        warmup_ratio: the same as a share of ``total_steps``, rounded up. Neither: 0.
        final_ratio: the last rate over the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices, multiplied by the group's rate.
        lora_plus_ratio: LoRA+ (arXiv 2402.12354): the rate of up-projections and
            vectors over that of down-projections, at least 1; ``None``: equal rates.
        embedding_learning_rate: the peak rate of factors at embedding tables.
            ``None``: 1e-6 with ``lora_plus_ratio`` (as in HF PEFT), else
            ``learning_rate``.
        leaf_kinds: kinds (``"down"``, ``"up"``, ``"vector"``) by name, of leaves of the
            model that are trained whole and that ``PARAMETER_KINDS`` does not know, or
            in place of what an adapter's leaf is by its axes: with one axis a vector,
            with the kernel's in or out axis last "up", else "down".

    Returns:
        An ``Optimizer`` for trees like ``trainable``.

    Raises:
        ValueError: an argument is out of range, nothing is trainable, or decay or
            LoRA+ meet a leaf whose name tells no kind.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, algorithm 2.
        Hayou, Ghosh and Yu, LoRA+, section 4.
    """
    if warmup_steps is not None and warmup_ratio is not None:
        raise ValueError(
            f"give `warmup_steps` ({warmup_steps}) or `warmup_ratio` ({warmup_ratio}), "
            "not both"
        )
    if warmup_ratio is not None:
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"`warmup_ratio` must be in [0, 1), got {warmup_ratio}")
        warmup_steps = min(-int(-total_steps * warmup_ratio // 1), total_steps - 1)
    _check_range(
        {
            "learning_rate": learning_rate,
            "head_learning_rate": head_learning_rate,
            "embedding_learning_rate": embedding_learning_rate,
            "weight_decay": weight_decay,
        },
        lambda x: 0 <= x <= MOST,
        f"from 0 to {MOST:.1e}, float32's largest",
    )
    betas = {"b1": b1, "b2": b2}
    _check_range(betas, lambda x: 0 <= x < 1, "at least 0 and below 1")
    # Smaller ones are 0 in float32, and a leaf without a gradient would become NaN.
    _check_range(
        {"eps": eps}, lambda x: LEAST <= x <= MOST, f"from {LEAST:.1e} to {MOST:.1e}"
    )
    _check_range(
        {"lora_plus_ratio": lora_plus_ratio},
        lambda x: 1 <= x <= MOST,
        "at least 1 (16 is usual)",
    )
    fast = learning_rate * (lora_plus_ratio or 1.0)
    _check_range(
        {"learning_rate` times `lora_plus_ratio": fast},
        lambda x: x <= MOST,
        f"at most {MOST:.1e}, float32's largest",
    )
    if not jax.tree.leaves(trainable):
        raise ValueError(
            "`trainable` has no leaves: attach an adapter first, and pass the first "
            "half of jaxpeft.partition(adapted)"
        )
    kinds = None
    if weight_decay or lora_plus_ratio is not None:
        kinds = _leaf_kinds(trainable, leaf_kinds or {})
    embedding = embedding_learning_rate
    if embedding is None and lora_plus_ratio is not None:
        embedding = 1e-6
    labels = _map_leaves(
        lambda node, name: _group(
            node,
            None if lora_plus_ratio is None else kinds[node.site.path, name],
            head_learning_rate is not None,
            embedding is not None,
        ),
        trainable,
    )
    peaks = {
        ADAPTER: learning_rate,
        FAST: learning_rate * (lora_plus_ratio or 1.0),
        EMBEDDING: embedding,
        HEAD: head_learning_rate,
    }
    used = sorted(set(jax.tree.leaves(labels)))
    rates = {
        group: _schedule(
            schedule,
            peaks[group],
            total_steps=total_steps,
            warmup_steps=warmup_steps or 0,
            final_ratio=final_ratio,
        )
        for group in used
    }
    steps = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if weight_decay:
        decayed = _map_leaves(
            lambda node, name: kinds[node.site.path, name] != "vector", trainable
        )
        steps.append(optax.add_decayed_weights(weight_decay, mask=decayed))
    by_group = {g: optax.scale_by_learning_rate(rate) for g, rate in rates.items()}
    steps.append(optax.partition(by_group, labels))
    return Optimizer(optax.chain(*steps), rates)


def _check_range(
    numbers: Mapping[str, float | None], fits: Callable[[float], bool], words: str
) -> None:
    """Raises unless numbers that are given lie in a range; NaN never does."""
    for name, value in numbers.items():
        if value is not None and not fits(value):
            raise ValueError(f"`{name}` must be {words}, got {value}")


_schedule = schedule  # the argument of `adamw` has the same name


def _map_leaves(f: Callable[[AdaptedKernel, str], Any], trainable: Any) -> Any:
    """A tree like ``trainable`` with ``f(node, leaf name)`` at its leaves."""

    def each(node):
        if not is_node(node):
            raise ValueError(
                "`trainable` has a leaf outside of an adapter; pass the first half of "
                "jaxpeft.partition(adapted)"
            )
        named = {
            n: None if x is None else f(node, n) for n, x in node.trainable.items()
        }
        return node.replace(trainable=named)

    return jax.tree.map(each, trainable, is_leaf=is_node)


def _whole(node: AdaptedKernel) -> bool:
    """Whether the node trains the leaf itself rather than factors beside it."""
    return node.adapter.where.leaf != "kernel"


def _leaf_kinds(trainable: Any, given: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """``{(site, leaf name): kind}`` of every trained leaf."""
    for name, kind in given.items():
        if kind not in ("down", "up", "vector"):
            raise ValueError(
                f"`leaf_kinds` says {kind!r} of {name!r}; kinds are 'down', 'up' and "
                "'vector'"
            )
    found, unknown = {}, set()

    def look(node, name):
        # A leaf trained whole has the adapter's word for a name; the model's own
        # name, the end of the path, is what tells a matrix from a bias.
        own, known = name, lambda: _kind_by_axes(node, name)
        if _whole(node):
            own = node.site.path.rpartition("/")[2]
            known = lambda: PARAMETER_KINDS.get(own)
        # An expert's leaf is called after it: "a.code" is an a.
        kind = given.get(own, given.get(own.partition(".")[0])) or known()
        if kind is None:
            unknown.add(own)
        found[node.site.path, name] = kind

    _map_leaves(look, trainable)
    if unknown:
        names = sorted(unknown)
        raise ValueError(
            f"weight decay and LoRA+ go by the names of leaves that are trained whole, "
            f"and {names} are unknown: write "
            f"leaf_kinds={dict.fromkeys(names, 'vector')!r} ('down' for a matrix that "
            "reads the input, 'up' for one that writes the output, 'vector' for what "
            "is never decayed)"
        )
    return found


def _kind_by_axes(node: AdaptedKernel, name: str) -> str:
    """What a leaf of one kernel is: a stack's layers are not counted as an axis."""
    rank = None if node.site.ranks is None else max(node.site.ranks)
    axes = leaf_axes(node.adapter, rank)[1][name]
    if len(axes) < 2:
        return "vector"
    return "up" if axes[-1] in (IN, OUT) else "down"


def _group(node: AdaptedKernel, kind: str | None, head: bool, embedding: bool) -> str:
    if node.adapter.where.leaf == "any":
        if head:
            return HEAD
    elif embedding and node.site.path.rpartition("/")[2] == "embedding":
        return EMBEDDING
    return FAST if kind in ("up", "vector") else ADAPTER
