"""``adapt``: a JAX transformation that runs a function on adapted trees."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import numpy as np

from jaxpeft.numerics import TARGETS, is_quantised, target_of
from jaxpeft.transform import _compat
from jaxpeft.transform._base import stand_in
from jaxpeft.transform._evaluate import Evaluator
from jaxpeft.transform._moved import Kernel, same
from jaxpeft.transform._refused import Refusal
from jaxpeft.transform._rule import Uses, joined
from jaxpeft.tree import (
    Bound,
    bare,
    bind,
    is_node,
    is_whole,
    leaves_with_path,
    nodes,
    scale_bias,
    scaled_biases,
)

Tap = Callable[[Any, dict, dict], Any]


def adapt(
    fn: Callable[..., Any],
    *,
    unsupported: Literal["error", "materialise"] = "error",
    taps: Tap | Literal["own"] | None = None,
    target: Literal["cpu", "gpu", "tpu"] | None = None,
) -> Callable[..., Any]:
    r"""Makes a function understand adapted trees; its code stays as it is.

    The function is traced once with plain arrays in place of the adapted kernels.
    Each kernel is then followed through the trace to where it meets its input, and

    .. math:: y = \Big((x c) W + \sum_t \mathrm{gate}_t\big(x,
              \mathrm{drop}(x c)\, a_t\big)\, b_t\Big) o

    is computed there. No merged kernel is formed, and none has a gradient. Loops,
    rematerialisation, shardings and nested transformations of the function stay.

    A ``lax.stop_gradient`` of the function's on a kernel stops the kernel's gradient
    and not its adapter's: a model that freezes its own weights can be tuned. Where a
    batch is empty, so is the result, and gradients are 0. What is looked up, and one
    row or column that is picked from a kernel, has no dropout.

    Args:
        fn: any JAX function, such as ``model.apply``. Its outputs must be arrays.
        unsupported: what happens where the function uses a kernel in a way that has
            no rule (takes a norm of weights, puts them through a function with its
            own derivative, ...): ``"error"`` raises and names the place,
            ``"materialise"`` forms the merged kernel there and warns. ``rule`` adds
            rules for primitives of your own.
        taps: ``(x [..., d_in], frozen, trainable) -> pytree``, a pure function of the
            input and of the adapter's two-dimensional leaves, evaluated at every
            contraction of an adapted kernel (not at look-ups); ``"own"`` for what each
            method says of its input (the mixtures: sums over their gates); ``None``
            for none.
        target: the platform that the program is for: thin products are written as
            its compiler has them best; the numbers are the same. ``None``: that of the
            arrays, or in a trace that of the mesh of their shardings or in context,
            or JAX's default backend.

    Returns:
        A function of the same signature. Adapted kernels may be anywhere among its
        arguments; without any it does what ``fn`` does. It is jitted, so what ``fn``
        closes over is read once, and arguments that are no arrays are static: pass a
        number that changes from call to call as an array. With ``taps`` it returns
        ``(out, {site: statistics})``: a scan over layers puts a layer axis in front,
        several uses of one site a use axis. Where a convolution contracts, ``x`` are
        its windows, ``[batch, *spatial, (groups,) d_in]``. Sites of ``full`` have no
        contraction of their own and emit nothing.

    Raises:
        UnsupportedError: as above (a ``NotImplementedError``), when called.
        ValueError: ``unsupported`` is neither word, ``taps`` is another string,
            ``target`` no platform, or an argument is one half of a partition.
        TypeError: an argument is neither an array nor hashable.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> adapted = jp.attach(params, jp.lora(rank=1), ["w"], key=jax.random.key(0))
        >>> jp.adapt(lambda params, x: x @ params["w"])(adapted, x)
        Array([[3., 3.]], dtype=float32)
    """
    if unsupported not in ("error", "materialise"):
        raise ValueError(
            f'`unsupported` must be "error" or "materialise", got {unsupported!r}'
        )
    if isinstance(taps, str) and taps != "own":
        raise ValueError(f'`taps` must be a function, "own" or None, got {taps!r}')
    if target not in (None, *TARGETS):
        raise ValueError(f"`target` must be None or one of {TARGETS}, got {target!r}")
    if not callable(fn):
        raise TypeError(f"`fn` must be a function, got {type(fn).__name__}")

    call = _call(fn, unsupported, taps)

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        static, arrays = split_call(args, kwargs)
        return call(static, target or target_of(arrays), arrays)

    return wrapped


def _call(fn, unsupported: Literal["error", "materialise"], taps: Tap | str | None):
    """The jitted call; one for a model's method, however often it is adapted.

    ``model.apply`` is a new object each time, and compiling anew each time would be a
    trap. A function closes over arrays, which a cache would keep alive: who adapts
    one in a loop keeps the result.
    """
    try:
        if inspect.ismethod(fn):
            return _compiled_once(fn, unsupported, taps)
    except TypeError:  # a model without a hash
        pass
    return _compiled(fn, unsupported, taps)


def _compiled(fn, unsupported: Literal["error", "materialise"], taps: Tap | str | None):

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def call(static: "Static", target: str, arrays: list):
        return run(fn, static, arrays, Refusal(unsupported), taps, target)

    return call


_compiled_once = functools.lru_cache(maxsize=64)(_compiled)


def split_call(args: tuple, kwargs: dict) -> tuple["Static", list]:
    """A call's arguments as what is static and what is traced."""
    nodes((args, kwargs))  # whole ones only
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_whole)
    arrays = [x for x in leaves if _is_array(x)]
    rest = tuple(None if _is_array(x) else _static(x) for x in leaves)
    return Static(treedef, rest), arrays


