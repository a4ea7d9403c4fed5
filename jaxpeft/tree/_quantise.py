"""``quantise``: kernels of a tree as codes and scales."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from jaxpeft.numerics import KINDS, Quantised, blocks_of, codes_of, is_quantised
from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._finite import check_finite
from jaxpeft.tree._grouped import grouped
from jaxpeft.tree._lift import axes_of
from jaxpeft.tree._node import is_node, leaves_with_path, made_like, with_leaves
from jaxpeft.tree._paths import Targets, module_path
from jaxpeft.tree._roles import roles_of
from jaxpeft.tree._targets import choose
from jaxpeft.tree._terms import IN, OUT, Factors

GROUP = 64

# Chooses kernels as a method does that sits on kernels.
_ANY_KERNEL = Adapter(
    init=lambda key, kernel, rank, alpha: ({}, {}),
    factors=lambda kernel, frozen, trainable, call: Factors(),
    name="quantise",
)
# Small, and what they choose is not smooth: routers stay floats unless they are named.
_ROUTERS = ("router", "gate", "switch")
_TABLES = ("embedding", "embeddings")


def quantise(
    params: PyTree,
    kind: str = "nf4",
    targets: Targets = "all-linear",
    *,
    group: int = GROUP,
    exclude: Targets | None = None,
    axes: Mapping[str, str] | str | None = None,
) -> PyTree:
    r"""Keeps kernels as integers of 8 or 4 bits and scales (QLoRA, for any method).

    .. math:: W \approx t[\mathrm{codes}] \cdot \mathrm{scale}

    The tree is used as before: ``attach`` puts any method beside quantised kernels,
    ``adapt`` runs the model, also on those without an adapter, with gradients to the
    input and to the adapter through the dequantised kernel, and none to the codes.

    ========  =======================  =============================  ==============
    kind      codes                    scale                          bytes a weight
    ========  =======================  =============================  ==============
    int8      -127 to 127              float32, one an out feature    1.0
    int4      -7 to 7                  bfloat16, one a group          0.53
    nf4       16 quantiles of normal   bfloat16, one a group          0.53
    ========  =======================  =============================  ==============

    An out feature of a stacked kernel is one of a layer. Groups lie along the in axis.
    In a table that is looked up (``embedding``) the scales are those of rows, or of
    groups along them.

    Args:
        params: a parameter tree or a single kernel: arrays, or their shapes. Of an
            adapted tree the kernels are quantised and the adapters stay, so a method
            that starts from the kernel (KaSA, PiSSA) sees the floats if it is attached
            first; what it folded into the kernel is then quantised with it.
        kind: ``"int8"``, ``"int4"`` or ``"nf4"``.
        targets: which kernels, as in ``attach``. ``"all-linear"``: every weight but
            embeddings, output heads, norms and routers.
        group: entries of a group, for int4 and nf4.
        exclude: what to leave out of the targets, as in ``attach``.
        axes: roles of the kernels' axes, as in ``attach``; of a single kernel with
            more than two the words alone, ``"layer in out"``.

    Returns:
        The tree with a ``Quantised`` in place of each chosen kernel.

    Raises:
        ValueError: the kind is unknown, an entry matches nothing, a kernel is quantised
            already, not floating or finite, smaller than a group, or its groups do not
            divide. All such kernels are named, and nothing is computed.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((128, 6)), "bias": jnp.ones(6)}}
        >>> base = jp.quantise(params, "int8")
        >>> base["query"]["kernel"]
        Quantised(int8, [128, 6], float32)
        >>> adapted = jp.attach(base, jp.lora(rank=2), ["query"], key=jax.random.key(0))
        >>> fn = lambda p, x: x @ p["query"]["kernel"] + p["query"]["bias"]
        >>> jp.adapt(fn)(adapted, jnp.ones(128))[0]
        Array(129., dtype=float32)

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv
        2305.14314.
    """
    check_kind(kind, group)
    if hasattr(params, "dtype") and hasattr(params, "ndim") and not is_node(params):
        words = {"kernel": axes} if isinstance(axes, str) else axes
        only = {"kernel": params}
        return quantise(only, kind, ["kernel"], group=group, axes=words)["kernel"]
    if isinstance(axes, str):
        raise ValueError(
            f"`axes` is {axes!r}, which says of no kernel of a tree what it is; write "
            f"axes={{'layers/.*': {axes!r}}}"
        )
    leaves = leaves_with_path(params)
    kernels = {path: x.base if is_node(x) else x for path, x in leaves}
    named = list(kernels.items())
    chosen = list(choose(named, _ANY_KERNEL, targets, exclude, axes=axes))
    if targets == "all-linear":
        words = lambda path: module_path(path).rpartition("/")[2]
        chosen = [path for path in chosen if words(path) not in _ROUTERS]
    had = {path: x.site.roles for path, x in leaves if is_node(x)}
    roles = roles_of(kernels, [path for path in chosen if path not in had], axes) | had
    _check(kernels, chosen, roles, kind, group)
    check_finite({path: kernels[path] for path in chosen}, roles)
    made = {}
    for path, x in leaves:
        if path in chosen:
            base = _quantised(path, kernels[path], roles[path], kind, group)
            made[path] = x.replace(base=base) if is_node(x) else base
    return with_leaves(params, made)


def check_kind(kind: Any, group: Any) -> None:
    """Raises unless there is such a kind, and groups may have this size."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(group, int) or isinstance(group, bool) or group < 2:
        raise ValueError(
            f"`group` must be an integer from 2 on, got {group!r}: 64, say"
        )


def shared_axes(path: str, roles: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of a kernel along which entries have scales in common."""
    looked_up = path.rpartition("/")[2] in _TABLES and roles == (IN, OUT)
    return axes_of(roles, OUT if looked_up else IN)


def _check(kernels, chosen, roles, kind: str, group: int) -> None:
    problems = []
    for path in chosen:
        kernel = kernels[path]
        if is_quantised(kernel):
            problems.append(f"{path!r} is quantised already, as {kernel.kind}")
            continue
        try:
            blocks_of(kernel.shape, kind, shared_axes(path, roles[path]), group)
        except ValueError as e:
            problems.append(f"{path!r} of shape {tuple(kernel.shape)}: {e}")
    if problems:
        raise ValueError(
            f"`targets` names kernels that cannot become {kind}:\n  "
            + grouped(problems)
            + "\nLeave them out with `exclude`, choose another `group`, or kind='int8'"
        )


def _quantised(path: str, kernel: Any, roles, kind: str, group: int) -> Quantised:
    quantised = lambda x: codes_of(x, kind, shared_axes(path, roles), group, roles)
    return made_like(kernel, quantised, kernel)
