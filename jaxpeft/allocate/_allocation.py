"""How much rank each site gets: plain data that ``attach`` takes."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxpeft.tree import (
    BATCH,
    Adapter,
    Factors,
    Targets,
    attach,
    matrix_shape,
    module_path,
    nodes,
    unit_scale,
)


class SiteRank(NamedTuple):
    """What one site gets; of a stack of layers a tuple with one entry a layer.

    Attributes:
        rank: at least 0; 0: no adapter.
        alpha: the adapter's alpha, 0 where the rank is.
        components: which components are trained, rising; ``None``: all.
    """

    rank: int | tuple[int, ...]
    alpha: float | tuple[float, ...]
    components: tuple | None = None

    def layers(self) -> list[tuple[int, float]]:
        """``(rank, alpha)`` of each layer; of a kernel alone, one."""
        if isinstance(self.rank, int):
            return [(self.rank, self.alpha)]
        return list(zip(self.rank, self.alpha, strict=True))


class KernelShape(NamedTuple):
    """A kernel that can be adapted.

    Attributes:
        layers: how many are stacked; ``None``: it is alone.
        d_in: input features.
        d_out: output features.
    """

    layers: int | None
    d_in: int
    d_out: int


@dataclasses.dataclass(frozen=True)
class Allocation(Mapping):
    """Ranks and alphas by site; a mapping that does not change.

    Plain Python data: hashable, comparable, of use as ``targets`` of
    ``jaxpeft.attach``. ``print`` shows ranks by layer and module.

    Attributes:
        sites: ``((path, SiteRank), ...)``, in the order of the tree.
        facts: JSON-able, how this came about: a table of rows under ``"layers"``,
            and under ``"legend"`` what its remarks mean, ``{remark: text}``. Two
            allocations are equal whatever their facts.

    Example:
        >>> sites = {"layer_0/q/kernel": SiteRank(4, 8.0), "layer_1/q/kernel":
        ...     SiteRank(1, 2.0)}
        >>> print(Allocation.of(sites))
        layer  q
            0  4
            1  1
    """

    sites: tuple[tuple[str, SiteRank], ...]
    facts: dict[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def of(
        cls, sites: Mapping[str, SiteRank], facts: Mapping[str, Any] | None = None
    ) -> "Allocation":
        """Builds one from ``{path: SiteRank}``.

        Args:
            sites: paths of kernels, and what they get.
            facts: JSON-able.

        Raises:
            ValueError: a rank is no integer from 0 up, an alpha does not go with its
                rank, or the lengths of a stack's tuples differ.
        """
        for path, site in sites.items():
            _check(path, site)
        return cls(tuple(sites.items()), dict(facts or {}))

    def __getitem__(self, path: str) -> SiteRank:
        """What a site gets."""
        return dict(self.sites)[path]

    def __iter__(self) -> Iterator[str]:
        """Paths."""
        return iter(dict(self.sites))

    def __len__(self) -> int:
        """The number of sites, those of rank 0 among them."""
        return len(self.sites)

    def attach_arguments(self, paths: list[str], adapter: Adapter):
        """``(targets, rank_pattern, alpha_pattern, kept)``, for ``attach``.

        Where components are chosen, ranks are those that they were chosen out of,
        ``facts["out_of"]``, or else those up to the last of them, and alphas those of
        the same scale; ``kept`` says which of them stay.
        """
        inner = {path.removeprefix("params/"): path for path in paths}
        ranks, alphas, kept = {}, {}, {}
        for path, site in self.sites:
            each = [rank for rank, _ in site.layers()]
            if not any(each):
                continue
            at = path if path in paths else inner.get(path)
            if at is None:
                raise ValueError(
                    f"`targets` allocates a rank to {path!r}, which is not in the "
                    f"tree; its leaves are named like {paths[:3]}"
                )
            ranks[at], alphas[at] = site.rank, site.alpha
            if site.components is not None:
                stacked = isinstance(site.rank, tuple)
                kept[at] = site.components if stacked else (site.components,)
                whole = self.facts.get("out_of", {}).get(path) or [0] * len(each)
                ranks[at] = tuple(
                    max(*x, all_of_them - 1) + 1 if x else 0
                    for x, all_of_them in zip(kept[at], whole, strict=True)
                )
                alphas[at] = tuple(
                    alpha
                    and alpha * unit_scale(adapter, rank) / unit_scale(adapter, top)
                    for (rank, alpha), top in zip(site.layers(), ranks[at], strict=True)
                )
            if (
                adapter.where.rank is not None and adapter.where.alpha is None
            ):  # the scale is 1
                if any(rank != alpha for rank, alpha in site.layers()):
                    raise ValueError(
                        f"`targets` gives {path!r} alpha {site.alpha} at rank "
                        f"{site.rank}, and {adapter.name!r} has no alpha: its scale is "
                        "1, alpha = rank"
                    )
        if not ranks:
            raise ValueError("`targets` gives every site rank 0: nothing to attach")

        def allocated(path: str, leaf: Any) -> bool:
            return path in ranks

        fixed = adapter.where.rank is not None and adapter.where.alpha is None
        return allocated, ranks, None if fixed else alphas, kept

    def ranks(self) -> dict[str, int | tuple[int, ...]]:
        """``{path: rank}``."""
        return {path: site.rank for path, site in self.sites}

    def count(self, shapes: Mapping[str, KernelShape]) -> int:
        """The parameters of a plain low-rank pair of these ranks.

        Args:
            shapes: of ``kernel_shapes``.

        Returns:
            The sum of ``rank * (d_in + d_out)`` over sites and layers.
        """
        return sum(
            rank * (shapes[path].d_in + shapes[path].d_out)
            for path, site in self.sites
            for rank, _ in site.layers()
        )

    def to_json(self) -> str:
        """Returns JSON that ``from_json`` reads."""
        sites = {path: site._asdict() for path, site in self.sites}
        return json.dumps({"sites": sites, "facts": self.facts}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Allocation":
        """Reads what ``to_json`` wrote."""
        read = json.loads(text)
        tuples = lambda x: tuple(map(tuples, x)) if isinstance(x, list) else x
        sites = {
            path: SiteRank(**{name: tuples(x) for name, x in site.items()})
            for path, site in read["sites"].items()
        }
        return cls.of(sites, read["facts"])

    def save(self, file: str | Path) -> None:
        """Writes the JSON to a file."""
        Path(file).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> "Allocation":
        """Reads the JSON of a file."""
        return cls.from_json(Path(file).read_text(encoding="utf-8"))

    def grid(self) -> tuple[list[str], list[str], list[list[int | None]]]:
        """Returns ``(layers, modules, ranks)``, ``ranks[layer][module]``; a map."""
        found: dict[tuple[str, str], int] = {}
        for path, site in self.sites:
            name, own = module_path(path), layer_of(path)
            if own is not None:
                name = _without_layer(name)
            each = site.layers()
            for i, (rank, _) in enumerate(each):
                stacked = isinstance(site.rank, tuple)
                layer = str(i) if stacked else "-" if own is None else str(own)
                found[layer, name] = rank
        layers = list(dict.fromkeys(layer for layer, _ in found))
        layers.sort(key=lambda layer: -1 if layer == "-" else int(layer))
        modules = list(dict.fromkeys(name for _, name in found))
        rows = [[found.get((layer, name)) for name in modules] for layer in layers]
        return layers, modules, rows

    def __str__(self) -> str:
        """Ranks by layer and module, and below it the facts."""
        layers, modules, rows = self.grid()
        table = [["layer", *modules]]
        for layer, row in zip(layers, rows, strict=True):
            table.append([layer, *("." if r is None else str(r) for r in row)])
        lines = _aligned(table)
        if facts := self.facts.get("layers"):
            lines += ["", *_aligned([list(facts[0]), *map(_shown, facts)])]
        lines += [f"{word}: {x}" for word, x in self.facts.get("legend", {}).items()]
        return "\n".join(lines)


def kernel_shapes(
    params: PyTree,
    targets: Targets,
    *,
    exclude: Targets | None = None,
    axes: Mapping[str, str] | None = None,
) -> dict[str, KernelShape]:
    """Returns the kernels that ``attach`` would find, by path: input of allocators.

    Args:
        params: as in ``attach``; shapes will do.
        targets: as in ``attach``.
        exclude: as in ``attach``.
        axes: as in ``attach``.

    Returns:
        ``{path: KernelShape}`` in the order of the tree.

    Raises:
        ValueError: as of ``attach``.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel_shapes({"q": {"kernel": jnp.ones((4, 6))}}, ["q"])
        {'q/kernel': KernelShape(layers=None, d_in=4, d_out=6)}
    """
    probe = Adapter(
        init=lambda key, kernel, rank, alpha: ({}, {}),
        factors=lambda kernel, frozen, trainable, call: Factors(),
        name="kernel_shapes",
    )
    key = jax.random.key(0)  # draws nothing
    tree = jax.eval_shape(
        lambda p: attach(p, probe, targets, key=key, exclude=exclude, axes=axes),
        params,
    )
    found = {}
    for node in nodes(tree):
        if node.adapter is probe:
            layers, d_in, d_out = matrix_shape(node.base.shape, node.roles)
            stacked = BATCH in node.roles
            found[node.site.path] = KernelShape(
                layers if stacked else None, d_in, d_out
            )
    return found


def layer_of(path: str) -> int | None:
    """The layer that a path names: its first part that is or ends in a number.

    Example:
        >>> layer_of("encoder/layer_3/query/kernel"), layer_of("blocks/12/q/kernel")
        (3, 12)
        >>> layer_of("layers/layer/q/kernel") is None
        True
    """
    for part in path.split("/")[:-1]:
        if match := re.fullmatch(r"(?:.*_)?(\d+)", part):
            return int(match[1])
    return None


def _check(path: str, site: SiteRank) -> None:
    if isinstance(site.rank, tuple) != isinstance(site.alpha, tuple) or (
        isinstance(site.rank, tuple) and len(site.rank) != len(site.alpha)
    ):
        raise ValueError(
            f"site {path!r}: `rank` and `alpha` must both be numbers, or tuples with "
            f"one entry a layer, got {site.rank} and {site.alpha}"
        )
    if site.components is not None:
        stacked = isinstance(site.rank, tuple)
        each = site.components if stacked else (site.components,)
        sizes = [len(x) for x in each]
        rising = all(list(x) == sorted({*x}) and min(x, default=0) >= 0 for x in each)
        if not rising or sizes != [rank for rank, _ in site.layers()]:
            raise ValueError(
                f"site {path!r}: `components` must be as many as its rank, rising, a "
                f"tuple for each layer of a stack; got {site.components} at rank "
                f"{site.rank}"
            )
    for rank, alpha in site.layers():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(
                f"site {path!r}: `rank` must be an integer from 0 up, got {rank!r}"
            )
        if not (0 < alpha < float("inf") if rank else alpha == 0):
            raise ValueError(
                f"site {path!r}: `alpha` must be positive and finite, 0 at rank 0; got "
                f"{alpha!r} at rank {rank}"
            )


def _without_layer(name: str) -> str:
    """A module's name without the parts up to its layer's number."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        if re.fullmatch(r"(?:.*_)?\d+", part):
            return "/".join(parts[i + 1 :]) or name
    return name


def _shown(row: Mapping[str, Any]) -> list[str]:
    return [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pad = lambda row: (x.rjust(w) for x, w in zip(row, widths, strict=True))
    return ["  ".join(pad(row)).rstrip() for row in table]
