"""``attach``: a parameter tree in, an adapted tree out."""

import functools
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jaxpeft.console import SlowWork
from jaxpeft.numerics import dense, is_quantised, stored_as
from jaxpeft.tree._adapter import Adapter
from jaxpeft.tree._begin import initialise
from jaxpeft.tree._change import refolded
from jaxpeft.tree._finite import check_finite
from jaxpeft.tree._grouped import some
from jaxpeft.tree._kept import only_adds, take_components
from jaxpeft.tree._layers import site_methods
from jaxpeft.tree._lift import init_shapes, leaf_axes, matrix_shape
from jaxpeft.tree._node import (
    AdaptedKernel,
    Site,
    check_key,
    is_abstract,
    is_node,
    is_traced,
    leaves_with_path,
    made_like,
    wider,
    with_leaves,
    working_dtype,
)
from jaxpeft.tree._paths import Targets
from jaxpeft.tree._per_layer import per_layer_values
from jaxpeft.tree._places import gathered, on_mesh, place_like, replicated
from jaxpeft.tree._roles import roles_of
from jaxpeft.tree._targets import choose
from jaxpeft.tree._terms import IN, OUT
from jaxpeft.tree._together import (
    DEFAULT,
    check_name,
    check_sharing,
    parts_of,
    together,
)

PerSite = Mapping[str, Any] | Sequence[int | float]


@runtime_checkable
class Ranked(Protocol):
    """Targets that bring their own ranks, such as an ``allocate.Allocation``."""

    def attach_arguments(
        self, paths: list[str], adapter: Adapter
    ) -> tuple[Targets, Mapping[str, Any], Mapping[str, Any] | None, Mapping[str, Any]]:
        """``(targets, rank_pattern, alpha_pattern, components of each site)``.

        Args:
            paths: of all leaves of the tree.
            adapter: what is attached.
        """


