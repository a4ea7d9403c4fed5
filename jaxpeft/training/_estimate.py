"""What a step needs on each device, read off its compiled program."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jaxpeft import hlo
from jaxpeft.numerics import bits_of
from jaxpeft.training._targets import Target
from jaxpeft.training._topology import memory_report
from jaxpeft.tree import combine, detach, is_node, is_whole, leaves_with_path


class StepEstimate(NamedTuple):
    """What one step needs. Bytes and FLOPs are of one device.

    Attributes:
        target: the machine's name.
        devices: of the mesh.
        mesh: its axes, ``{"data": 1, "fsdp": 8, "tensor": 2}``.
        base: bytes of the frozen model.
        adapters: bytes of all that adapters add, frozen and trainable.
        optimizer: bytes of the optimiser's moments and the run's counters.
        batch: bytes of a batch.
        padding: bytes that the layouts of these need in addition.
        temporaries: bytes of activations, gradients, gathered kernels; the most that
            are alive at a time, or what the compiler gave up at.
        outputs: bytes of results that take no argument's place (metrics).
        code: bytes of the program.
        peak: the sum of all these, or what the compiler said that it would need.
        memory: what a device has; ``None``: not known.
        largest: the largest arrays among the temporaries.
        flops: of matmuls in a step, loops multiplied out, what is computed again
            counted again; ``None`` where the compiler gave up.
        traffic: bytes to and from the device's memory (``hlo.memory_traffic``).
        collectives: what devices exchange (``hlo.collectives``).
        tokens: of a step, of all devices together, padding included.
        parameters: of the base, of all devices together.
        seconds: the least a step takes, by what bounds it: ``"compute"``, ``"memory"``
            and ``"links"``; empty where the device's figures are not known.
        mfu: of the device's FLOPs at that time, how many would be those of 4 a
            parameter and token, the usual count of a frozen base; at most.
        compile_seconds: tracing and compiling, here.
        notes: what was assumed.
    """

    target: str
    devices: int
    mesh: dict[str, int]
    base: int
    adapters: int
    optimizer: int
    batch: int
    padding: int
    temporaries: int
    outputs: int
    code: int
    peak: int
    memory: int | None
    largest: list[hlo.Array]
    flops: float | None
    traffic: float | None
    collectives: list[hlo.Collective]
    tokens: int
    parameters: int
    seconds: dict[str, float]
    mfu: float | None
    compile_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough, as far as it is known."""
        return self.memory is None or self.peak <= self.memory

    @property
    def step_seconds(self) -> float | None:
        """The least that a step takes: the roofline."""
        return max(self.seconds.values()) if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Returns it for JSON, with what follows from it."""
        found = self._asdict()
        found["largest"] = [one._asdict() for one in self.largest]
        found["collectives"] = [one._asdict() for one in self.collectives]
        rate = None if not self.step_seconds else self.tokens / self.step_seconds
        each = None if rate is None else rate / self.devices
        return found | {
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": each,
        }


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree.

    Args:
        tree: arrays or ``jax.ShapeDtypeStruct`` with shardings.

    Example:
        >>> import jax.numpy as jnp
        >>> device_bytes({"w": jnp.ones((4, 2))})
        32
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += -(-int(np.prod(shape, dtype=np.int64)) * bits_of(leaf.dtype) // 8)
    return total


def estimate_step(
    step: Any,
    state: Any,
    frozen: Any,
    batch: Any,
    *,
    mesh: Mesh,
    target: Target,
    notes: tuple[str, ...] = (),
) -> StepEstimate:
    """Compiles a step for a machine and reads off what it needs. Nothing is run.

    Args:
        step: of ``compile_step``.
        state: the state, ``jax.ShapeDtypeStruct`` with shardings on the mesh.
        frozen: the frozen tree, likewise.
        batch: the shapes of a batch, likewise; with ``"input_ids"``.
        mesh: of the target's devices.
        target: of ``find_target``.
        notes: what was assumed, to be told.

    Returns:
        The estimate. A step that the compiler finds too large has one, too, without
        what only a program tells.

    Example:
        See ``runs.estimate``.
    """
    plain = jax.eval_shape(detach, combine(state.trainable, frozen))
    adapted = device_bytes((state.trainable, frozen))
    base = _base_bytes(state.trainable, frozen)
    held = {
        "base": base,
        "adapters": adapted - base,
        "optimizer": device_bytes(state._replace(trainable=())),
        "batch": device_bytes(batch),
    }
    rows, length = batch["input_ids"].shape
    chip = target.chip
    shared: dict[str, Any] = {
        "target": target.name if target.slices == 1 else _joined(target),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        **held,
        "memory": None if chip is None else int(chip.memory),
        "tokens": rows * length,
        "parameters": sum(x.size for x in jax.tree.leaves(plain, is_leaf=is_whole)),
        "notes": notes,
    }
    started = time.perf_counter()
    try:
        with _no_cache(target):
            traced = step.trace(state, frozen, batch)
            compiled = traced.lower().compile()
    except RuntimeError as error:  # JAX's own kind is one
        needed = out_of_memory(str(error), sum(held.values()))
        if needed is None:
            raise
        peak, capacity = needed
        return StepEstimate(
            **shared | {"memory": capacity},
            padding=0,
            temporaries=peak - sum(held.values()),
            outputs=0,
            code=0,
            peak=peak,
            largest=[],
            flops=None,
            traffic=None,
            collectives=[],
            seconds={},
            mfu=None,
            compile_seconds=time.perf_counter() - started,
        )
    seconds = time.perf_counter() - started
    return _read(compiled, traced.jaxpr, shared, target, seconds)


def _base_bytes(trainable: Any, frozen: Any) -> int:
    """Of a tree, what is the model's own."""
    total = 0
    for _, leaf in leaves_with_path(combine(trainable, frozen)):
        total += device_bytes(leaf.base if is_node(leaf) else leaf)
    return total


