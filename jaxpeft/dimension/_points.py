"""Points whose neighbours are looked for once, whatever is estimated from them."""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxpeft.dimension._duplicates import Cloud, DegenerateError, find
from jaxpeft.dimension._neighbours import check_points, neighbours

_HALVES = 10


class Points:
    """Points for several estimators: all use one search of neighbours.

    Wherever ``twonn``, ``mle`` and ``gride`` take points they take these, too, and
    anything else can read them as an array.

    Args:
        x: points, a row each.
        k: how many neighbours to look for at the first search: the most that any of
            the estimators needs. One that needs more starts another search.

    Example:
        >>> from jaxpeft.dimension import mle, twonn
        >>> x = Points(np.random.default_rng(0).normal(size=(300, 2)), k=25)
        >>> round(twonn(x).dim), round(mle(x, k=25).dim)  # one search
        (2, 2)
    """

    def __init__(self, x: Shaped[Any, "n d"], k: int = 2):
        self._given, self._host, self.k = x, None, k
        self._clouds: dict[Any, Cloud] = {}
        self._halves: dict[Any, list[np.ndarray]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self._given.shape

    @property
    def dtype(self) -> Any:
        """Of the array, as it came."""
        return self._given.dtype

    def __len__(self) -> int:
        """The number of points."""
        return len(self._given)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array, on the host."""
        if self._host is None:
            self._host = np.asarray(self._given)
        return np.array(self._host, dtype=dtype, copy=copy)

    def cloud(
        self, k: int, *, duplicates: str, near_tol: int | float, **search: Any
    ) -> Cloud:
        """Neighbours once copies are merged, as ``dimension.cloud`` has them."""
        key = (duplicates, near_tol, *sorted(search.items()))
        known = self._clouds.get(key)
        if known is None or known.r.shape[1] < k:
            self.k = max(k, self.k)
            options = {"duplicates": duplicates, "near_tol": near_tol, **search}
            self._clouds[key] = known = find(self, k, self.k, **options)
        return known._replace(r=known.r[:, :k])

    def halves(
        self, k: int, cloud: Cloud, seed: int, search: dict[str, Any]
    ) -> list[Float[np.ndarray, "half k"]]:
        """Distances among ten random halves of the points, without merged copies.

        The halves depend on the number of rows and the seed alone: the same rows at
        each layer.
        """
        key = (seed, cloud.rows.tobytes(), *sorted(search.items()))
        known = self._halves.get(key)
        if known is None or min(r.shape[1] for r in known) < k:
            self.k = max(k, self.k)
            x, generator = check_points(self), np.random.default_rng(seed)
            drawn = [
                generator.permutation(len(x))[: len(x) // 2] for _ in range(_HALVES)
            ]
            parts = [x[np.intersect1d(rows, cloud.rows)] for rows in drawn]
            known = [_nearest(part, k, self.k, search) for part in parts]
            self._halves[key] = known
        return [r[:, :k] for r in known]


def _nearest(x: np.ndarray, k: int, most: int, search: dict[str, Any]) -> np.ndarray:
    if len(x) <= max(k, 2):
        # Fewer than three points have no dimension; more have one, and no spread.
        error = DegenerateError if len(x) < 3 else ValueError
        raise error(
            f"`sd`='subsample' needs halves of more than {max(k, 2)} distinct points, "
            f"got {len(x)}; give more points, or sd='analytic'."
        )
    return neighbours(x, min(most, len(x) - 1), **search)[0]
