"""``describe``: which sites a tree has, what found them, and what sits there."""

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from jaxpeft.tree._lift import per_layer
from jaxpeft.tree._node import AdaptedKernel
from jaxpeft.tree._numbers import alphas_of, is_concrete
from jaxpeft.tree._together import DEFAULT, named_parts
from jaxpeft.tree._tree import count, trainable_size


@dataclasses.dataclass(frozen=True)
class Description:
    """What ``describe`` found; prints as tables.

    Attributes:
        rows: one dict per adapter and site: ``path``, ``name``, ``method``, ``shape``,
            ``roles``, ``ranks``, ``alphas``, ``trainable`` (a count), ``pattern``.
        patterns: ``{entry of targets: [paths that it found]}``.
        trainable: number of trained values.
        total: number of values of base and adapters.
        report: one dict per site and layer with the methods' own facts (KaSA: the
            drift of the truncated base), largest first; empty for abstract trees.
    """

    rows: tuple[dict[str, Any], ...]
    patterns: dict[str, list[str]]
    trainable: int
    total: int
    report: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        named = any(row["name"] != DEFAULT for row in self.rows)
        head = ("site", *(["name"] if named else []), "method", "shape", "rank")
        head += ("alpha", "trainable", "found by")
        body = [
            (
                row["path"],
                *([row["name"]] if named else []),
                row["method"],
                " x ".join(f"{s}" for s in row["shape"]),
                _short(row["ranks"]),
                _short(row["alphas"]),
                f"{row['trainable']:,}",
                row["pattern"],
            )
            for row in self.rows
        ]
        parts = [_table(head, body)]
        found = [(p, str(len(s)), s[0], s[-1]) for p, s in self.patterns.items()]
        parts.append(_table(("pattern", "sites", "first", "last"), found))
        if self.report:
            names = list(dict.fromkeys(n for row in self.report for n in row))
            cells = [tuple(_cell(row.get(n)) for n in names) for row in self.report]
            parts.append(_table(tuple(names), cells))
        share = self.trainable / max(self.total, 1)
        parts.append(
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.3%})"
        )
        return "\n\n".join(parts)

    __repr__ = __str__


def describe(adapted: PyTree) -> Description:
    """Lists every site of an adapted tree.

    Args:
        adapted: a tree made by ``attach``, or its shapes under ``jax.eval_shape``.

    Returns:
        A ``Description``; print it.
    """
    rows, patterns, report = [], {}, []
    each = named_parts(adapted)
    named = any(name != DEFAULT for name, _ in each)
    for name, node in each:
        site = node.site
        patterns.setdefault(site.pattern, []).append(site.path)
        rows.append(
            {
                "path": site.path,
                "name": name,
                "method": node.adapter.name,
                "shape": tuple(node.base.shape),
                "roles": site.roles,
                "ranks": site.ranks,
                "alphas": alphas_of(node) or site.alphas,
                "trainable": trainable_size(node),
                "pattern": site.pattern,
            }
        )
        report += _report(node, {"name": name} if named else {})
    trained, total = count(adapted)
    where = ("site", "name", "layer")
    facts = [n for n in (report[0] if report else {}) if n not in where]
    if facts:  # the method's first fact is its headline
        report.sort(key=lambda row: -row.get(facts[0], 0.0))
    return Description(tuple(rows), patterns, trained, total, tuple(report))


def _report(node: AdaptedKernel, name: dict[str, str]) -> list[dict[str, Any]]:
    """The method's facts for each layer; ``name`` is said where adapters have one."""
    if node.adapter.report is None or not all(map(is_concrete, jax.tree.leaves(node))):
        return []
    facts = jax.device_get(per_layer(node, node.adapter.report))
    ranks, layers = node.site.ranks or (), range(len(next(iter(facts.values()))))
    if 0 in ranks:  # which has nothing to report
        layers = [i for i, rank in enumerate(ranks) if rank]
    return [
        {
            "site": node.site.path,
            **name,
            **({"layer": layer} if 0 in ranks or len(layers) > 1 else {}),
            **{name: values[i].item() for name, values in facts.items()},
        }
        for i, layer in enumerate(layers)
    ]


def _short(values) -> str:
    if values is None:
        return "-"
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        layers = f" x {len(values)}" if len(values) > 1 else ""
        return f"{distinct[0]:g}{layers}"
    return ",".join(f"{v:g}" for v in values)


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head, body) -> str:
    columns = list(zip(head, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, tuple("-" * w for w in widths), *body)
    ]
    return "\n".join(line.rstrip() for line in lines)
