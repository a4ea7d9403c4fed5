"""Stages: which leaves train and which gates are used, changed together."""

import warnings
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jaxpeft.mixtures._nodes import (
    domain_nodes,
    is_residual,
    rebuilt,
)
from jaxpeft.parts import UNIVERSAL, domain_of, stage_names
from jaxpeft.tree import (
    AdaptedKernel,
    check_key,
    fold_base,
    initialise,
    matrix_shape,
    options_of,
    site_key,
    trainable_size,
    with_options,
)


def stage(
    adapted: PyTree,
    name: str,
    *,
    router_init: Literal["warm", "reset"] = "warm",
    key: Key[Array, ""] | None = None,
    allow_stale: bool = False,
) -> PyTree:
    """Puts a mixture of domains into one of its stages.

    ===============  =====================  ===================================
    ``name``         trains                 gates
    ===============  =====================  ===================================
    "universal"      the universal expert   its own path alone
    "domain:NAME"    that domain's expert   NAME 1, other domains 0
    "router"         the router             the router's; every domain is routed
    "all"            everything at once     the router's
    ===============  =====================  ===================================

    What does not train in a stage becomes a frozen leaf: ``partition`` leaves it out,
    so it is not differentiated and no optimiser can move it. **Begin each stage with a
    fresh optimiser state and schedule** for the new trainable half. Sites of other
    methods, such as heads trained in full, are left as they are.

    Args:
        adapted: a tree with a method that has domains; its values are looked at, so
            call this outside of ``jit``. Of a tree of shapes nothing is checked.
        name: see the table.
        router_init: for "router": "warm" keeps the columns there are; "reset" draws
            all of them anew.
        key: a typed key, for "reset".
        allow_stale: train the universal expert again although domains were trained
            behind it, or go on with such domains.

    Returns:
        The tree in that stage; every leaf that is not drawn anew keeps its bytes.

    Raises:
        ValueError: the name is unknown, or the stage would not learn or would undo
            another: a domain behind a universal expert that is still 0, a router over
            domains that were never trained or over fewer than two experts, a universal
            expert that trained domains stand behind.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapter = jp.modula_flan(("law", "code"), rank=1, rank_universal=2)
        >>> adapted = jp.attach(params, adapter, ["query"], key=jax.random.key(0))
        >>> trainable, frozen = jp.partition(stage(adapted, "universal"))
        >>> sorted(name.rpartition("/")[2] for name in jp.tree.flat(trainable))
        ['a.universal', 'b.universal']

    References:
        MoDULA, arXiv 2412.07405, section 3; the checks are ours.
    """
    found = domain_nodes(adapted)
    domains = options_of(found[0])["domains"]
    if name not in stage_names(domains):
        raise ValueError(
            f"`name` must be a stage of this tree, one of "
            f"{', '.join(stage_names(domains))}, got {name!r}."
        )
    if router_init not in ("warm", "reset"):
        raise ValueError(
            f"`router_init` must be 'warm' or 'reset', got {router_init!r}"
        )
    reset = router_init == "reset"
    if reset and name != "router":
        raise ValueError("`router_init` is for stage 'router' alone; leave it out.")
    if reset:
        check_key(key)
    values = [x for node in found for x in jax.tree.leaves(node)]
    if any(isinstance(x, jax.core.Tracer) for x in values):
        raise ValueError("`adapted` is traced; begin a stage outside of jit.")
    stale = _stale(found, domains, name, allow_stale)
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in values):
        _check_order(found, domains, name)

    def change(node):
        changes = {"stage": name, "gates": None}
        if name in ("router", "all"):  # every domain is routed to
            changes["inactive"] = ()
        if is_residual(node):
            changes["stale"] = stale
        new = with_options(node, **changes)
        return _drawn_router(new, key) if reset else new

    return rebuilt(adapted, change)


def trained(node: AdaptedKernel, expert: str) -> list[bool]:
    """Whether an expert's ``b`` has left 0, for each layer of a site."""
    layers = matrix_shape(node.base.shape, node.roles)[0]
    b = {**node.frozen, **node.trainable}[f"b.{expert}"]
    return jax.device_get(jnp.any(b.reshape(layers, -1) != 0, 1)).tolist()


