"""``infer_axes``: what a model does with each axis of its kernels, abstractly."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jaxtyping import PyTree

from jaxpeft.transform import _compat
from jaxpeft.transform.rules._moves import ON_BASE, is_scalar
from jaxpeft.tree import IN, OUT, is_node, leaves_with_path

LAYER, DOT_BATCH, EXPERT = "layer", "batch", "expert"

# Equations whose bodies are entered with their operands as they are.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "shard_map",
)


@dataclasses.dataclass(frozen=True)
class _Track:
    """A kernel on its way: which original axes each present axis comes from.

    ``gone`` has the roles of the original axes that it has no more.
    """

    path: str
    axes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    gone: tuple[tuple[int, str], ...] = ()

    def take(self, order) -> "_Track":
        return dataclasses.replace(
            self,
            axes=tuple(self.axes[i] for i in order),
            shape=tuple(self.shape[i] for i in order),
        )

    def without(self, dropped, role: str) -> "_Track":
        """The kernel with some axes picked from, which gives them a role."""
        gone = tuple((original, role) for i in dropped for original in self.axes[i])
        kept = [i for i in range(len(self.shape)) if i not in dropped]
        return dataclasses.replace(self.take(kept), gone=self.gone + gone)


def infer_axes(
    fn: Callable[..., Any], params: PyTree, *example_args: Any
) -> dict[str, str]:
    """Reads the roles of kernels' axes off any model.

    The function is traced abstractly, so nothing is computed and shapes do. An axis
    is ``in`` where a contraction sums it or a look-up indexes it, ``out`` where the
    contraction keeps it, ``layer`` where a loop goes over it or an index picks from
    it, ``batch`` where it is a batch axis of the contraction or was mapped over, and
    ``expert`` in a ragged contraction. A table that is looked up and also multiplied
    (tied embeddings) keeps the roles of the look-up.

    Args:
        fn: the model, called as ``fn(params, *example_args)``.
        params: its parameters: arrays or ``jax.ShapeDtypeStruct``.
        *example_args: the other arguments: arrays, shapes, or static values.

    Returns:
        ``{path: "layer in out"}`` for each kernel whose every axis was seen in use;
        hand it to ``attach(..., axes=)``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> heads = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])
        >>> jp.infer_axes(heads, {"w": jnp.zeros((8, 2, 4))}, jnp.zeros((1, 8)))
        {'w': 'in out out'}
    """
    named = leaves_with_path(params)
    args, treedef = jax.tree.flatten(example_args)
    arrays = [x for x in args if _is_shaped(x)]
    leaves = [x.base if is_node(x) else x for _, x in named]
    structure = jax.tree.structure(params, is_leaf=is_node)

    def flat_fn(leaves, arrays):
        values = iter(arrays)
        full = [next(values) if _is_shaped(x) else x for x in args]
        return fn(structure.unflatten(leaves), *treedef.unflatten(full))

    jaxpr, _ = _compat.opened(jax.make_jaxpr(flat_fn)(leaves, arrays))
    tracks: list[_Track | None] = [
        _Track(path, tuple((i,) for i in range(np.ndim(x))), tuple(np.shape(x)))
        for (path, _), x in zip(named, leaves, strict=True)
    ]
    seen: dict[str, list[dict[int, str]]] = {}
    _walk(jaxpr, tracks + [None] * len(arrays), seen)
    result = {}
    for (path, _), x in zip(named, leaves, strict=True):
        for roles in seen.get(path, ()):
            words = [roles.get(i) for i in range(np.ndim(x))]
            if np.ndim(x) >= 2 and None not in words and {IN, OUT} <= set(words):
                result[path] = " ".join(words)
                break
    return result


def _is_shaped(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _walk(jaxpr, tracks: list, seen: dict) -> list:
    """Follows kernels through a jaxpr.

    Args:
        jaxpr: an open jaxpr.
        tracks: a track or ``None`` for each of its inputs.
        seen: gathers ``{path: [{original axis: role}]}`` of every use.

    Returns:
        A track or ``None`` for each output.
    """
    env: dict[Any, _Track] = {}

    def put(variables, values):
        for v, track in zip(variables, values, strict=True):
            if track is not None and not isinstance(v, jex.DropVar):
                env[v] = track

    put(jaxpr.invars, tracks)
    for eqn in jaxpr.eqns:
        operands = [
            None if isinstance(v, jex.Literal) else env.get(v) for v in eqn.invars
        ]
        if any(operands):
            put(eqn.outvars, _equation(eqn, operands, seen))
    return [None if isinstance(v, jex.Literal) else env.get(v) for v in jaxpr.outvars]


def _equation(eqn, operands: list, seen: dict) -> list:
    name, params = eqn.primitive.name, eqn.params
    lost: list = [None] * len(eqn.outvars)
    if name in _CALLS:
        body = params.get("jaxpr", params.get("call_jaxpr"))
        return _walk(_compat.opened(body)[0], operands, seen)
    if name == "scan":
        return _scan(eqn, operands, seen)
    if name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carry = operands[n + m :]
        test, _ = _compat.opened(params["cond_jaxpr"])
        step, _ = _compat.opened(params["body_jaxpr"])
        _walk(test, operands[:n] + carry, seen)
        return _walk(step, operands[n : n + m] + carry, seen)
    if name == "cond":
        for branch in params["branches"]:
            _walk(_compat.opened(branch)[0], operands[1:], seen)
        return lost
    if name == "optimization_barrier":
        return operands
    track = max((t for t in operands if t), key=lambda t: len(t.shape))
    if name in ON_BASE or name in ("neg", "rev"):
        return [track]
    if name in ("mul", "div"):
        other = eqn.invars[1 if operands[0] is track else 0]
        value = other.val if isinstance(other, jex.Literal) else other.aval
        return [track] if is_scalar(value) else lost
    if name == "dot_general":
        _dot(eqn, operands, seen)
        return lost
    if name == "ragged_dot_general" and operands[1]:
        _use(track, (EXPERT, IN, OUT), seen)
        return lost
    if name == "conv_general_dilated" and operands[1]:
        out = params["dimension_numbers"].rhs_spec[0]
        roles = tuple(OUT if i == out else IN for i in range(len(track.shape)))
        _use(track, roles, seen)
        return lost
    if name == "gather" and operands[0]:
        return [_gather(eqn, track, seen)]
    if operands[0] is None:
        return lost
    return [_moved(name, v.aval.shape, params, track) for v in eqn.outvars]


def _moved(name: str, shape, params, track: _Track) -> _Track | None:
    """The track behind an equation that moves a kernel about."""
    match name:
        case "transpose":
            return track.take(params["permutation"])
        case "squeeze":
            return track.without(params["dimensions"], LAYER)
        case "slice" | "dynamic_slice" | "split":
            return dataclasses.replace(track, shape=tuple(shape))
        case "broadcast_in_dim":
            where = list(params["broadcast_dimensions"])
            axes = tuple(
                track.axes[where.index(i)] if i in where else ()
                for i in range(len(shape))
            )
            return dataclasses.replace(track, axes=axes, shape=tuple(shape))
        case "reshape" if params.get("dimensions") is None:
            return _reshaped(track, tuple(shape))
        case "expand_dims":
            return _reshaped(track, tuple(shape))
    return None


def _reshaped(track: _Track, shape: tuple[int, ...]) -> _Track:
    axes: list[tuple[int, ...]] = []
    i = j = 0
    while i < len(track.shape) or j < len(shape):
        i0, j0 = i, j
        left = track.shape[i] if i < len(track.shape) else 1
        right = shape[j] if j < len(shape) else 1
        i, j = min(i + 1, len(track.shape)), min(j + 1, len(shape))
        while left != right:
            if left < right:
                left, i = left * track.shape[i], i + 1
            else:
                right, j = right * shape[j], j + 1
        group = sum((track.axes[k] for k in range(i0, i)), ())
        axes += [group if shape[k] > 1 or j - j0 == 1 else () for k in range(j0, j)]
    return dataclasses.replace(track, axes=tuple(axes), shape=shape)


def _use(track: _Track, roles: tuple[str, ...], seen: dict, first=False):
    """Records one use: the roles of the present axes and of those gone before."""
    use = dict(track.gone)
    for axes, role in zip(track.axes, roles, strict=True):
        for original in axes:
            use.setdefault(original, role)
    uses = seen.setdefault(track.path, [])
    uses.insert(0, use) if first else uses.append(use)


def _dot(eqn, operands, seen) -> None:
    """Summed axes are in, kept ones out, unless mapped over."""
    summed, batch = eqn.params["dimension_numbers"]
    mapped = "vmap" in str(eqn.source_info.name_stack)
    for side, track in enumerate(operands):
        if track is None:
            continue
        roles = [OUT] * len(track.shape)
        for i in batch[side]:
            roles[i] = DOT_BATCH
        for i in summed[side]:
            roles[i] = IN
        # A mapped axis that the input lacks is kept like an out axis. It stands in
        # front of the summed ones in the kernel, and the out axes behind them.
        order = sorted(range(len(roles)), key=lambda i: track.axes[i] or (-1,))
        words = [roles[i] for i in order]
        if mapped and words[0] == OUT and words[-1] == OUT:
            roles[order[0]] = DOT_BATCH
        _use(track, tuple(roles), seen)


def _gather(eqn, track: _Track, seen: dict) -> _Track | None:
    numbers = eqn.params["dimension_numbers"]
    axes = tuple(numbers.start_index_map)
    if len(axes) != 1 or tuple(numbers.collapsed_slice_dims) != axes:
        return None
    (axis,) = axes
    rest = [i for i in range(len(track.shape)) if i != axis]
    if len(rest) == 1:
        roles = tuple(IN if i == axis else OUT for i in range(2))
        _use(track, roles, seen, first=True)
        return None
    track = track.without((axis,), LAYER)
    shape = eqn.outvars[0].aval.shape
    offset = list(numbers.offset_dims)
    kept = tuple(
        track.axes[offset.index(i)] if i in offset else () for i in range(len(shape))
    )
    return dataclasses.replace(track, axes=kept, shape=tuple(shape))


def _scan(eqn, operands: list, seen: dict) -> list:
    params = eqn.params
    n, m = _compat.scan_counts(params)
    inside = list(operands[: n + m])
    for track in operands[n + m :]:
        inside.append(None if track is None else track.without((0,), LAYER))
    outs = _walk(_compat.opened(params["jaxpr"])[0], inside, seen)
    return outs[:m] + [None] * (len(outs) - m)
