"""One domain in one file: its leaves, where they sit, and what they stand on."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxpeft.mixtures._domains import new_domain, with_new_domain
from jaxpeft.mixtures._nodes import domain_nodes, is_residual, known_domain
from jaxpeft.numerics import checksum
from jaxpeft.parts import UNIVERSAL
from jaxpeft.tree import AdaptedKernel, alphas_of, grouped, options_of

FORMAT, VERSION = "jaxpeft.domain", 1


def export_domain(adapted: PyTree, name: str, file: str | Path) -> Path:
    """Writes one domain's expert to a file, bit for bit.

    In it are the leaves of every site with the column of the router; ranks, alphas and
    the method's settings; and fingerprints of the base kernels and of the universal
    expert, by which ``import_domain`` knows that it fits.

    Args:
        adapted: a tree with a method that has domains.
        name: one of its domains.
        file: a new file, ``law.npz``.

    Returns:
        The file.

    Raises:
        ValueError: there is no such domain, or the universal expert is folded.
        FileExistsError: the file is there already.
    """
    known_domain(adapted, name)
    file = Path(file)
    if file.exists():
        raise FileExistsError(f"`file` {str(file)!r} exists; choose another name.")
    arrays: dict[str, np.ndarray] = {}
    sites = []
    for node in domain_nodes(adapted):
        if options_of(node).get("folded"):
            raise ValueError(
                "the universal expert is folded into the kernels; export from the tree "
                "before fold_universal."
            )
        entry = _facts(node) | {"path": node.site.path, "leaves": {}}
        for leaf, x in {**node.frozen, **node.trainable}.items():
            kind, _, expert = leaf.partition(".")
            if expert == name:
                entry["leaves"][kind] = str(len(arrays))
                arrays[str(len(arrays))] = np.asarray(jax.device_get(x))
        sites.append(entry)
    facts = {"format": FORMAT, "version": VERSION, "name": name, "sites": sites}
    with file.open("wb") as f:
        np.savez(f, facts=np.array(json.dumps(facts)), **arrays)
    return file


def _facts(node: AdaptedKernel) -> dict[str, Any]:
    """What must be equal where a domain goes."""
    options, leaves = options_of(node), {**node.frozen, **node.trainable}
    universal = [checksum(leaves[f"{kind}.{UNIVERSAL}"]) for kind in ("a", "b")]
    return {
        "method": node.adapter.name,
        "shape": list(node.base.shape),
        "ranks": list(node.site.ranks),
        "alphas": None if (alphas := alphas_of(node)) is None else list(alphas),
        "settings": {n: options[n] for n in ("alpha", "slope") if n in options},
        "base": [
            getattr(node.base, "kind", node.base.dtype.name),
            checksum(node.base),
        ],
        # A domain beside the universal expert does not depend on it.
        "universal": universal if is_residual(node) else None,
    }


def import_domain(
    adapted: PyTree,
    file: str | Path,
    *,
    name: str | None = None,
    check_base: bool = True,
) -> PyTree:
    """Adds a domain that ``export_domain`` wrote, last in order.

    As after ``add_domain``, no token is routed to it until stage "router".

    Args:
        adapted: a tree with the same method at the same sites.
        file: the file.
        name: its name here; ``None``: the one it had.
        check_base: compare the base kernels' dtype and fingerprints. That of a
            universal expert which the domain stands behind is always compared.

    Returns:
        The tree with the domain; all other leaves are the same arrays.

    Raises:
        ValueError: it is no such file or damaged, or the domain does not fit; all
            reasons are listed.
    """
    facts, arrays = _read(Path(file))
    name = facts["name"] if name is None else name
    new_domain(adapted, name)
    found = {node.site.path: node for node in domain_nodes(adapted)}
    theirs = {entry["path"]: entry for entry in facts["sites"]}
    problems = [f"{p!r} is not in the file" for p in found if p not in theirs]
    problems += [f"{p!r} has no domains here" for p in theirs if p not in found]
    for path in found.keys() & theirs.keys():
        problems += _differences(_facts(found[path]), theirs[path], check_base)
    if problems:
        raise ValueError(
            f"domain {facts['name']!r} of {str(file)!r} does not fit; nothing was "
            "added:\n  " + grouped(sorted(problems))
        )

    def leaves_of(node):
        leaves = theirs[node.site.path]["leaves"]
        return {f"{kind}.{name}": jnp.asarray(arrays[i]) for kind, i in leaves.items()}

    return with_new_domain(adapted, name, leaves_of)


def _differences(ours, theirs, check_base: bool) -> list[str]:
    problems, path = [], theirs["path"]
    for fact, value in ours.items():
        if value == theirs[fact] or (fact == "base" and not check_base):
            continue
        if fact == "base":
            why = "another base kernel; check_base=False adds it all the same"
        elif fact == "universal":
            why = "another universal expert, without which the domain means nothing"
        else:
            why = f"{fact} {theirs[fact]!r}, here {value!r}"
        problems.append(f"{path!r}: it was trained with {why}")
    return problems


def _read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(file, allow_pickle=False) as data:
            facts = json.loads(str(data["facts"]))
            arrays = {name: data[name] for name in data.files if name != "facts"}
        known = (facts["format"], facts["version"]) == (FORMAT, VERSION)
    except FileNotFoundError:
        raise
    except Exception as e:
        raise ValueError(f"{str(file)!r} is no file of export_domain: {e!r}") from e
    if not known:
        raise ValueError(
            f"{str(file)!r} is of format {facts['format']!r}, version "
            f"{facts['version']!r}; this reads {FORMAT!r}, version {VERSION}."
        )
    bad = [
        f"{entry['path']}/{leaf}"
        for entry in facts["sites"]
        for leaf, i in entry["leaves"].items()
        if not np.isfinite(arrays[i]).all()
    ]
    if bad:
        raise ValueError(f"{str(file)!r} has leaves that are not finite: {bad}.")
    return facts, arrays