def _read(compiled, jaxpr, shared, target: Target, seconds: float) -> StepEstimate:
    report, text = memory_report(compiled), compiled.as_text()
    known = sum(shared[name] for name in ("base", "adapters", "optimizer", "batch"))
    try:
        flops = hlo.matmul_flops(text, hlo.kernel_flops(jaxpr))
    except ValueError:  # a GPU's matmuls are calls into a library
        flops = hlo.traced_flops(jaxpr) / shared["devices"]
    traffic = hlo.memory_traffic(text)
    found = hlo.collectives(text, devices=shared["devices"])
    times, mfu, chip = {}, None, target.chip
    if chip is not None:
        sent = sum(one.sent for one in found)
        times = {
            "compute": flops / chip.flops,
            "memory": traffic / chip.bandwidth,
            "links": sent / chip.link,
        }
        # 4 FLOPs a parameter and token: forward, and the gradient of every input.
        useful = 4.0 * shared["parameters"] * shared["tokens"] / shared["devices"]
        mfu = useful / (max(times.values()) * chip.flops)
    return StepEstimate(
        **shared,
        padding=max(report["arguments"] - known, 0),  # less: what is not used
        temporaries=report["temporaries"],
        outputs=report["outputs"] - report["aliased"],
        code=report["code"],
        peak=report["total"],
        largest=hlo.largest_arrays(text),
        flops=flops,
        traffic=traffic,
        collectives=found,
        seconds=times,
        mfu=mfu,
        compile_seconds=seconds,
    )


def _joined(target: Target) -> str:
    return f"{target.slices} slices of {target.name}"


@contextlib.contextmanager
def _no_cache(target: Target) -> Iterator[None]:
    """A program for another machine is not kept: it could not be read again."""
    if target.platform == jax.default_backend():
        yield
        return
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it would go on as it began
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = (
    re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds .*\(([\d.]+)([KMGT]?)\)"),
    re.compile(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)"),
)


def out_of_memory(text: str, held: int = 0) -> tuple[int, int] | None:
    """Reads a compiler's complaint that a program is too large.

    Args:
        text: of the error.
        held: bytes of the program's arguments, where the text may be about all else.

    Returns:
        ``(bytes that it needs, bytes that there are)``; ``None``: it is about something
        else, or does not say how much.

    Example:
        >>> out_of_memory("Ran out of memory. Used 20.00G of 15.75G hbm.")
        (21474836480, 16911433728)
    """
    for pattern, more in zip(_TOO_LARGE, (held, 0), strict=True):
        found = pattern.search(text)
        if found is not None and "memory" in text:
            used, of = (float(found[i]) * _SIZES[found[i + 1]] for i in (1, 3))
            return int(used) + more, int(of)
    return None
