"""``capture``: what the kernels of any model are given, reduced where it arises."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from jaxpeft.numerics import target_of
from jaxpeft.transform._adapt import run, split_call
from jaxpeft.transform._infer import infer_axes
from jaxpeft.transform._refused import Refusal
from jaxpeft.tree import (
    AdaptedKernel,
    Adapter,
    Factors,
    Site,
    Targets,
    bind,
    choose,
    is_node,
    is_whole,
    leaves_with_path,
    roles_of,
)

_WAY_OUT = (
    "jaxpeft.capture cannot follow it there: leave the site out of `targets`, or name "
    "it in `exclude`."
)

# Nothing beside the kernel: a site that is only looked at.
_OBSERVER = Adapter(
    init=lambda key, kernel, rank, alpha: ({}, {}),
    factors=lambda kernel, frozen, trainable, call: Factors(),
    name="capture",
)


def capture(
    fn: Callable[..., Any],
    targets: Targets,
    reduce: Callable[[Any], Any],
    *,
    exclude: Targets | None = None,
    axes: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """Makes a function also return what its kernels were given.

    For any model, in Linen, NNX, Equinox, Haiku or plain JAX, and without a change to
    it: the inputs of the chosen kernels are followed through scans, rematerialisation,
    branches and nested ``jit``, and ``reduce`` is applied to each where it arises. So
    no more is kept than what ``reduce`` returns: sums over tokens for a model's
    representations, second moments for data-driven starts of an adapter.

    Args:
        fn: any JAX function whose first argument is its tree of parameters, plain
            or adapted.
        targets: which kernels, as in ``attach``.
        reduce: ``x [..., d_in] -> pytree`` of arrays; ``...`` are the input's own
            axes in their order (a batch, tokens), ``d_in`` all in axes as one. Of a
            convolution ``x`` are the windows, ``[batch, *spatial, (groups,) d_in]``.
        exclude: what to leave out of the targets, as in ``attach``.
        axes: roles of the kernels' axes, as in ``attach``; ``None``: read off ``fn``.

    Returns:
        A function of the same signature that returns ``(out, {path: reduced})``.
        Layers of a scan and mapped experts are stacked in front, several uses of one
        kernel on an axis before those. It can be jitted and differentiated. As with
        ``adapt``, keep it: a new one compiles anew. ``reduce`` may close over arrays
        of a surrounding ``jit``, such as the batch's mask.

    Raises:
        ValueError: an entry of ``targets`` matches nothing, the roles of a chosen
            kernel cannot be read off ``fn``, or one meets no input (look-ups have
            none); when called.
        UnsupportedError: ``fn`` does something else with a chosen kernel, or uses it
            in a ``while`` loop, which has no fixed number of results; when called.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
        >>> params = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
        >>> mean = lambda x: jnp.mean(x, axis=0)
        >>> out, seen = jp.capture(fn, ["up"], mean)(params, jnp.ones((4, 2)))
        >>> seen
        {'up': Array([1., 1.], dtype=float32)}
    """
    for name, value in (("fn", fn), ("reduce", reduce)):
        if not callable(value):
            raise TypeError(
                f"`{name}` must be a function, got {type(value).__name__}: write "
                "jaxpeft.capture(fn, targets, reduce)"
            )
    tap = lambda x, frozen, trainable: reduce(x)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def call(static, target: str, arrays: list):
        (params, *rest), kwargs = static.whole(arrays)
        found = axes or {}
        if axes is None:
            found = infer_axes(lambda p, *args: fn(p, *args, **kwargs), params, *rest)
        watched, sites = _watched(params, targets, exclude, found, axes is None)
        new_static, new_arrays = split_call((watched, *rest), kwargs)
        refusal = Refusal("error", _WAY_OUT)
        out, seen = run(fn, new_static, new_arrays, refusal, tap, target, sites)
        blind = [path for path in sites if path not in seen]
        if blind:
            raise ValueError(
                f"`targets` chose {blind}, but `fn` contracts no input with "
                f"{'it' if len(blind) == 1 else 'them'} (a look-up has none), or "
                f"`reduce` gave nothing; write exclude={blind!r}"
            )
        return out, {path: seen[path] for path in sites}

    @functools.wraps(fn)
    def wrapped(params, *args, **kwargs):
        static, arrays = split_call((params, *args), kwargs)
        return call(static, target_of(arrays), arrays)

    return wrapped


def _watched(
    params: PyTree, targets, exclude, axes: Mapping[str, str], inferred: bool
) -> tuple[PyTree, list[str]]:
    """The tree with a node at each chosen kernel, and the chosen paths.

    Every node is called by its place in this tree.
    """
    named, treedef = leaves_with_path(params), jax.tree.structure(params, is_whole)
    kernels = {path: x.base if is_node(x) else x for path, x in named}
    chosen = choose(list(kernels.items()), _OBSERVER, targets, exclude)
    # What is trained in full has roles of its own; its kernel is as good as plain.
    followed = lambda x: is_node(x) and x.adapter.where.leaf == "kernel"
    plain = [path for path, x in named if path in chosen and not followed(x)]
    for path in plain:
        if inferred and path not in axes:
            raise ValueError(
                f"the axes of {path!r}, shape {tuple(kernels[path].shape)}, cannot be "
                "read off `fn`: it contracts no input with it. Write "
                f"exclude=[{path!r}], or axes={{{path!r}: 'layer in out'}}."
            )
    roles = roles_of(kernels, plain, axes)

    def node(path: str, x):
        if is_node(x):
            x = x.replace(site=dataclasses.replace(x.site, path=path))
        if path not in roles:
            return x
        site = Site(path, roles[path], None, chosen[path])
        return AdaptedKernel(bind(x) if is_node(x) else x, {}, {}, _OBSERVER, site)

    return treedef.unflatten([node(path, x) for path, x in named]), list(chosen)
