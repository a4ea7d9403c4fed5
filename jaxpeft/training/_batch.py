"""How a batch gets to the devices: rows shared out, padded, cut into micro-batches."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpeft.training._mesh import DATA, FSDP, SEQUENCE, TENSOR, batch_sharding


def put_batch(
    batch: Mapping[str, Any],
    mesh: Mesh,
    *,
    rows: int | None = None,
    accumulate: int = 1,
) -> dict[str, jax.Array]:
    """Makes global arrays of this process's rows of a batch.

    Args:
        batch: arrays with one entry per row along the first axis. ``"weight"``
            (float, ``[rows]``) weighs rows in losses; ``"valid"`` (bool) is folded
            into it and leaves the batch.
        mesh: the mesh.
        rows: pad to this many rows of this process, with copies of the last row
            whose weight is 0.
        accumulate: the number of micro-batches that the step will make of it.

    Returns:
        The batch as arrays cut over ``data`` and ``fsdp``, always with ``"weight"``
        (float32).

    Raises:
        ValueError: columns of unequal length, a column of text, more than ``rows``
            rows, or a number of rows that the mesh times ``accumulate`` does not
            divide.
    """
    columns = {name: np.asarray(column) for name, column in batch.items()}
    counts = {name: c.shape[0] if c.ndim else None for name, c in columns.items()}
    if len(set(counts.values())) != 1 or None in counts.values():
        raise ValueError(f"`batch` columns must have equal numbers of rows: {counts}")
    for name, column in columns.items():
        if column.dtype.kind not in "biuf" and column.dtype.name != "bfloat16":
            raise ValueError(
                f"`batch` column {name!r} has dtype {column.dtype}; only numbers reach "
                "a device. Tokenise it first, or leave it out"
            )
    count = next(iter(counts.values()))
    weight = columns.pop("weight", np.ones(count)).astype(np.float32)
    weight = weight * columns.pop("valid", np.ones(count)).astype(np.float32)
    columns["weight"] = weight
    if rows is not None:
        columns = _pad_rows(columns, count, rows)
        count = rows
    check_rows(count, mesh, accumulate)
    return {name: _global_array(column, mesh) for name, column in columns.items()}


def check_rows(rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises unless a process's rows of a batch can be dealt out to its devices.

    Args:
        rows: how many.
        mesh: the mesh.
        accumulate: the number of micro-batches that the step will make of them.

    Raises:
        ValueError: the mesh times ``accumulate`` does not divide them.
    """
    shards = _shards_per_process(mesh)
    if rows % (shards * accumulate):
        raise ValueError(
            f"a batch of {rows} rows on this process is not divisible by its "
            f"{shards} shards (data={mesh.shape[DATA]} x fsdp={mesh.shape[FSDP]} over "
            f"{_processes(mesh)} process(es)) times "
            f"accumulate={accumulate}. Take a batch size that is a multiple of "
            f"{shards * accumulate} a process, or a smaller mesh"
        )


def _global_array(column: np.ndarray, mesh: Mesh) -> jax.Array:
    """Deals this process's rows out to its devices.

    Which row of the global batch a row becomes means nothing, so each process fills
    its own pieces, wherever the mesh has put them.
    """
    where = batch_sharding(mesh)
    if where.is_fully_addressable:
        return jax.device_put(column, where)
    shape = (len(column) * _processes(mesh), *column.shape[1:])
    places = where.addressable_devices_indices_map(shape)
    starts = sorted({index[0].start or 0 for index in places.values()})
    pieces = dict(zip(starts, np.split(column, len(starts)), strict=True))
    shards = [
        jax.device_put(pieces[index[0].start or 0], device)
        for device, index in places.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def _processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})


def _pad_rows(columns: dict[str, np.ndarray], count: int, rows: int):
    if count > rows:
        raise ValueError(f"`rows` is {rows}, but the batch has {count} rows")
    if count == 0:
        raise ValueError("`batch` has no rows: there is nothing to pad from")
    # Copies, not zeros: whatever the model needs of a row (a token to attend to, a
    # label inside the classes) a copy has.
    padded = {
        name: np.concatenate([c, np.repeat(c[-1:], rows - count, axis=0)])
        for name, c in columns.items()
    }
    padded["weight"][count:] = 0.0
    return padded


def _shards_per_process(mesh: Mesh) -> int:
    """How many pieces of the batch this process holds."""
    total = mesh.shape[DATA] * mesh.shape[FSDP]
    pieces = {tuple(np.argwhere(mesh.devices == d)[0][:2]) for d in mesh.local_devices}
    if len(pieces) * _processes(mesh) != total:
        inner = [n for n in (SEQUENCE, TENSOR) if mesh.shape.get(n, 1) > 1]
        sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in inner)
        raise ValueError(
            f"{sizes} reaches over processes, so that some of them would share rows of "
            f"the batch: take a size of {' times '.join(inner)} that divides the "
            f"{len(mesh.local_devices)} devices of one process"
        )
    return len(pieces)
