"""Domains come and go; the leaves of all others keep their bytes."""

from jaxtyping import Array, Key, PyTree

from jaxpeft.mixtures._nodes import (
    domain_nodes,
    is_residual,
    known_domain,
    rebuilt,
)
from jaxpeft.parts import check_domain, domain_of
from jaxpeft.tree import (
    AdaptedKernel,
    check_key,
    initialise,
    options_of,
    place_like,
    rebuild,
    site_key,
    with_options,
)


def add_domain(adapted: PyTree, name: str, *, key: Key[Array, ""]) -> PyTree:
    """Adds an expert for a new domain, last in order.

    It has fresh leaves and a new column of the router. Until stage "router" no token
    is routed to it, so the output stays what it was. Train it next:
    ``stage(adapted, "domain:NAME")``, then ``stage(adapted, "router")``.

    Args:
        adapted: a tree with a method that has domains.
        name: of letters, digits, "_" and "-"; none of the tree's.
        key: a typed key. The same key and name draw the same leaves, whichever other
            domains there are.

    Returns:
        The tree with the domain; all other leaves are the same arrays.

    Raises:
        ValueError: the name is taken or not possible, or the tree has no domains.
        TypeError: ``key`` is not a typed key.
    """
    new_domain(adapted, name)
    check_key(key)

    def drawn(node):
        alone = _alone(node, name)
        parts = initialise(
            site_key(key, node.site.path),
            node.base,
            adapter=alone,
            site=node.site,  # without alphas: their leaves are not taken
        )
        leaves = {**parts[0], **parts[1]}
        return {n: x for n, x in leaves.items() if n.partition(".")[2] == name}

    return with_new_domain(adapted, name, drawn)


def new_domain(adapted: PyTree, name: str) -> None:
    """Raises unless the tree can have a domain of this name."""
    check_domain(name)
    domains = options_of(domain_nodes(adapted)[0])["domains"]
    if name in domains:
        raise ValueError(
            f"the tree has a domain {name!r} already; it has {list(domains)}. Choose "
            "another name, or take it off first with remove_domain."
        )


def with_new_domain(adapted: PyTree, name: str, leaves_of) -> PyTree:
    """The tree with a domain whose leaves are ``leaves_of(node)``."""

    def change(node):
        options = options_of(node)
        gates = options["gates"]
        new = with_options(
            node,
            {**node.frozen, **node.trainable, **leaves_of(node)},
            domains=(*options["domains"], name),
            inactive=(*options["inactive"], name),
            gates=None if gates is None else (*gates, 0),
        )
        return place_like(new, node.base)

    return rebuilt(adapted, change)


def _alone(node: AdaptedKernel, name: str):
    """The node's method with this domain alone."""
    changes = {"stale": (), "folded": False} if is_residual(node) else {}
    return rebuild(
        node.adapter,
        domains=(name,),
        inactive=(),
        gates=None,
        stage="router",
        top_k=None,
        **changes,
    )


def remove_domain(adapted: PyTree, name: str) -> PyTree:
    """Takes a domain's expert and its column of the router off.

    The other gates add up to 1 again by themselves. ``remove_domain(add_domain(x))``
    is ``x``, leaf for leaf.

    Args:
        adapted: a tree with a method that has domains.
        name: one of its domains. In this domain's own stage, the tree is in stage
            "router" afterwards.

    Returns:
        The tree without the domain; all other leaves are the same arrays.

    Raises:
        ValueError: there is no such domain.
    """
    at = known_domain(adapted, name).index(name)

    def change(node):
        options = options_of(node)
        without = lambda names: tuple(n for n in names if n != name)
        gates = options["gates"]
        if gates is not None:
            gates = (*gates[: at + 1], *gates[at + 2 :])
        changes = {"stale": without(options["stale"])} if is_residual(node) else {}
        own = domain_of(options["stage"]) == name
        return with_options(
            node,
            domains=without(options["domains"]),
            inactive=without(options["inactive"]),
            gates=gates,
            stage="router" if own else options["stage"],
            **changes,
        )

    return rebuilt(adapted, change)


def rename_domain(adapted: PyTree, name: str, new: str) -> PyTree:
    """Gives a domain another name; its place in the order and its leaves stay.

    Args:
        adapted: a tree with a method that has domains.
        name: one of its domains.
        new: of letters, digits, "_" and "-"; none of the tree's.

    Returns:
        The tree with the new name in its leaves' names.

    Raises:
        ValueError: there is no such domain, or the new name is taken or not possible.
    """
    known_domain(adapted, name)
    new_domain(adapted, new)
    swap = lambda n: new if n == name else n

    def change(node):
        options = options_of(node)
        changes = {
            option: tuple(map(swap, options[option]))
            for option in ("domains", "inactive", "stale")
            if option in options
        }
        own = domain_of(options["stage"]) == name
        changes["stage"] = f"domain:{new}" if own else options["stage"]
        leaves = {}
        for leaf, x in {**node.frozen, **node.trainable}.items():
            kind, _, expert = leaf.partition(".")
            leaves[f"{kind}.{new}" if expert == name else leaf] = x
        return with_options(node, leaves, **changes)

    return rebuilt(adapted, change)


def domain_names(adapted: PyTree) -> tuple[str, ...]:
    """Returns the tree's domains, in the order of their gates.

    Args:
        adapted: a tree with a method that has domains.

    Returns:
        Their names; a universal expert is none of them.

    Raises:
        ValueError: the tree has none.
    """
    return options_of(domain_nodes(adapted)[0])["domains"]
