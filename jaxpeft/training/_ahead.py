"""Batches that are on the devices before the step asks for them."""

from typing import Any

from jax.sharding import Mesh

from jaxpeft.console import optional
from jaxpeft.training._batch import put_batch

# Making a batch is copying rows: few threads do, and few batches wait on the host.
_THREADS, _WAITING = 4, 8


def batches_ahead(
    batches: Any, mesh: Mesh, *, accumulate: int = 1, size: int = 2
) -> Any:
    """Returns an iterator over batches, some of which are on the devices ahead.

    A thread makes the next batches and puts them on the devices while a step runs. Its
    place in the data is that of the batch it gave last, as without a thread: what was
    made ahead is made again where a run goes on.

    Args:
        batches: of ``data.batches``, or another ``grain.MapDataset`` of batches.
        mesh: the mesh.
        accumulate: the number of micro-batches that the step will make of one.
        size: how many batches are on the devices before they are asked for; 0: none,
            each is put there when it is asked for.

    Returns:
        An iterator of pairs: a batch as it was, of this process's rows, and as
        ``put_batch`` has put it on the devices. Its ``get_state()`` and
        ``set_state(state)`` are those of ``iter(batches)``, and ``close()`` ends the
        thread. What goes wrong in the thread is raised where its batch is asked for.

    Raises:
        ValueError: ``size`` is negative.

    Example:
        >>> import grain, jax, numpy as np
        >>> from jaxpeft import training
        >>> mesh = training.make_mesh(devices=jax.devices()[:1])
        >>> rows = lambda i: {"x": np.full((2, 3), i)}
        >>> batches = batches_ahead(grain.MapDataset.range(9).map(rows), mesh)
        >>> host, device = next(batches)
        >>> host["x"].shape, sorted(device), batches.get_state()
        ((2, 3), ['weight', 'x'], {'next_index': 1})
        >>> batches.close()
    """
    if size < 0:
        raise ValueError(f"`size` must be 0 or more; got {size}.")
    with optional("Batches"):
        import grain

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_WAITING)
    both = lambda batch: (batch, put_batch(batch, mesh, accumulate=accumulate))
    placed = batches.to_iter_dataset(options).map(both)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=size)
    )
