"""EVA (arXiv 2410.07170): ranks where few directions explain a kernel's inputs."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from jaxpeft.core import Allocation, KernelShape, SiteRank
from jaxpeft.core._lift import matrix_shape
from jaxpeft.core._node import map_nodes


class Moments(NamedTuple):
    """Count, mean and centred scatter of vectors; of a stack one a layer, in front.

    Attributes:
        count: of vectors, ``[...]``.
        mean: ``[..., d]``.
        scatter: the sum of ``(x - mean) (x - mean)^T``, ``[..., d, d]``.
    """

    count: Any
    mean: Any
    scatter: Any


class Spectrum(NamedTuple):
    """Where the variance of a kernel's inputs lies; of a stack one a layer, in front.

    Attributes:
        ratios: shares of the variance, largest first, ``[..., d]``.
        directions: orthonormal columns, ``[..., d, d]``.
        singular: singular values of the centred inputs, ``[..., d]``.
    """

    ratios: Float[np.ndarray, "*layers d"]
    directions: Float[np.ndarray, "*layers d d"]
    singular: Float[np.ndarray, "*layers d"]


def input_moments(
    x: Float[Array, "*batch d"], mask: Shaped[Array | np.ndarray, "*batch"]
) -> Moments:
    """Returns moments of a kernel's inputs, in float32: ``reduce`` of ``capture``.

    Args:
        x: inputs.
        mask: 1 at those that count: the attention mask for all real tokens, or the
            positions that carry loss.

    Returns:
        Their moments.

    Example:
        >>> x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> input_moments(x, jnp.asarray([1, 1, 0])).scatter.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w = jnp.asarray(mask).reshape(-1, 1).astype(jnp.float32)
    x = jnp.where(w > 0, x, 0)  # what is not finite in padding stays out
    count = jnp.sum(w)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    mean = jnp.matmul(w[:, 0], x, **exact) / jnp.maximum(count, 1)
    centred = (x - mean[None]) * w
    return Moments(count, mean, jnp.matmul(centred.T, centred, **exact))


def gather_moments(
    step: Callable[[Any], Mapping[str, Moments]], batches: Iterable[Any]
) -> dict[str, Moments]:
    """Adds up moments over batches, in float64 on the host.

    Args:
        step: ``batch -> {path: Moments}``, one forward pass; a function made by
            ``jaxpeft.capture``, jitted, that ends in ``[1]``.
        batches: what it is given, one after the other.

    Returns:
        ``{path: Moments}`` of all batches.

    Raises:
        ValueError: there is no batch, or a moment is not finite.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"q": {"kernel": jnp.ones((2, 3))}}
        >>> fn = lambda p, x, mask: x @ p["q"]["kernel"]
        >>> def step(batch):
        ...     reduce = lambda x: input_moments(x, batch[1])
        ...     return jp.capture(fn, ["q"], reduce)(params, *batch)[1]
        >>> batch = jnp.asarray([[1.0, 0.0], [3.0, 0.0]]), jnp.ones(2)
        >>> gather_moments(step, [batch, batch])["q/kernel"].mean.tolist()
        [2.0, 0.0]
    """
    total: dict[str, Moments] = {}
    for batch in batches:
        for path, new in jax.device_get(step(batch)).items():
            new = Moments(*(np.asarray(x, np.float64) for x in new))
            if not np.all(np.isfinite(new.scatter)):
                raise ValueError(f"the inputs of {path!r} are not finite")
            total[path] = _joined(total[path], new) if path in total else new
    if not total:
        raise ValueError("`batches` has no batch, or `step` gives no site")
    return total


def _joined(a: Moments, b: Moments) -> Moments:
    """Moments of two samples together (Chan, Golub and LeVeque, 1979)."""
    count = np.maximum(a.count + b.count, 1)
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.count / count)[..., None]
    between = apart[..., :, None] * apart[..., None, :]
    between = between * (a.count * b.count / count)[..., None, None]
    return Moments(a.count + b.count, mean, a.scatter + b.scatter + between)