def _is_array(x: Any) -> bool:
    return is_whole(x) or isinstance(x, jax.Array | np.ndarray | np.generic)


def _static(value: Any) -> tuple[type, Any]:
    """A static argument, as what compares by type and value: 1 is not True."""
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"an argument of an adapted function is a {type(value).__name__}, "
            "neither an array nor hashable; pass arrays, or make it hashable, "
            "since what is no array is static"
        ) from None
    return type(value), value


@dataclasses.dataclass(frozen=True)
class Static:
    """All of a call's arguments that are not arrays.

    Attributes:
        treedef: the structure of ``(args, kwargs)``.
        rest: ``(type, value)`` of each leaf, or ``None`` where there is an array.
    """

    treedef: Any
    rest: tuple

    def whole(self, arrays: list) -> Any:
        """``(args, kwargs)`` with arrays in their places."""
        given = iter(arrays)
        return self.treedef.unflatten(
            next(given) if own is None else own[1] for own in self.rest
        )


def _returned(x, values: list, arrays: list, refusal: Refusal):
    """An output; a kernel that comes back as it went in is its node again."""
    if not isinstance(x, Kernel):
        return x
    for value, node in zip(values, arrays, strict=True):
        if isinstance(value, Kernel) and same(x, value):
            return node
    reason = "the function returns the kernel, changed"
    return refusal.array(x, "return", "its end", reason)


def _with_scaled_biases(static: Static, arrays: list, values: list) -> list:
    """The values, with each bias scaled that lies beside a kernel which says so."""
    tree = static.whole(arrays)
    scaled = scaled_biases(tree)
    return [
        scale_bias(v, scaled[p]) if p in scaled else v
        for p, v in zip(_paths(static, arrays), values, strict=True)
    ]


def _paths(static: Static, arrays: list) -> list[str]:
    """The paths of the arrays among a call's arguments."""
    named = leaves_with_path(static.whole(arrays))
    return [
        path for (path, _), own in zip(named, static.rest, strict=True) if own is None
    ]


def run(
    fn,
    static: Static,
    arrays: list,
    refusal: Refusal,
    taps: Tap | str | None,
    target: str,
    sites: Collection[str] | None = None,
):
    """Traces ``fn`` on plain arrays and evaluates the trace on bound kernels.

    Args:
        fn: the user's function.
        static: what ``split_call`` made of its arguments.
        arrays: the same.
        refusal: what happens where no rule follows a kernel.
        taps: as in ``adapt``.
        target: the platform that the program is for.
        sites: paths of the sites that are tapped; ``None`` for all.

    Returns:
        ``fn``'s result; with taps ``(result, {site: statistics})``.
    """

    def taps_of(node):
        return taps if sites is None or node.site.path in sites else None

    def flat_fn(plain: list):
        args, kwargs = static.whole(plain)
        return fn(*args, **kwargs)

    flat_fn.__name__ = getattr(fn, "__name__", type(fn).__name__)
    plain = [stand_in(x.base if is_node(x) else x) for x in arrays]
    closed, shape = jax.make_jaxpr(flat_fn, return_shape=True)(plain)
    jaxpr, consts = _compat.opened(closed)
    values = [bind(x, taps_of(x)) if is_node(x) else x for x in arrays]
    if any(map(is_quantised, values)):
        paths = _paths(static, arrays)
        values = [
            bare(x, p) if is_quantised(x) else x
            for p, x in zip(paths, values, strict=True)
        ]
    values = [Kernel.of(x) if isinstance(x, Bound) else x for x in values]
    if any(is_node(x) and x.adapter.where.bias == "scaled" for x in arrays):
        values = _with_scaled_biases(static, arrays, values)
    uses = Uses(taps, target)
    outs = Evaluator(refusal)(jaxpr, consts, values, uses)
    outs = [_returned(x, values, arrays, refusal) for x in outs]
    out = jax.tree.structure(shape).unflatten(outs)
    return out if taps is None else (out, joined(uses.tapped))
