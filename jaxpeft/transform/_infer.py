"""``infer_axes``: what a model does with each axis of its kernels, abstractly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpeft.numerics import is_quantised
from jaxpeft.transform import _compat
from jaxpeft.transform._evaluate import Evaluator
from jaxpeft.transform._moved import Kernel, NoRule
from jaxpeft.transform._rule import Equation, Uses
from jaxpeft.tree import (
    BATCH,
    IN,
    OUT,
    USES,
    Axes,
    Factors,
    is_node,
    is_whole,
    leaves_with_path,
)

_LAYER = "layer"
_TIED, _CONTRACTED, _LOOKED_UP, _ADDED, _OTHER = USES


class _Origins(str):
    """Stands where a kernel has a role: which axes of which leaves an axis comes from.

    Attributes:
        axes: ``(path, axis)`` of each of them.
    """

    axes: tuple[tuple[str, int], ...]

    def __new__(cls, axes):
        self = super().__new__(cls, tuple(axes))
        self.axes = tuple(axes)
        return self


@jax.tree_util.register_dataclass
class _Track(Kernel):
    """A kernel whose roles are still to be learnt: it has origins in their place."""

    @classmethod
    def of_leaf(cls, path: str, base) -> "_Track":
        names = tuple(_Origins([(path, i)]) for i in range(base.ndim))
        return cls(base, Factors(), None, None, None, names, path)

    @property
    def origins(self) -> tuple[_Origins, ...]:
        """What stands in place of roles."""
        return tuple(r for r in self.roles if isinstance(r, _Origins))

    def grown(self, role=None):
        return role or _Origins(())

    def regrouped(self, group, shape):
        # Split axes all come from all of the group; an axis of size one from nowhere.
        origins = _Origins(sum((self.roles[k].axes for k in group), ()))
        return [origins if n > 1 or len(shape) == 1 else _Origins(()) for n in shape]

    def check_stacked(self) -> None:
        """A loop may go over any axis; one that is gone at the end is a layer's."""

    def assigned(self, words, eqn: Equation, use=_CONTRACTED) -> Kernel:
        by_path: dict[str, dict[int, str]] = {}
        for origins, word in zip(self.origins, words, strict=True):
            for path, axis in origins.axes:
                by_path.setdefault(path, {}).setdefault(axis, word)
        for path, roles in by_path.items():
            eqn.uses.learnt.setdefault(path, []).append((use, roles))
        names = tuple(word if word in (IN, OUT) else BATCH for word in words)
        return Kernel.of(self).replace(names=names)

    def _words(self, ins, batch) -> list[str]:
        """In, batch, or out, for each axis."""
        axes = range(self.base.ndim)
        return [IN if i in ins else BATCH if i in batch else OUT for i in axes]

    def oriented(self, summed, batch, eqn: Equation) -> Kernel:
        """Summed axes are in, kept ones out, unless mapped over."""
        words = self._words(summed, batch)
        # ``vmap`` leaves no trace in the numbers where only the kernel is mapped.
        # A mapped axis that the input lacks is kept like an out axis. It stands in
        # front of the summed ones in the kernel, and the out axes behind them.
        order = sorted(range(len(words)), key=lambda i: self.origins[i].axes)
        if "vmap" in str(eqn.raw.source_info.name_stack):
            if words[order[0]] == OUT and words[order[-1]] == OUT:
                words[order[0]] = BATCH
        return self.assigned(words, eqn)

    def scaled(self, factor, f):
        if factor.size > 1 and factor.shape == self.base.shape:
            raise NoRule("it is multiplied along all of its axes")
        return super().scaled(factor, f)

    def beside(self, others, starts, axis, base):
        if sum(w.base.shape[axis] for w in (self, *others)) != base.shape[axis]:
            raise NoRule("leaves and what is computed are concatenated")  # activations
        roles = zip(*(w.roles for w in (self, *others)), strict=True)
        names = tuple(_Origins(sum((r.axes for r in each), ())) for each in roles)
        return self.replace(base=base, names=names)

    def is_table(self, axis, mapped) -> bool:
        # A matrix that is picked from is a table; what has more axes, a stack.
        return self.base.ndim - len(mapped) == 2

    def as_table(self, axis, mapped, eqn: Equation) -> Kernel:
        return self.assigned(self._words((axis,), mapped), eqn, _LOOKED_UP)