def attach(
    params: PyTree,
    adapter: Adapter,
    targets: Targets | Ranked,
    *,
    key: Key[Array, ""],
    rank_pattern: PerSite | None = None,
    alpha_pattern: PerSite | None = None,
    exclude: Targets | None = None,
    axes: Mapping[str, str] | None = None,
    name: str = DEFAULT,
) -> PyTree:
    """Puts an adapter beside the kernels that ``targets`` names.

    Pure and traceable: under ``jax.eval_shape`` the sites of a model of any size
    cost no memory. Attaching again to the result adds adapters at other sites, or under
    another name at the same ones. Kernels are looked through for NaN and infinities
    first, unless they are traced or shapes.

    Args:
        params: any pytree of arrays, or of their ``jax.ShapeDtypeStruct``: a Linen
            variable dict, an NNX state, plain containers. Already adapted kernels
            stay as they are.
        adapter: what to attach, such as ``jaxpeft.kasa(rank=8)``.
        targets: a list of module names, each matched as a suffix of the path at a
            "/" (``"query"`` finds ``encoder/layer_3/attention/query/kernel``); a
            string, a regular expression that must match the whole module path;
            ``"all-linear"``, every weight but embeddings, output heads (``lm_head``,
            ``score``, ``classifier``) and what is already trained in full, or, where
            ``axes`` comes from ``infer_axes``, every kernel that is contracted with an
            input and no table that is looked up or added; a callable ``(path, leaf)
            -> bool``; or an ``Allocation``, with the rank and alpha of each of its
            sites, and their components where some are chosen, out of the ranks that
            its facts have.
        key: a typed key (``jax.random.key``). Each site and each layer draws from
            its own part of it.
        rank_pattern: ``{pattern: rank}`` where ranks differ from the adapter's, or
            a list with one rank per layer of a stack (as the mapping's value too);
            a layer of rank 0 stays as it is, for methods that are a low-rank sum.
        alpha_pattern: the same for alpha.
        exclude: what to leave out of the targets, in the same forms; a list entry
            also leaves out everything inside the modules that it names.
        axes: roles of the axes of kernels, ``{pattern: "layer in out"}``. Words:
            ``in``, ``out``, and any other word for a batch axis (a stacked layer,
            an expert). Two axes are ``"in out"`` (the table of an output head,
            ``lm_head/embedding``: ``"out in"``) unless said otherwise; kernels
            with more need an entry.
        name: of the adapter. At a kernel that has one of another name the changes of
            the two are added up, if both only add thin products: not DoRA or BoRA,
            nothing that folds, and one mixture at most.

    Returns:
        The tree with ``AdaptedKernel`` nodes in place of the chosen kernels.

    Raises:
        ValueError: an entry matches nothing, a site is adapted already, a kernel is
            not floating or finite or its axes have no roles, or a rank is not possible.
        TypeError: the adapter or the key is of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params, key = {"query": {"kernel": jnp.zeros((4, 6))}}, jax.random.key(0)
        >>> adapted = jp.attach(params, jp.lora(rank=2), ["query"], key=key)
        >>> jp.count(adapted)
        (20, 44)
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"`adapter` must be an Adapter such as jaxpeft.kasa(rank=8), got "
            f"{type(adapter).__name__}; a constructor must be called"
        )
    check_key(key)
    check_name(name)
    leaves, kept = leaves_with_path(params), {}
    if isinstance(targets, Ranked):
        if rank_pattern is not None or alpha_pattern is not None:
            raise ValueError(
                "`targets` is an allocation, which has ranks and alphas already; "
                "leave `rank_pattern` and `alpha_pattern` out"
            )
        targets, rank_pattern, alpha_pattern, kept = targets.attach_arguments(
            [path for path, _ in leaves], adapter
        )
    if kept and adapter.folded is not None:
        raise ValueError(
            f"`targets` chooses components, and {adapter.name!r} folds all of them "
            "into the kernel; write residual='separate' (base='separate' of KaSA)"
        )
    chosen = choose(leaves, adapter, targets, exclude, name, axes)
    there = {p: parts_of(x) for p, x in leaves if p in chosen and is_node(x)}
    for path, parts in there.items():
        others = {n: (part.adapter, part.site.rank) for n, part in parts.items()}
        check_sharing(path, {**others, name: (adapter, adapter.where.rank)})
    by_path = {path: x.base if is_node(x) else x for path, x in leaves}
    roles = {path: (OUT,) * by_path[path].ndim for path in chosen}
    if adapter.where.leaf == "kernel":
        had = {path: x.site.roles for path, x in leaves if path in there}
        roles = had | roles_of(by_path, [p for p in chosen if p not in had], axes)
    ranks = per_layer_values("rank", rank_pattern, adapter.where.rank, by_path, roles)
    alphas = per_layer_values(
        "alpha", alpha_pattern, adapter.where.alpha, by_path, roles, ranks
    )
    _check(adapter, by_path, roles, ranks)
    check_finite({path: by_path[path] for path in chosen}, roles)
    methods = site_methods(adapter, by_path, roles)
    shared = _shared(adapter, by_path, roles, ranks, key, name)
    layers = [matrix_shape(by_path[p].shape, roles[p])[0] for p in chosen]
    made = {}
    show = SlowWork(f"attach {adapter.name or 'adapter'}", sum(layers), "kernels")
    for path, entry in chosen.items():
        site = Site(path, roles[path], ranks[path], entry, alphas[path])
        own = alphas[path], site_key(key, path, name)
        made[path] = _make(by_path[path], methods[path], site, *own, shared, show)
    show.close()
    for path, each in kept.items():
        made[path] = take_components(made[path], each)
    for path, node in made.items():
        made[path] = together(there.get(path, {}) | {name: node})
    return with_leaves(params, made)


def site_key(key, path: str, name: str = DEFAULT):
    """A key for this path and adapter, which does not depend on what else there is."""
    path = path if name == DEFAULT else f"{path}:{name}"
    digest = hashlib.sha256(path.encode()).digest()
    for part in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(part, "little")))
    return key


def _check(adapter: Adapter, by_path, roles, ranks) -> None:
    """Raises what a method objects to, with the site, before anything is computed."""
    # By shapes: `init` is traced once for all sites of one shape, rank and dtype.
    sites: dict[tuple, list[str]] = {}
    for path, site_roles in roles.items():
        kernel = by_path[path]
        _, d_in, d_out = matrix_shape(kernel.shape, site_roles)
        for rank in sorted(set(ranks[path])) if ranks[path] else (None,):
            if rank == 0:
                _check_none(adapter, path)
                continue
            like = (d_in, d_out, rank, working_dtype(kernel.dtype))
            sites.setdefault(like, []).append(path)
    for like, (path, *_) in sites.items():
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                # Past the cache: a trace that is not made warns of nothing.
                init_shapes.__wrapped__(adapter, *like)
        except ValueError as e:
            shape = tuple(by_path[path].shape)
            raise ValueError(f"site {path!r}, shape {shape}: {e}") from e
        for warning in heard:
            warnings.warn(
                f"sites {some(sites[like])}: {warning.message}",
                warning.category,
                stacklevel=3,
            )
    _warn_of_rank(adapter, sites)


def _warn_of_rank(adapter: Adapter, sites: dict[tuple, list[str]]) -> None:
    """Warns of ranks that the method allows, and that a kernel has no use for."""
    for (d_in, d_out, rank, _), paths in sites.items():
        if rank is None or rank <= min(d_in, d_out):
            continue
        trained = leaf_axes(adapter, rank)[1].values()
        # Of an `a` that does not train, each column is one more direction to weigh.
        if any({IN, None} <= set(axes) for axes in trained):
            warnings.warn(
                f"sites {some(paths)}: rank {rank} is above {min(d_in, d_out)}, the "
                f"smaller side of the kernel {[d_in, d_out]}: what is beyond it adds "
                "parameters and no freedom; give these sites another with rank_pattern",
                stacklevel=4,
            )


def _check_none(adapter: Adapter, path: str) -> None:
    """Raises unless a layer of rank 0, whose leaves are all 0, is its kernel."""
    if not only_adds(adapter):
        raise ValueError(
            f"site {path!r} is a stack with layers of rank 0, and {adapter.name!r} "
            "does more than add a low-rank product: without a rank a layer would not "
            "be its kernel. Allocate with r_min=1, or load the model with its layers "
            "apart (scan_layers=False)."
        )


def _shared(adapter: Adapter, by_path, roles, ranks, key, name) -> dict[str, Any]:
    """The leaves that all sites have in common, made once for the largest of them."""
    if adapter.shared is None:
        return {}
    sizes = [matrix_shape(by_path[path].shape, roles[path]) for path in roles]
    make = functools.partial(
        adapter.shared,
        d_in=max(d_in for _, d_in, _ in sizes),
        d_out=max(d_out for _, _, d_out in sizes),
        rank=max((max(r) for r in ranks.values() if r), default=None),
        dtype=working_dtype(wider(*(by_path[path].dtype for path in roles))),
    )
    own = site_key(key, f"shared by {adapter.name}", name)
    first = by_path[next(iter(roles))]
    shared, where = made_like(first, make, own), on_mesh(first)
    return shared if where is None else jax.device_put(shared, replicated(where))


def _make(
    kernel, adapter: Adapter, site: Site, alphas, key, shared, show
) -> AdaptedKernel:
    init = functools.partial(
        initialise, adapter=adapter, site=site, alphas=alphas, done=show
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_check` has passed them on, with the site
        frozen, trainable = made_like(kernel, init, key, gathered(kernel))
    node = AdaptedKernel(kernel, frozen, trainable, adapter, site)
    if adapter.folded is not None and not is_abstract(kernel):
        node = node.replace(base=fold_base(node))
    node = place_like(node, kernel)
    return node.replace(frozen=node.frozen | shared)


def fold_base(node: AdaptedKernel, warn: bool = True):
    """The site's kernel with its folded terms in it.

    Args:
        node: the site, with the kernel as it was.
        warn: whether to say how much of the change rounding undoes.
    """
    kernel, changed = node.base, refolded(node)
    folded = stored_as(changed, kernel)
    quantised = is_quantised(kernel)
    exact = not quantised and kernel.dtype == changed.dtype
    if not warn or exact or is_traced(folded):
        return folded
    moved = float(jnp.linalg.norm(changed - dense(kernel, changed.dtype)))
    lost = float(jnp.linalg.norm(dense(folded, changed.dtype) - changed))
    kind = kernel.kind if quantised else kernel.dtype
    after = " and quantise the adapted tree" if quantised else ""
    if moved:  # of a kernel of zeros nothing is folded
        warnings.warn(
            f"site {node.site.path!r}: folding into a {kind} kernel rounds; "
            f"the rounding error is {lost / moved:.2f} of the norm of what was folded. "
            f"Keep base='separate', or fold a float32 kernel{after}.",
            stacklevel=5,
        )
    return folded
