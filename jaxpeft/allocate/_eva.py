"""EVA (arXiv 2410.07170): ranks where few directions explain a kernel's inputs."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxpeft.allocate._allocation import Allocation, KernelShape, SiteRank
from jaxpeft.numerics import Spectrum
from jaxpeft.tree import BATCH, AdaptedKernel, lifted_factors, map_nodes, matrix_shape


def eva(
    shapes: Mapping[str, KernelShape],
    spectra: Mapping[str, Spectrum],
    *,
    rank: int | None = None,
    budget: int | None = None,
    alpha: int | float | None = None,
    rho: int | float = 2.0,
    adjust_alpha: bool = True,
    r_min: int = 0,
) -> Allocation:
    r"""Gives ranks to the directions that explain most of their kernel's inputs.

    With :math:`e_{sj}` the share of the variance of the inputs of site s along their
    j-th direction, the :math:`r_0 n` largest are kept over all n sites (a layer of a
    stack is one), at most :math:`\lfloor \rho r_0 + 1/2 \rfloor` at a site. A site has
    as many ranks as it keeps directions, 0 perhaps.

    Args:
        shapes: the sites, of ``kernel_shapes``.
        spectra: of each site's inputs, of ``spectrum``.
        rank: r_0, the mean rank; by default 8, or what the budget allows, which need
            not be whole.
        budget: parameters of plain low-rank pairs in all: directions are kept as long
            as they fit. For a comparison at equal size, ``other.count(shapes)``.
        alpha: the alpha of a site of rank r_0, r_0 by default.
        rho: how much of a mean rank one site may have, at least 1; 1: ``uniform``.
        adjust_alpha: alpha in proportion to a site's rank, so that all have one scale;
            False: ``alpha`` everywhere.
        r_min: the least rank.

    Returns:
        The allocation.

    Raises:
        ValueError: an argument outside of what is allowed, a site without a spectrum,
            or a budget below rank ``max(r_min, 1)`` everywhere.

    Example:
        >>> flat, steep = np.array([5, 5, 3, 3]) / 16, np.array([13, 1, 1, 1]) / 16
        >>> spectra = {n: Spectrum(e, np.eye(4), e) for n, e in
        ...     {"q": steep, "v": flat}.items()}
        >>> shapes = {name: KernelShape(None, 4, 4) for name in "qv"}
        >>> eva(shapes, spectra, rank=2).ranks()
        {'q': 1, 'v': 3}

    References:
        Paischer et al., One initialization to rule them all: Fine-tuning via explained
        variance adaptation, arXiv 2410.07170; defaults of huggingface/peft 0.21.

    Note:
        PEFT leaves out tokens without loss where a batch has labels; here the mask
        given to ``input_moments`` says which tokens count. PEFT stops when directions
        turn no more (``tau`` of
        ``gather_moments``); by default all batches count here.
    """
    each, count = _sizes(shapes)
    # The budget alone decides where there is no rank.
    left = None if rank is None and budget is not None else count * (rank or 8)
    rank = _mean_rank(each, rank, budget)
    if not shapes or rank < 1:
        raise ValueError(
            f"`rank` must be at least 1 and `shapes` have sites, got {rank} and "
            f"{len(shapes)}; rank 1 everywhere takes a `budget` of {each}"
        )
    if not rho >= 1 or not 0 <= r_min <= rank:
        raise ValueError(
            f"`rho` must be at least 1 and `r_min` from 0 to `rank` ({rank}), got "
            f"{rho} and {r_min}"
        )
    if budget is not None and r_min * each > budget:
        raise ValueError(
            f"`budget` {budget} is below the {r_min * each} parameters of rank "
            f"{r_min} everywhere"
        )
    most, rows = math.floor(rho * rank + 0.5), []
    for number, (path, shape) in enumerate(shapes.items()):
        ratios = _ratios(path, shape, spectra, most)
        for layer, e in enumerate(ratios):
            rows += [(j >= r_min, -x, number, layer, j) for j, x in enumerate(e)]
    # What r_min asks for first, then by share; ties by site, layer and direction.
    rows.sort()
    sites = list(shapes)
    kept = {path: [0] * (shape.layers or 1) for path, shape in shapes.items()}
    for _, share, number, layer, j in rows[:left]:
        shape = shapes[sites[number]]
        if budget is not None:
            if (budget := budget - shape.d_in - shape.d_out) < 0:
                break
        if share == 0:
            raise ValueError(
                f"the inputs of site {sites[number]!r} vary along {j} directions only, "
                "and no other site has one to spare: look at more inputs, or lower "
                f"`rank` ({rank}), `budget` or `r_min`"
            )
        kept[sites[number]][layer] += 1
    alpha = float(rank if alpha is None else alpha)

    def site(ranks: list[int], shape: KernelShape) -> SiteRank:
        alphas = [alpha * r / rank if adjust_alpha else alpha * (r > 0) for r in ranks]
        if shape.layers is None:
            return SiteRank(ranks[0], alphas[0])
        return SiteRank(tuple(ranks), tuple(alphas))

    found = {path: site(kept[path], shape) for path, shape in shapes.items()}
    return Allocation.of(found, {"allocator": "eva", "rank": rank, "rho": rho})


def most_directions(
    kernels: Mapping[str, KernelShape],
    *,
    rank: int | None = None,
    budget: int | None = None,
    rho: int | float = 2.0,
    **other: Any,
) -> int:
    """Returns how many ranks ``eva`` may give to one site, of these arguments of it.

    Args:
        kernels: the sites, of ``kernel_shapes``.
        rank: as of ``eva``, like what follows.
        budget: as of ``eva``.
        rho: as of ``eva``.
        **other: arguments that do not matter here.

    Returns:
        The largest integer near ``rho`` times the mean rank.

    Example:
        >>> most_directions({"q": KernelShape(None, 40, 40)}, rank=4)
        8
    """
    del other
    return math.floor(rho * _mean_rank(_sizes(kernels)[0], rank, budget) + 0.5)


def _sizes(shapes: Mapping[str, KernelShape]) -> tuple[int, int]:
    """Parameters of rank 1 everywhere, and the number of sites."""
    each = sum((s.layers or 1) * (s.d_in + s.d_out) for s in shapes.values())
    return each, sum(s.layers or 1 for s in shapes.values())


def _mean_rank(each: int, rank: int | None, budget: int | None) -> int | float:
    if rank is None and budget is not None:
        return budget / max(each, 1)
    return 8 if rank is None else rank


def _ratios(path: str, shape: KernelShape, spectra, most: int) -> np.ndarray:
    """The ``most`` largest shares ``[layers, most]`` of a site, checked."""
    if path not in spectra:
        raise ValueError(
            f"`spectra` has none of site {path!r}; it has {sorted(spectra)[:5]}"
        )
    found = spectra[path]
    wanted = () if shape.layers is None else (shape.layers,)
    inputs = found.directions.shape[:-1]
    if inputs != (*wanted, shape.d_in):
        raise ValueError(
            f"`spectra` of site {path!r} are of inputs {inputs}, not "
            f"{(*wanted, shape.d_in)}"
        )
    ratios = found.ratios.reshape(shape.layers or 1, -1)
    if ratios.shape[1] < min(most, shape.d_in):
        raise ValueError(
            f"`spectra` of site {path!r} have {ratios.shape[1]} directions, and `rank` "
            f"and `rho` give it up to {most}: write input_moments(x, mask, "
            f"keep={4 * most})"
        )
    return ratios[:, :most]


def eva_start(
    adapted: PyTree, spectra: Mapping[str, Spectrum], *, whiten: bool = False
) -> PyTree:
    """Starts low-rank adapters at the directions of their inputs, as EVA does.

    ``a`` becomes the leading directions, ``b`` stays as it is (0 of a plain LoRA, so
    the function is still the base's).

    Args:
        adapted: a tree with leaves ``a [.., d_in, r]`` at the sites.
        spectra: of the sites' inputs. Sites without one stay as they are.
        whiten: divide each direction by the root of its singular value.

    Returns:
        The tree.

    Raises:
        ValueError: no site has a spectrum; or one has no leaf ``a``, is to have more
            directions than its spectrum, or would not compute what it did (its ``b``
            is not 0, as PiSSA's).

    References:
        Paischer et al., arXiv 2410.07170, section 3.
    """
    done = []

    def start(node):
        path = node.site.path
        if path not in spectra:
            return node
        if "a" not in node.trainable:
            raise ValueError(f"site {path!r}: {node.adapter.name!r} trains no 'a'")
        found, old = spectra[path], node.trainable["a"]
        layers, d_in, _ = matrix_shape(node.base.shape, node.roles)
        width = old.shape[-1]
        if width > found.directions.shape[-1]:
            raise ValueError(
                f"site {path!r} has rank {width}, and its spectrum "
                f"{found.directions.shape[-1]} directions; gather more with `keep`"
            )
        new = found.directions[..., :width]
        root = np.sqrt(found.singular[..., :width]).reshape(layers, width)
        for layer, rank in enumerate(node.site.ranks):
            if not np.all(root[layer, :rank]):
                raise ValueError(
                    f"site {path!r}: the inputs of layer {layer} vary along "
                    f"{np.count_nonzero(root[layer])} directions only, its rank is "
                    f"{rank}; look at more inputs, or lower the rank"
                )
        if whiten:
            new = new / np.where(root > 0, root, 1).reshape(*new.shape[:-2], 1, width)
        new = new.reshape(layers, d_in, width)
        for layer, rank in enumerate(node.site.ranks):
            new = new.copy()
            new[layer, :, rank:] = 0  # padding
        done.append(path)
        a = jax.device_put(new.reshape(old.shape).astype(old.dtype), old.sharding)
        started = node.replace(trainable=node.trainable | {"a": a})
        if _acts(node) or _acts(started):
            raise ValueError(
                f"site {path!r}: {node.adapter.name!r} would not compute the same from "
                "another 'a', as its 'b' is not 0; attach jaxpeft.lora()"
            )
        return started

    result = map_nodes(start, adapted)
    if not done:
        raise ValueError(f"`spectra` has no site of the tree: {sorted(spectra)[:5]}")
    return result


@jax.jit
def _acts(node: AdaptedKernel) -> Array:
    """Whether a site's low-rank product has a part that is not 0."""
    trained, batch = lifted_factors(node).terms[0], node.roles.count(BATCH)
    a = jnp.any(trained.a != 0, axis=tuple(range(batch, trained.a.ndim - 1)))
    b = jnp.any(trained.b != 0, axis=tuple(range(batch + 1, trained.b.ndim)))
    return jnp.any(a & b)
