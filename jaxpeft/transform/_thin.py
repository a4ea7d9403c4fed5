"""What adapters read of an input: thin matmuls, one for all that can share it.

Two thin matmuls at each of q, k and v cost more time than their FLOPs, and a gate of
a few columns costs almost as much as a down-projection of many. So kernels that read
the same input share one product ``x [a_q | a_k | a_v | reads_q | ...]``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxpeft.numerics import where_shown
from jaxpeft.transform._moved import Kernel
from jaxpeft.tree import BATCH, Term, wider

HIGHEST = lax.Precision.HIGHEST


class Read(NamedTuple):
    """What one term has read of its input; ``None``: not yet, or nothing.

    Attributes:
        h: ``x a [..., r]``.
        seen: ``x reads [..., n]``, what its gate sees.
    """

    h: Any = None
    seen: Any = None


def labelled_dot(x, x_labels, w, w_labels, out_labels, precision=None, *, target=None):
    """Contracts labelled arrays: labels in both and not in ``out`` are summed.

    Args:
        x: an array.
        x_labels: a label for each of its axes.
        w: another.
        w_labels: the same.
        out_labels: the labels of the result.
        precision: of the contraction.
        target: the platform of a product that trains. XLA's compiler for CPUs lays
            out anew what sums over two axes, as the gradient of ``b`` does over rows:
            it writes a transposed copy of all of dY. So axes that go together are one
            axis there (and tall factors lie on their side, see ``_turned``). Other
            compilers need no help, and keep their programs.
    """
    joined = target == "cpu"
    sizes = dict(zip((*x_labels, *w_labels), (*x.shape, *w.shape), strict=True))
    # Each run of axes becomes one axis, under its first label.
    runs = {l: [l] for l in sizes}
    if joined:
        runs = _runs(list(x_labels), list(w_labels), list(out_labels))
    x_labels, w_labels = (
        [l for l in each if l in runs] for each in (x_labels, w_labels)
    )
    size = lambda first: math.prod(sizes[l] for l in runs[first])
    x, w = x.reshape(list(map(size, x_labels))), w.reshape(list(map(size, w_labels)))
    if joined:
        w, w_labels = _turned(w, w_labels, x_labels)
    both = [l for l in x_labels if l in w_labels]
    batch = [l for l in both if l in out_labels]
    summed = [l for l in both if l not in out_labels]
    y = lax.dot_general(
        x,
        w,
        (
            ([x_labels.index(l) for l in summed], [w_labels.index(l) for l in summed]),
            ([x_labels.index(l) for l in batch], [w_labels.index(l) for l in batch]),
        ),
        precision=precision,
        preferred_element_type=wider(x.dtype, w.dtype),
    )
    labels = batch + [l for l in x_labels if l not in both]
    labels += [l for l in w_labels if l not in both]
    labels = [l for first in labels for l in runs[first]]
    y = y.reshape([sizes[l] for l in labels])
    return y.transpose([labels.index(l) for l in out_labels])


def _runs(x: list, w: list, out: list) -> dict[Any, list]:
    """Labels of axes that go together through a contraction, by the first of each run.

    They lie side by side, in one order, in all operands that have them.
    """
    kind = lambda l: (l in x, l in w, l in out)
    runs: dict[Any, list] = {}
    run: list = []
    for one in dict.fromkeys((*x, *w)):
        sides = [side for side in (x, w) if one in side]
        goes_on = run and kind(run[-1]) == kind(one)
        if not goes_on or any(s.index(one) != s.index(run[-1]) + 1 for s in sides):
            run = runs[one] = []
        run.append(one)
    return runs


def _turned(w, w_labels: list, x_labels: list):
    """A tall factor ``[..., d_in, r]`` on its side, where its gradient is wide.

    The gradient of ``a`` is ``x^T dh [d_in, r]``. On a CPU a product of few columns
    takes five to ten times as long as the same one turned, ``dh^T x [r, d_in]``. The
    barrier keeps the compiler from turning it back; it costs a copy of ``a``.
    """
    if w.ndim < 2:
        return w, w_labels
    *batch, tall, thin = w_labels
    if tall not in x_labels or thin in x_labels:
        return w, w_labels
    d_in, rank = w.shape[-2:]
    if d_in < 64 or rank * 4 > d_in:  # nothing is gained
        return w, w_labels
    turned = lax.optimization_barrier(jnp.swapaxes(w, -1, -2))
    return turned, [*batch, thin, tall]


def shown(w: Kernel, x, x_labels):
    """The input as its adapter sees it: 0 in padding, whatever it holds there.

    A mask of other positions than the input's is left to the tap, which refuses it.
    """
    if w.mask is None or math.prod(w.dims(BATCH)) != 1:
        return x
    mask = w.mask.reshape(w.mask.shape[len(w.dims(BATCH)) :])
    places = [i for i, l in enumerate(x_labels) if l[0] == "x"][: mask.ndim]
    if tuple(x.shape[i] for i in places) != mask.shape:
        return x
    shape = [x.shape[i] if i in places else 1 for i in range(x.ndim)]
    return where_shown(mask.reshape(shape), x)


def precision_of(params):
    """The model's precision, unless it is an algorithm for other dtypes."""
    precision = params.get("precision")
    plain = precision is None or isinstance(precision, lax.Precision | tuple)
    return precision if plain else None


