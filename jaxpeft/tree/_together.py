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
import jax.numpy as jnp

from jaxpeft.tree._adapter import Adapter, Call, Options, Where
from jaxpeft.tree._change import structure
from jaxpeft.tree._lift import init_shapes
from jaxpeft.tree._node import AdaptedKernel, Site, nodes

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

    @property
    def start(self) -> str:
        """What the names of this part's leaves begin with."""
        return "" if self.name == DEFAULT else f"{self.name}:"

    def own(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """This part's leaves, by the names that its method knows."""
        mine = lambda n: n[: n.find(":") + 1] == self.start  # "" without a colon
        return {n.removeprefix(self.start): x for n, x in leaves.items() if mine(n)}

    def named(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``own``: leaves by the names that the joined node has."""
        return {self.start + n: x for n, x in leaves.items()}

    @property
    def salt(self) -> int:
        """A number that makes this part's random draws differ from other parts'."""
        if self.name == DEFAULT:
            return 0  # it draws as it would alone
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "little")


def _own_call(call: Any, salt: int) -> Any:
    """A call as one part sees it, with a ``step_key`` of its own.

    Dropout on inputs has ``key``, which is the site's; there ``Term.salt`` tells the
    parts' masks apart.
    """
    # In place of a `Call` there may be what notes the entries that a part reads.
    if not salt or not isinstance(call, Call) or call.step_key is None:
        return call
    return call._replace(step_key=jax.random.fold_in(call.step_key, salt))


@functools.cache
def several(parts: tuple[Part, ...]) -> Adapter:
    """The method whose change of a kernel is the sum of its parts' changes.

    ``attach(..., name="french")`` makes it. Files do not know it: they hold each part
    as a method of its own.
    """

    # The first two are traced for shapes alone: leaves come from each part's own.
    def init(key, kernel, rank, alpha):
        del key, rank, alpha
        frozen, trainable = {}, {}
        for part in parts:
            own = init_shapes(part.adapter, *kernel.shape, part.rank, kernel.dtype)
            frozen |= part.named(own[0])
            trainable |= part.named(own[1])
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        return jax.tree.map(zeros, (frozen, trainable))

    def shared(key, d_in, d_out, rank, dtype):
        del rank
        made = {}
        for part, own in zip(parts, jax.random.split(key, len(parts)), strict=True):
            if (draw := part.adapter.shared) is not None:
                made |= part.named(draw(own, d_in, d_out, part.rank, dtype))
        return made

    def factors(kernel, frozen, trainable, call):
        each = [
            part.adapter.factors(
                kernel,
                part.own(frozen),
                part.own(trainable),
                _own_call(call, part.salt),
            )
            for part in parts
        ]
        terms = tuple(
            dataclasses.replace(term, salt=part.salt)
            for part, made in zip(parts, each, strict=True)
            for term in made.terms
        )
        # What scales, or has a kernel, is the only part: see `check_sharing`.
        return dataclasses.replace(each[0], terms=terms)

    first = parts[0].adapter
    fold = first.folded  # what folds does not share a kernel
    return Adapter(
        init=init,
        factors=factors,
        where=Where(leaf=first.where.leaf, bias=first.where.bias),
        folded=None if fold is None else lambda frozen: fold(parts[0].own(frozen)),
        shared=shared if any(p.adapter.shared for p in parts) else None,
        name=" and ".join(f"{p.name} ({p.adapter.name})" for p in parts),  # told
        options=Options((("parts", parts),), constructor=several),
    )


def is_several(node: AdaptedKernel) -> bool:
    """Whether a site has adapters with names, be it only one."""
    return node.adapter.options.constructor is several


def named_parts(tree: Any) -> list[tuple[str, AdaptedKernel]]:
    """``parts_of`` every site of a tree: ``(name, node)`` of each adapter."""
    return [pair for node in nodes(tree) for pair in parts_of(node).items()]


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


def together(each: Mapping[str, AdaptedKernel]) -> AdaptedKernel:
    """Joins adapters of one kernel in one node; the inverse of ``parts_of``.

    Args:
        each: every adapter's node by its name, all of one kernel. The kernel, and what
            a call added, are taken from the first.

    Raises:
        ValueError: a name that cannot be one, or adapters that cannot share a kernel.
    """
    first = next(iter(each.values()))
    for name in each:
        check_name(name)
    # An adapter alone, without a name: its leaves have no prefix, as in older trees.
    if list(each) == [DEFAULT]:
        return first
    parts = tuple(Part(n, x.adapter, x.site.ranks) for n, x in each.items())
    check_sharing(first.site.path, {p.name: (p.adapter, p.rank) for p in parts})
    merged = lambda field: {
        name: x
        for part, node in zip(parts, each.values(), strict=True)
        for name, x in part.named(getattr(node, field)).items()
    }
    return first.replace(
        frozen=merged("frozen"),
        trainable=merged("trainable"),
        adapter=several(parts),
        site=dataclasses.replace(
            first.site, ranks=None, each={name: x.site for name, x in each.items()}
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
