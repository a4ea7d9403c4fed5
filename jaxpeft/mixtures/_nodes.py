"""The sites of a tree that carry named experts, and their adapters' options."""

from jaxtyping import PyTree

from jaxpeft.tree import AdaptedKernel, map_nodes, nodes, options_of


def has_domains(node: AdaptedKernel) -> bool:
    """Whether a node carries experts of domains."""
    return "domains" in options_of(node)


def is_residual(node: AdaptedKernel) -> bool:
    """Whether domains read the universal expert's output, which has no gate."""
    return "slope" in options_of(node)


def domain_nodes(adapted: PyTree) -> list[AdaptedKernel]:
    """The nodes with domains, which are the same domains everywhere.

    Raises:
        ValueError: there are none, or sites differ in their domains or stage.
    """
    found = [node for node in nodes(adapted) if has_domains(node)]
    if not found:
        raise ValueError(
            "`adapted` has no site with domains; attach "
            "jaxpeft.modula_res(domains=('law', 'code')) or another method with a "
            "`domains` option."
        )
    for option in ("domains", "stage", "inactive"):
        values = {options_of(node)[option]: node.site.path for node in found}
        if len(values) > 1:
            raise ValueError(
                f"sites differ in `{option}`: "
                + "; ".join(f"{v!r} at {path!r}" for v, path in values.items())
                + ". Attach all of them with one call, or one after another with equal "
                "options."
            )
    return found


def known_domain(adapted: PyTree, name: str) -> tuple[str, ...]:
    """The tree's domains, among which ``name`` is."""
    domains = options_of(domain_nodes(adapted)[0])["domains"]
    if name not in domains:
        raise ValueError(
            f"`name` {name!r} is no domain of the tree; there are {list(domains)}. "
            "jaxpeft.mixtures.add_domain makes a new one."
        )
    return domains


def rebuilt(adapted: PyTree, change) -> PyTree:
    """Maps ``change(node) -> node`` over the sites with domains."""
    return map_nodes(lambda node: change(node) if has_domains(node) else node, adapted)