def _one_at_a_time(eqn: Equation, operands: list, reason: str) -> list:
    """An equation that no rule follows: what it says of each leaf by itself.

    Leaves meet where one scales the other, or where one is the other's input. A loop
    has said all that it has to say of each when it was walked through.
    """
    tracks = [i for i, x in enumerate(operands) if isinstance(x, Kernel)]
    arrays = [x.base if isinstance(x, Kernel) else x for x in operands]
    walked = any("jaxpr" in name or name == "branches" for name in eqn.params)
    found = None
    for i in tracks:
        try:
            if walked or len(tracks) == 1:
                raise NoRule(reason)
            outs = eqn.apply([*arrays[:i], operands[i], *arrays[i + 1 :]])
            found = found or outs
        except NoRule:
            added = eqn.raw.primitive.name in ("add", "add_any", "sub")
            use = _ADDED if added else _OTHER
            for path in {p for r in operands[i].roles for p, _ in r.axes}:
                eqn.uses.learnt.setdefault(path, []).append((use, {}))
    return found or eqn.results(eqn.run(*arrays))


def infer_axes(fn: Callable[..., Any], params: PyTree, *example_args: Any) -> Axes:
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
        hand it to ``attach(..., axes=)``. Its ``uses`` say of every leaf with two axes
        or more whether it is ``"contracted"`` with an input, ``"tied"``: contracted
        here and looked up there, only ``"looked up"``, only ``"added"``, or something
        ``"other"``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> def fn(p, ids):
        ...     x = p["table"][ids] + p["positions"]
        ...     return jnp.einsum("td,dhk->thk", x, p["w"])
        >>> shapes = dict(table=(9, 4), positions=(2, 4), w=(4, 2, 3))
        >>> params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        >>> axes = jp.infer_axes(fn, params, jnp.array([1, 2]))
        >>> axes
        {'table': 'in out', 'w': 'in out out'}
        >>> axes.uses
        {'positions': 'added', 'table': 'looked up', 'w': 'contracted'}
        >>> [path for path, use in axes.uses.items() if use == "contracted"]
        ['w']
    """
    named = leaves_with_path(params)
    args, treedef = jax.tree.flatten(example_args)
    arrays = [x for x in args if _is_shaped(x)]
    leaves = [_shape_of(x.base if is_node(x) else x) for _, x in named]
    structure = jax.tree.structure(params, is_leaf=is_whole)

    def flat_fn(leaves, arrays):
        values = iter(arrays)
        full = [next(values) if _is_shaped(x) else x for x in args]
        return fn(structure.unflatten(leaves), *treedef.unflatten(full))

    def walk(leaves, arrays):
        jaxpr, consts = _compat.opened(jax.make_jaxpr(flat_fn)(leaves, arrays))
        tracks = [
            _Track.of_leaf(path, x) if jnp.ndim(x) >= 2 else x
            for (path, _), x in zip(named, leaves, strict=True)
        ]
        Evaluator(_one_at_a_time)(jaxpr, consts, [*tracks, *arrays], uses)

    uses = Uses(None, "cpu")
    jax.eval_shape(walk, leaves, arrays)
    axes, used = {}, {}
    for (path, _), x in zip(named, leaves, strict=True):
        if np.ndim(x) < 2:
            continue
        seen = uses.learnt.get(path, [])
        found = {use for use, _ in seen}
        tied = {_CONTRACTED, _LOOKED_UP} <= found
        used[path] = _TIED if tied else min(found, key=USES.index, default=_OTHER)
        # A look-up says more than what else is done with a table.
        for _, roles in sorted(seen, key=lambda one: one[0] != _LOOKED_UP):
            # An axis that was gone before the use was gone over, or picked from.
            words = [roles.get(i, _LAYER) for i in range(np.ndim(x))]
            if {IN, OUT} <= set(words):
                axes[path] = " ".join(words)
                break
    return Axes(axes, used)


def _shape_of(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantised(x) else x


def _is_shaped(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
