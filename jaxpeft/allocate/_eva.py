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
from jaxpeft.numerics import Leading, centre, join_leading, leading_rows, row_cosines


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
        ratios: shares of the variance, largest first, ``[..., k]``; k is d, or the
            number of leading directions that were kept.
        directions: orthonormal columns, ``[..., d, k]``.
        singular: singular values of the centred inputs, ``[..., k]``.
    """

    ratios: Float[np.ndarray, "*layers k"]
    directions: Float[np.ndarray, "*layers d k"]
    singular: Float[np.ndarray, "*layers k"]


def input_moments(
    x: Float[Array, "*batch d"],
    mask: Shaped[Array | np.ndarray, "*batch"],
    keep: int | None = None,
) -> Moments | Leading:
    """Returns moments of a kernel's inputs, in float32: ``reduce`` of ``capture``.

    Args:
        x: inputs.
        mask: 1 at those that count: the attention mask for all real tokens, or the
            positions that carry loss.
        keep: ``None``: all directions, exactly, in ``d * d`` numbers. A number: so
            many leading ones, of an incremental SVD (``numerics.leading_rows``), for
            wide inputs; some four times what a site may get as ranks.

    Returns:
        Their moments, or their leading directions.

    Example:
        >>> x = jnp.asarray([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]])
        >>> input_moments(x, jnp.asarray([1, 1, 0])).scatter.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w = jnp.asarray(mask).reshape(-1, 1).astype(jnp.float32)
    x = jnp.where(w > 0, x, 0)  # what is not finite in padding stays out
    if keep is not None:
        return leading_rows(x, w[:, 0], min(keep, x.shape[-1]))
    count, mean, centred = centre(x, w[:, 0])
    scatter = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return Moments(count, mean, scatter)


def gather_moments(
    step: Callable[[Any], Mapping[str, Moments | Leading]],
    batches: Iterable[Any],
    *,
    tau: int | float | None = None,
    watch: int = 16,
) -> dict[str, Moments | Leading]:
    """Adds up moments over batches, those of all directions in float64 on the host.

    Args:
        step: ``batch -> {path: Moments}``, one forward pass; a function made by
            ``jaxpeft.capture``, jitted, that ends in ``[1]``.
        batches: what it is given, one after the other.
        tau: stop before the last batch, once a batch turns no leading direction that
            is watched: the cosine with the one before is at least ``tau`` (HF PEFT:
            0.99). ``None``: all batches.
        watch: how many of each site's leading directions must hold still.

    Returns:
        ``{path: Moments}`` of all batches.

    Raises:
        ValueError: there is no batch, a moment is not finite, or ``tau`` is given
            where all directions are kept.

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
    total: dict[str, Moments | Leading] = {}
    for batch in batches:
        before, held = dict(total), []
        for path, new in step(batch).items():
            if not np.all(np.isfinite(new[2])):  # a sum over all entries
                raise ValueError(f"the inputs of {path!r} are not finite")
            old = before.get(path)
            if isinstance(new, Leading):
                total[path] = new if old is None else join_leading(old, new)
                if tau is not None and old is not None:
                    held.append(row_cosines(old, total[path])[..., :watch])
                continue
            if tau is not None:
                raise ValueError(
                    "`tau` is for leading directions, and `step` gives moments of all; "
                    "leave it out, or write input_moments(x, mask, keep=64)"
                )
            new = Moments(*(np.asarray(x, np.float64) for x in jax.device_get(new)))
            total[path] = new if old is None else _joined(old, new)
        if held and all(np.all(x >= tau) for x in jax.device_get(held)):
            break
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


def spectrum(moments: Moments | Leading) -> Spectrum:
    """Returns how the variance of inputs is spread over directions.

    Args:
        moments: of ``gather_moments``, for one site.

    Returns:
        The spectrum, in float64; of as many directions as were kept. n inputs span
        n - 1 directions at most, so the shares of others are 0.

    Raises:
        ValueError: fewer than two inputs were counted, or all were the same.

    Example:
        >>> scatter = np.diag([1.0, 3.0])
        >>> spectrum(Moments(np.float64(5), np.zeros(2), scatter)).ratios.tolist()
        [0.75, 0.25]
    """
    count = np.asarray(moments.count)
    if np.any(count < 2):
        raise ValueError(
            f"`moments` counts {np.min(count):.0f} inputs; variance needs 2"
        )
    if isinstance(moments, Leading):
        rows = np.asarray(moments.rows, np.float64)
        _, values, vectors = np.linalg.svd(rows, full_matrices=False)
        values, vectors = values**2, vectors.swapaxes(-1, -2)
        trace = np.asarray(moments.spread, np.float64)[..., None]
    else:
        values, vectors = np.linalg.eigh(moments.scatter)
        values, vectors = np.maximum(values[..., ::-1], 0), vectors[..., ::-1]
        trace = np.sum(values, -1, keepdims=True)
    # What is below the rounding of a float32 mean is no variance.
    size = count * np.sum(np.square(moments.mean, dtype=np.float64), -1)
    if np.any(trace[..., 0] <= 1e-12 * size):
        raise ValueError("`moments` have no variance: all inputs are the same")
    spanned = np.arange(values.shape[-1]) < count[..., None] - 1
    values = np.where(spanned, values, 0)
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
        turn no more (``tau`` of
        ``gather_moments``); by default all batches count here.
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
        ratios = _ratios(path, shape, spectra, most)
        for layer, e in enumerate(ratios):
            rows += [(j >= r_min, -x, number, layer, j) for j, x in enumerate(e)]
    # What r_min asks for first, then by share; ties by site, layer and direction.
    rows.sort()
    sites = list(shapes)
    kept = {path: [0] * (shape.layers or 1) for path, shape in shapes.items()}
    for _, share, number, layer, j in rows[:left]:
        shape = shapes[sites[number]]
        if share == 0:
            raise ValueError(
                f"the inputs of site {sites[number]!r} vary along {j} directions only, "
                "and no other site has one to spare: look at more inputs, or lower "
                f"`rank` ({rank}), `budget` or `r_min`"
            )
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