def _stale(found, domains, name: str, allow: bool) -> tuple[str, ...]:
    """The domains that a universal expert has changed under, after this stage."""
    if not is_residual(found[0]):
        return ()
    stale = options_of(found[0])["stale"]
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found))
    if name in ("universal", "all") and not abstract:
        done = [d for d in domains if any(any(trained(n, d)) for n in found)]
        if name == "universal" and done and not allow:
            raise ValueError(
                f"domains {done} were trained behind the universal expert, and to "
                "train it again makes them meaningless; write stage(adapted, "
                "'universal', allow_stale=True) and train them again after it."
            )
        return tuple(done) if name == "universal" else stale
    if name == "router" and stale and not allow:
        raise ValueError(
            f"domains {list(stale)} were trained behind a universal expert that has "
            f"changed since; train them again, stage(adapted, 'domain:{stale[0]}'), or "
            "write allow_stale=True."
        )
    return tuple(d for d in stale if d != domain_of(name))


def _check_order(found, domains, name: str) -> None:
    if domain_of(name) is not None and is_residual(found[0]):
        dead = [n.site.path for n in found if not all(trained(n, UNIVERSAL))]
        if dead:
            raise ValueError(
                f"stage {name!r} has no gradient while the universal expert's b is 0, "
                f"as it is at {dead} (in one layer at least); train stage 'universal' "
                "first."
            )
    if name != "router":
        return
    fresh = [d for d in domains if not any(any(trained(n, d)) for n in found)]
    if fresh:
        raise ValueError(
            f"stage 'router' would route to {fresh}, which were never trained; run "
            f"stage 'domain:{fresh[0]}' first, or take it off with remove_domain."
        )
    universal = options_of(found[0]).get("route_universal", False)
    if len(domains) + universal < 2:
        raise ValueError(
            f"stage 'router' needs two experts to choose from, and there is "
            f"{len(domains) + universal}: its gate is always 1; add a domain."
        )
    if universal and not any(any(trained(n, UNIVERSAL)) for n in found):
        warnings.warn(
            "the universal expert was never trained, and the router mixes it in: an "
            "expert that adds 0; train stage 'universal', or use route_universal=False",
            stacklevel=3,
        )


def _drawn_router(node: AdaptedKernel, key) -> AdaptedKernel:
    own = site_key(key, node.site.path)
    _, drawn = initialise(own, node.base, adapter=node.adapter, site=node.site)
    return node.replace(trainable=drawn)


def stage_sizes(adapted: PyTree) -> dict[str, int]:
    """Returns how many numbers each stage trains at the sites with domains.

    Args:
        adapted: a tree with a method that has domains, or its shapes.

    Returns:
        ``{stage: count}``, padding not counted; a domain's entry is also what adding
        such a domain adds, its column of the router apart.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> adapter = jp.modula_res(("law",), rank=1, rank_universal=2)
        >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
        >>> adapted = jp.attach(params, adapter, ["query"], key=jax.random.key(0))
        >>> stage_sizes(adapted)
        {'all': 34, 'universal': 20, 'router': 6, 'domain:law': 8}
    """
    found = domain_nodes(adapted)
    sizes = {}
    for name in stage_names(options_of(found[0])["domains"]):
        changes = {"stage": name, "gates": None}
        plain = lambda n: {"folded": False} if is_residual(n) else {}
        sizes[name] = sum(
            trainable_size(with_options(n, **changes, **plain(n))) for n in found
        )
    return sizes


def fold_universal(adapted: PyTree) -> PyTree:
    r"""Stores a trained universal expert in the kernels: :math:`W + s_u a_u b_u`.

    For methods whose domains stand behind it: the function stays the same to within
    rounding, and the output is one thin matmul cheaper. ``a_u`` and ``b_u`` stay, since
    the domains read the input through them. ``detach`` gives the kernels back.

    Args:
        adapted: a tree in stage "router" or a domain's.

    Returns:
        The tree with other kernels.

    Raises:
        ValueError: the stage trains the universal expert, it is folded already, or has
            a gate.
    """
    found = domain_nodes(adapted)
    for node in found:
        options = options_of(node)
        if not is_residual(node) or options["folded"]:
            why = "is folded already" if is_residual(node) else "has a gate of its own"
            raise ValueError(
                f"the universal expert at {node.site.path!r} {why}, so it cannot be "
                "folded into the kernel."
            )
        if options["stage"] in ("all", "universal"):
            raise ValueError(
                f"stage {options['stage']!r} trains the universal expert; write "
                "fold_universal(stage(adapted, 'router'))."
            )

    def change(node):
        node = with_options(node, folded=True)
        return node.replace(base=fold_base(node))

    return rebuilt(adapted, change)
