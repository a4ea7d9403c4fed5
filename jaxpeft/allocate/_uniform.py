"""The same rank at every site, as given or as a budget of parameters allows."""

from collections.abc import Mapping

from jaxpeft.allocate._allocation import Allocation, KernelShape, SiteRank


def uniform(
    shapes: Mapping[str, KernelShape],
    *,
    rank: int | None = None,
    budget: int | None = None,
    alpha_over_r: int | float = 1.0,
) -> Allocation:
    """Gives every site the same rank: the baseline of every other allocator.

    Args:
        shapes: the sites, of ``kernel_shapes``.
        rank: the rank, 8 unless there is a budget.
        budget: parameters of plain low-rank pairs in all; the rank is the largest
            that keeps to it. For a comparison at equal size:
            ``budget=other.count(shapes)``.
        alpha_over_r: the scale of every site.

    Returns:
        The allocation; its ``count(shapes)`` is what it really takes.

    Raises:
        ValueError: both are given, the rank is below 1, or the budget is too small for
            rank 1.

    Example:
        >>> shapes = {"q/kernel": KernelShape(None, 6, 4), "v/kernel":
        ...     KernelShape(None, 6, 4)}
        >>> uniform(shapes, budget=70).ranks()
        {'q/kernel': 3, 'v/kernel': 3}
    """
    if rank is not None and budget is not None:
        raise ValueError(
            f"`rank` ({rank}) and `budget` ({budget}) say the same; give one of them"
        )
    if not shapes:
        raise ValueError("`shapes` has no sites")
    if budget is not None:
        each = sum((s.layers or 1) * (s.d_in + s.d_out) for s in shapes.values())
        if (rank := budget // each) < 1:
            raise ValueError(
                f"`budget` {budget} is below the {each} parameters of rank 1 at all "
                f"{len(shapes)} sites; name fewer sites"
            )
    rank = 8 if rank is None else rank
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}")
    alpha = alpha_over_r * rank

    def site(shape: KernelShape) -> SiteRank:
        if shape.layers is None:
            return SiteRank(rank, alpha)
        return SiteRank((rank,) * shape.layers, (alpha,) * shape.layers)

    sites = {path: site(shape) for path, shape in shapes.items()}
    return Allocation.of(sites, {"allocator": "uniform"})
