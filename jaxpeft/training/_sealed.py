"""What shows that a checkpoint is whole: checksums of what Orbax does not guard.

Orbax stores arrays in nodes that carry a CRC-32C, but not the larger values beside
them, nor any of its JSON files. So the metadata of a checkpoint is sealed with a
SHA-256 of all it says, and holds a checksum of each array's values.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import os
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

FILE = "meta/metadata"
# What a checkpoint's metadata held before it was sealed.
UNSEALED = {"config", "leaves", "base", "key", "data_state", "extra"}


class CheckpointError(ValueError):
    """A checkpoint cannot be used for what it was asked for."""


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says how that shows."""


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON-able metadata with the checksum that ``read_sealed`` asks for."""
    return {"sha256": _digest(meta), "meta": meta}


def seal_again(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes other metadata in the place of a checkpoint's, whole or not at all."""
    fresh = (folder / FILE).with_suffix(".new")
    with open(fresh, "w") as file:
        json.dump(seal(meta), file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / FILE)


def read_sealed(folder: Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint.

    Args:
        folder: of the checkpoint; its name is the step.

    Returns:
        what was given to ``seal``. Of a checkpoint from before metadata was sealed
        ``"values"`` is None: nothing is known of its arrays.

    Raises:
        Damaged: it is not there, cannot be read, is not what was written, or is that
            of another step.
    """
    try:
        found = json.loads((folder / FILE).read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{FILE} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{FILE} cannot be read: {error}") from None
    if isinstance(found, dict) and found.keys() == UNSEALED:
        more = {"step": int(folder.name), "kept": [], "values": None}
        return {**found, **more, "scores": _unsealed_scores(folder)}
    try:
        whole = found["sha256"] == _digest(found["meta"])
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{FILE} has changed since it was written")
    meta = found["meta"]
    if str(meta["step"]) != folder.name:
        raise Damaged(f"it is of step {meta['step']}, its folder of {folder.name}")
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _unsealed_scores(folder: Path) -> dict[str, float]:
    try:
        return json.loads((folder / "metrics/metrics").read_bytes())
    except (OSError, ValueError):
        return {}


def put_aside(folder: Path) -> str:
    """Renames a damaged checkpoint, so that its step can be saved anew.

    Returns:
        what became of it, for a sentence that begins with "it".
    """
    numbers = (f"-{n}" if n > 1 else "" for n in itertools.count(1))
    places = (folder.with_name(f"damaged-{folder.name}{n}") for n in numbers)
    place = next(p for p in places if not p.exists())
    try:
        folder.rename(place)
    except OSError as error:
        return f"cannot be moved away ({error.strerror})"
    return f"is kept as {str(place)!r}"


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns a checksum of each array's values; all processes call it.

    Args:
        leaves: arrays of numbers, on any mesh.

    Returns:
        the checksums by the arrays' names, the same on any mesh.
    """
    found = jax.device_get({name: checksum(x) for name, x in leaves.items()})
    return {name: int(value) for name, value in found.items()}


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """A number that changes with any bit or any move of an entry; the same anywhere.

    Integer arithmetic modulo 2^32: no order of summation, no mesh, changes it.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = min(jnp.finfo(x.dtype).bits, 32)
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    mixed = x.astype(jnp.uint32)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = mixed * jnp.uint32(31) + along
    # The last step of MurmurHash3: without it the top bits of a sum are all that the
    # signs change, and an even number of changes cancels.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns what reading a damaged file raises into ``Damaged``, on all processes.

    Inside may be nothing that waits for other processes: one may have stopped halfway.
    Reads that were under way when the first failed are not spoken of again. What says
    nothing of the files, such as too little memory, is raised as it is.

    Raises:
        Damaged: on every process, where any could not read.
    """
    fault, hooks = None, (sys.unraisablehook, sys.excepthook)
    log, level = logging.getLogger("asyncio"), logging.getLogger("asyncio").level
    try:
        # Threads and coroutines that are left print by one or the other.
        sys.unraisablehook = sys.excepthook = lambda *_: None
        log.setLevel(logging.CRITICAL)
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax has no exception of its own for this
        fault = " ".join(str(error).split()) or type(error).__name__
        fault = fault if len(fault) <= 200 else f"{fault[:200]} ..."
    finally:
        if fault is not None:
            _let_go()
        log.setLevel(level)
        sys.unraisablehook, sys.excepthook = hooks
    faults = [each for each in from_all_processes(fault) if each is not None]
    if faults:
        raise Damaged(faults[0])


def _let_go(seconds: float = 1.0) -> None:
    """Waits for the reads that were under way when another one failed."""
    until = time.monotonic() + seconds
    # By `type`: asking objects of other libraries for their class may do anything.
    coroutine = lambda x: type(x) is types.CoroutineType
    under_way = lambda x: coroutine(x) and x.cr_frame is not None
    while any(map(under_way, gc.get_objects())) and time.monotonic() < until:
        time.sleep(0.02)
        gc.collect()


def from_all_processes(value: Any) -> list[Any]:
    """Each process's JSON-able value, in the order of the processes."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes().decode())
        for row, size in zip(rows, sizes, strict=True)
    ]


def of_this_process(values: list[Any]) -> Any:
    """Returns this process's of what ``from_all_processes`` gave, maybe others then."""
    if len(values) == jax.process_count():
        return values[jax.process_index()]
    if all(value == values[0] for value in values):
        return values[0]
    raise CheckpointError(
        f"the checkpoint has the data states of {len(values)} processes, which differ, "
        f"and cannot be shared out to {jax.process_count()}: resume on {len(values)}"
    )
