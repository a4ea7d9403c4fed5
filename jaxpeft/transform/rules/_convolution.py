"""Where a kernel meets its input in a convolution.

A convolution is a contraction of windows: at each position of the output the kernel
``[*spatial, channels, d_out]`` is a matrix whose in axis runs over all that the window
shows. The windows themselves are laid out in memory only for what needs them.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.numerics import dense
from jaxpeft.transform._base import contracted
from jaxpeft.transform._moved import NoRule
from jaxpeft.transform._rule import Equation, only_kernel, rule
from jaxpeft.transform._thin import (
    HIGHEST,
    Read,
    labelled_dot,
    precision_of,
    shown,
)
from jaxpeft.transform.rules._contraction import (
    changes_of,
    finish,
    record,
    spread_along,
    times,
)
from jaxpeft.tree import IN, OUT, wider


@rule("conv_general_dilated")
def _convolution(eqn: Equation, x, w):
    """A convolution of any stride, padding, dilation and number of feature groups.

    The low-rank part is the model's own convolution with ``a`` in the kernel's place
    (the rank as its output channels), then one by one with ``b``; so HF PEFT has it.
    Groups share ``a`` and have their own columns of ``b``, as the kernel's matrix
    says, so that a grouped kernel merges too. (PEFT's ``a`` mixes the groups, which
    no grouped kernel does.)

    An input scale differs from place to place within the window, so what ``c`` scales,
    and gates and taps, read the input as windows: its size times the kernel's over the
    stride's, which is nothing more where windows do not overlap (patch embeddings).
    """
    if only_kernel((x, w)) == 0:
        raise NoRule("the kernel is the convolution's input")
    params, uses = eqn.params, eqn.uses
    spec = params["dimension_numbers"]
    out_axis, groups = spec.rhs_spec[0], params["feature_group_count"]
    roles = [OUT if i == out_axis else IN for i in range(w.base.ndim)]
    w = w.assigned(roles, eqn).joined()
    if params["batch_group_count"] != 1:
        raise NoRule("a convolution grouped over its batch has no low-rank form")
    if any(term.rows is not None for term in w.terms):
        raise NoRule("rows of a convolution's input cannot choose an adapter")
    # Positions of the output, its groups where there are any, then what is contracted.
    group = [("g", 0)] if groups > 1 else []
    front = [("x", i) for i in range(x.ndim - 1)] + group
    ins = [("w", i) for i, role in enumerate(w.roles) if role == IN]
    rank, out = [("r", 0)], [("o", 0)]
    precision = precision_of(params)
    product = functools.partial(labelled_dot, target=uses.target)
    widths = (groups,) * len(group) + (w.base.shape[out_axis] // groups,)

    def down(z, a):
        wide = wider(z.dtype, a.dtype)
        each = jnp.tile(a, groups).astype(wide)  # all groups share it
        down = jnp.moveaxis(each, -1, out_axis)
        h = eqn.run(z.astype(wide), down, preferred_element_type=None)
        h = h.transpose((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]))
        return h.reshape(*h.shape[:-1], *widths[:-1], a.shape[-1])

    def sees(reads):
        if reads is None:
            return None
        z = shown(w, windows(x, w.base.shape, params), front + ins)
        return product(z, front + ins, reads, ins + rank, front + rank, HIGHEST)

    def up(h, b):
        b = b.reshape(b.shape[0], *widths)
        y = product(h, front + rank, b, rank + group + out, front + out, precision)
        return _in_layout(y, len(group), spec)

    known = [Read(seen=None if t.gate is None else sees(t.gate.reads)) for t in w.terms]
    tapped = x if w.leaves is None else windows(x, w.base.shape, params)
    record(uses, w, tapped, front + ins, [], ins, known)
    if w.c is None:
        along_out = lambda s: spread_along(s, [spec.out_spec[1]], range(x.ndim))
        summed = [i for i in range(w.base.ndim) if i != out_axis]
        y = contracted(eqn.run, x, w.base, summed, along_out)
    else:
        base = jnp.moveaxis(dense(w.base), out_axis, -1)
        base = base.reshape(*base.shape[:-1], *widths)
        labels = ins + group + out
        z = times(windows(x, w.base.shape, params), spread_along(w.c, ins, front + ins))
        y = labelled_dot(z, front + ins, base, labels, front + out, precision)
        y = y.astype(params["preferred_element_type"] or x.dtype)
        y = _in_layout(y, len(group), spec)
    changes = changes_of(w, x, known, down, up, uses)
    return finish(y, changes, spread_along(w.o, [spec.out_spec[1]], range(y.ndim)))


def _in_layout(y, group_axes: int, spec):
    """``[batch, *spatial, (groups,) d_out]`` in the convolution's own layout."""
    split = y.ndim - 1 - group_axes  # an empty batch has no -1 in its shape
    y = y.reshape(*y.shape[:split], math.prod(y.shape[split:]))
    places = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return y.transpose(tuple(places.index(i) for i in range(y.ndim)))


def windows(x, kernel_shape: tuple[int, ...], params: dict):
    """What a convolution's kernel sees at each position of the output.

    Args:
        x: the input.
        kernel_shape: the kernel's.
        params: the equation's parameters.

    Returns:
        ``[batch, *output's spatial axes, (groups,) *in]``; ``in`` are the kernel's
        spatial axes and its input channels, in the kernel's order.
    """
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, channel, *spatial = spec.rhs_spec
    x = x.transpose((spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    pads = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            params["padding"], params["lhs_dilation"], strict=True
        )
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    n = len(spatial)
    for d in reversed(range(n)):
        stride, dilation = params["window_strides"][d], params["rhs_dilation"][d]
        x = _windowed(x, 1 + d, kernel_shape[spatial[d]], stride, dilation)
    x = x.reshape(*x.shape[:-1], *(groups,) * (groups > 1), x.shape[-1] // groups)
    last = x.ndim - 1
    seen = {channel: last} | {axis: 2 + 2 * d for d, axis in enumerate(spatial)}
    middle = (last - 1,) if groups > 1 else ()
    ins = tuple(seen[axis] for axis in sorted(seen))
    return x.transpose((0, *(1 + 2 * d for d in range(n)), *middle, *ins))


def _windowed(x, axis: int, size: int, stride: int, dilation: int):
    """One axis as two: the window, and the place in it."""
    count = max(0, (x.shape[axis] - (size - 1) * dilation - 1) // stride + 1)
    if stride == size and dilation == 1:  # a reshape: windows that do not overlap
        x = lax.slice_in_dim(x, 0, count * size, axis=axis)
        return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    places = stride * np.arange(count)[:, None] + dilation * np.arange(size)
    return jnp.take(x, places, axis=axis, mode="clip")