def spectrum(moments: Moments) -> Spectrum:
    """Returns how the variance of inputs is spread over directions.

    Args:
        moments: of ``gather_moments``, for one site.

    Returns:
        The spectrum, in float64.

    Raises:
        ValueError: fewer than two inputs were counted, or all were the same.

    Example:
        >>> scatter = np.diag([1.0, 3.0])
        >>> spectrum(Moments(np.float64(5), np.zeros(2), scatter)).ratios.tolist()
        [0.75, 0.25]
    """
    if np.any(np.asarray(moments.count) < 2):
        raise ValueError(
            f"`moments` counts {np.min(moments.count):.0f} inputs; variance needs 2"
        )
    values, vectors = np.linalg.eigh(moments.scatter)
    values, vectors = np.maximum(values[..., ::-1], 0), vectors[..., ::-1]
    trace = np.sum(values, -1, keepdims=True)
    if np.any(trace == 0):
        raise ValueError("`moments` have no variance: all inputs are the same")
    return Spectrum(values / trace, vectors, np.sqrt(values))


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
        r_min: the least rank. Layers of a stack need 1: one of rank 0 cannot be
            attached.

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
        turn no more; here all batches count, exactly.
    """
    each = sum((s.layers or 1) * (s.d_in + s.d_out) for s in shapes.values())
    count = sum(s.layers or 1 for s in shapes.values())
    if rank is None and budget is not None:
        left, rank = None, budget / max(each, 1)  # the budget alone decides
    else:
        rank = 8 if rank is None else rank
        left = count * rank
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
        ratios = _ratios(path, shape, spectra)[:, :most]
        for layer, e in enumerate(ratios):
            rows += [(j >= r_min, -x, number, layer, j) for j, x in enumerate(e)]
    # What r_min asks for first, then by share; ties by site, layer and direction.
    rows.sort()
    sites = list(shapes)
    kept = {path: [0] * (shape.layers or 1) for path, shape in shapes.items()}
    for _, _, number, layer, _ in rows[:left]:
        shape = shapes[sites[number]]
        if budget is not None:
            if (budget := budget - shape.d_in - shape.d_out) < 0:
                break
        kept[sites[number]][layer] += 1
    alpha = float(rank if alpha is None else alpha)

    def site(ranks: list[int], shape: KernelShape) -> SiteRank:
        alphas = [alpha * r / rank if adjust_alpha else alpha * (r > 0) for r in ranks]
        if shape.layers is None:
            return SiteRank(ranks[0], alphas[0])
        return SiteRank(tuple(ranks), tuple(alphas))

    found = {path: site(kept[path], shape) for path, shape in shapes.items()}
    return Allocation.of(found, {"allocator": "eva", "rank": rank, "rho": rho})


def _ratios(path: str, shape: KernelShape, spectra) -> np.ndarray:
    """Shares ``[layers, d]`` of a site, checked against its shape."""
    if path not in spectra:
        raise ValueError(
            f"`spectra` has none of site {path!r}; it has {sorted(spectra)[:5]}"
        )
    ratios = spectra[path].ratios
    wanted = () if shape.layers is None else (shape.layers,)
    if ratios.shape != (*wanted, shape.d_in):
        raise ValueError(
            f"`spectra` of site {path!r} has shares of shape {ratios.shape}, not "
            f"{(*wanted, shape.d_in)}"
        )
    return ratios.reshape(-1, shape.d_in)


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
        ValueError: no site has a spectrum, or one has no leaf ``a``.

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
        new = found.directions[..., :width]
        if whiten:
            new = new / np.sqrt(found.singular)[..., None, :width]
        new = new.reshape(layers, d_in, width)
        for layer, rank in enumerate(node.site.ranks):
            new = new.copy()
            new[layer, :, rank:] = 0  # padding
        done.append(path)
        a = jax.device_put(new.reshape(old.shape).astype(old.dtype), old.sharding)
        return node.replace(trainable=node.trainable | {"a": a})

    result = map_nodes(start, adapted)
    if not done:
        raise ValueError(f"`spectra` has no site of the tree: {sorted(spectra)[:5]}")
    return result