def read(
    kernels: Sequence[Sequence[Term]],
    product: Callable[[Any, Any], Any],
    precision: Any,
    target: str,
) -> list[list[Read]]:
    """Reads one input for kernels whose axes match it alike.

    What gates see is read at the highest precision. Where all else is, too (on a CPU,
    and where the model asks for it), one product has the columns of the gates beside
    those of the down-projections. Elsewhere that product would become slower, so the
    gates have one of their own.

    Args:
        kernels: the terms of each, of one or of several.
        product: ``product(columns [..., n], precision)``: the input times columns.
        precision: the model's.
        target: the platform that the program is for.

    Returns:
        What each term of each kernel reads; without ``h`` where dropout has an input
        of its own, and where rows choose among pairs.
    """
    gates = any(t.gate is not None for terms in kernels for t in terms)
    exact = target == "cpu" or precision == (HIGHEST, HIGHEST)
    if exact and gates:
        precision = HIGHEST
    groups: dict[Any, dict] = {}
    for i, terms in enumerate(kernels):
        for j, t in enumerate(terms):
            if not t.drop and t.rows is None:
                groups.setdefault((t.a.dtype, precision), {})[i, j, "h"] = t.a
            if t.gate is not None and t.gate.reads is not None:
                own = groups.setdefault((t.gate.reads.dtype, HIGHEST), {})
                own[i, j, "seen"] = t.gate.reads
    made: dict[Any, Any] = {}
    for (_, how), columns in groups.items():
        parts = list(columns.values())
        wide = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
        whole = product(wide, how)
        widths = [part.shape[-1] for part in parts]
        own = lax.split(whole, widths, axis=whole.ndim - 1) if parts[1:] else [whole]
        made.update(zip(columns, own, strict=True))
    of = lambda i, j: Read(*(made.get((i, j, name)) for name in Read._fields))
    return [[of(i, j) for j in range(len(ts))] for i, ts in enumerate(kernels)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def written(up: Callable[[Any, Any], Any], axis: int, hs: tuple, bs: tuple) -> Any:
    """The sum of ``h b`` over pairs, as one product of all ranks side by side.

    One product for each pair would be one array of the output's size for each.

    Args:
        up: ``up(h, b)``, linear in both.
        axis: of each ``b``, its rank; that of an ``h`` is its last.
        hs: of one dtype.
        bs: of one dtype.
    """
    return up(_beside(hs, -1), _beside(bs, axis))


def _beside(parts: tuple, axis: int):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _written_jvp(up, axis, primals, tangents):
    """Some ``b`` are frozen: of all side by side their gradients were computed, too."""
    (hs, bs), (hs_dot, bs_dot) = primals, tangents
    moves = lambda x: not isinstance(x, SymbolicZero)
    there = lambda x: x if moves(x) else jnp.zeros(x.shape, x.dtype)
    out, parts = written(up, axis, hs, bs), []
    if any(map(moves, hs_dot)):
        parts.append(up(_beside(tuple(map(there, hs_dot)), -1), _beside(bs, axis)))
    parts += [up(h, d) for h, d in zip(hs, bs_dot, strict=True) if moves(d)]
    return out, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(out)


written.defjvp(_written_jvp, symbolic_zeros=True)
