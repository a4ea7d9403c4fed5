"""Several adapters on one kernel: one node, whose method is made of its parts' methods.

The leaves of the part named ``"default"`` keep their names, and those of the part
``"french"`` are ``french:a``, ``french:b``, and so on. Splitting, checkpoints, sharding
and merging see a node like any other. What depends on one method (its ranks, penalty,
report, numbers) is asked of each part: ``parts_of`` takes the node apart, ``together``
joins parts. The joined node's own ``site.ranks`` is ``None``.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxpeft.tree._adapter import Adapter, Options, Where
from jaxpeft.tree._change import structure
from jaxpeft.tree._lift import number_leaves
from jaxpeft.tree._node import AdaptedKernel, Site
from jaxpeft.tree._terms import Factors

DEFAULT = "default"


class Part(NamedTuple):
    """One adapter of a site with several.

    Attributes:
        name: its name.
        adapter: its method.
        ranks: of each layer, or ``None``.
    """

    name: str
    adapter: Adapter
    ranks: tuple[int, ...] | None

    @property
    def rank(self) -> int | None:
        """The largest rank of its layers, to which the leaves of a stack are padded."""
        return None if self.ranks is None else max(self.ranks)

    def own(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """This part's leaves, by the names that its method knows."""
        if self.name == DEFAULT:
            return {n: x for n, x in leaves.items() if ":" not in n}
        start = f"{self.name}:"
        return {n[len(start) :]: x for n, x in leaves.items() if n.startswith(start)}

    def named(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``own``: leaves by the names that the joined node has."""
        if self.name == DEFAULT:
            return dict(leaves)
        return {f"{self.name}:{n}": x for n, x in leaves.items()}

    @property
    def salt(self) -> int:
        """A number that makes this part's random draws differ from other parts'."""
        # 0 for the default, which draws as it would alone.
        return 0 if self.name == DEFAULT else _digest(self.name)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class _OwnCall:
    """A call as one part sees it, with a ``step_key`` of its own.

    Dropout on inputs has ``key``, which is the site's; there ``Term.salt`` tells the
    parts' masks apart.
    """

    def __init__(self, call: Any, salt: int) -> None:
        self._call, self._salt = call, salt

    def __getattr__(self, name: str) -> Any:
        x = getattr(self._call, name)
        if name != "step_key" or x is None or not self._salt:
            return x
        return jax.random.fold_in(x, self._salt)


@functools.cache
def several(parts: tuple[Part, ...]) -> Adapter:
    """The method whose change of a kernel is the sum of its parts' changes.

    ``attach(..., name="french")`` makes it. Files do not know it: they hold each part
    as a method of its own.
    """

    def init(key, kernel, rank, alpha):
        # Traced for shapes alone: leaves come from the parts, as each is attached.
        del rank, alpha
        frozen, trainable = {}, {}
        for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
            made = part.adapter.init(own, kernel, part.rank, part.adapter.where.alpha)
            numbers = number_leaves(part.adapter, kernel.dtype)
            frozen |= part.named({**made[0], **numbers})
            trainable |= part.named(made[1])
        return frozen, trainable

    def factors(kernel, frozen, trainable, call):
        each = [
            part.adapter.factors(
                kernel,
                part.own(frozen),
                part.own(trainable),
                _OwnCall(call, part.salt),
            )
            for part in parts
        ]
        # At most one part scales or has a kernel, see `check_sharing`, and then alone.
        terms = sum((_salted(f, p.salt) for f, p in zip(each, parts, strict=True)), ())
        scales = {
            name: next((x for f in each if (x := getattr(f, name)) is not None), None)
            for name in ("c", "o", "kernel")
        }
        return Factors(terms, **scales)

    def shared(key, d_in, d_out, rank, dtype):
        del rank
        made = {}
        for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
            if part.adapter.shared is not None:
                sizes = {"d_in": d_in, "d_out": d_out, "rank": part.rank}
                made |= part.named(part.adapter.shared(own, dtype=dtype, **sizes))
        return made

    def folded(frozen):
        (part,) = parts  # what folds does not share a kernel
        terms = part.adapter.folded
        return () if terms is None else terms(part.own(frozen))

    first = parts[0].adapter
    return Adapter(
        init=init,
        factors=factors,
        where=Where(leaf=first.where.leaf, bias=first.where.bias),
        folded=None if first.folded is None else folded,
        shared=shared if any(p.adapter.shared for p in parts) else None,
        name="several",
        options=Options((("parts", parts),), constructor=several),
    )


def _salted(factors: Factors, salt: int):
    if not salt:
        return factors.terms
    return tuple(dataclasses.replace(term, salt=salt) for term in factors.terms)


def is_several(node: AdaptedKernel) -> bool:
    """Whether a site has adapters with names, be it only one."""
    return node.adapter.options.constructor is several


def parts_of(node: AdaptedKernel) -> dict[str, AdaptedKernel]:
    """Each adapter of a site, by name, as a node that has this adapter alone."""
    if not is_several(node):
        return {DEFAULT: node}
    parts = node.adapter.options["parts"]
    return {
        part.name: node.replace(
            frozen=part.own(node.frozen),
            trainable=part.own(node.trainable),
            adapter=part.adapter,
            site=_site_of(part, node.site),
        )
        for part in parts
    }


def _site_of(part: Part, site: Site) -> Site:
    """A part's own site: what is told of it is its own, the rest is the node's."""
    told = site.each.get(part.name, site)
    return dataclasses.replace(told, path=site.path, roles=site.roles, ranks=part.ranks)


def together(nodes: Mapping[str, AdaptedKernel]) -> AdaptedKernel:
    """Joins adapters of one kernel in one node; the inverse of ``parts_of``.

    Args:
        nodes: each adapter's node by its name, all of one kernel. The kernel, and what
            a call added, are taken from the first.

    Raises:
        ValueError: a name that cannot be one, or adapters that cannot share a kernel.
    """
    first = next(iter(nodes.values()))
    for name in nodes:
        check_name(name)
    # An adapter alone, without a name: its leaves have no prefix, as in older trees.
    if list(nodes) == [DEFAULT]:
        return first
    parts = tuple(Part(n, x.adapter, x.site.ranks) for n, x in nodes.items())
    check_sharing(first.site.path, {p.name: (p.adapter, p.rank) for p in parts})
    merged = lambda field: {
        name: x
        for part, node in zip(parts, nodes.values(), strict=True)
        for name, x in part.named(getattr(node, field)).items()
    }
    return first.replace(
        frozen=merged("frozen"),
        trainable=merged("trainable"),
        adapter=several(parts),
        site=dataclasses.replace(
            first.site, ranks=None, each={name: x.site for name, x in nodes.items()}
        ),
    )


def check_name(name: Any) -> None:
    """Raises unless an adapter may have this name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(
            f"an adapter's `name` must be made of letters, digits, '_', '.' and '-', "
            f"got {name!r}; write name='french'"
        )


def check_sharing(path: str, methods: Mapping[str, tuple[Adapter, Any]]) -> None:
    """Raises unless the changes of several adapters may be added up.

    Args:
        path: the site.
        methods: ``{name: (method, its rank)}``.

    Raises:
        ValueError: one of several does more than add thin products, has folded terms
            into the kernel, or two of them report what their gates did.
    """
    if len(methods) == 1:
        return
    gated = []  # reports are gathered by site, so one adapter of a site may make them
    for name, (adapter, rank) in methods.items():
        who = f"site {path!r}: adapter {name!r}, {adapter.name!r}, "
        found = structure(adapter, rank)
        why = ""
        if adapter.where.leaf != "kernel" or found.factors.kernel is not None:
            why = "trains the leaf itself"
        elif found.scales:
            why = "scales the kernel's inputs or outputs"
        elif found.folded:
            why = "has folded a part of its change into the kernel"
        if why:
            raise ValueError(
                f"{who}{why}, so it cannot share a kernel with another adapter, "
                f"{[n for n in methods if n != name]}; a method that only adds thin "
                "products can, such as jaxpeft.lora()"
            )
        gates = [term.gate for term in found.factors.terms if term.gate is not None]
        gated += [name] if any(g.names or g.report is not None for g in gates) else []
    if len(gated) > 1:
        raise ValueError(
            f"site {path!r}: adapters {gated} all have experts, whose gates are "
            "reported by site; let one of them sit elsewhere"
        )
