"""Machines that a step is compiled for: their devices, and what one of them can do."""

import difflib
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from jaxpeft.training._topology import topology_devices

GIB = 2**30


class Chip(NamedTuple):
    """What the maker says of one device.

    Attributes:
        name: as in a target's name, ``"v5e"``.
        flops: dense bfloat16 FLOPs a second, at most.
        memory: bytes of its main memory.
        bandwidth: bytes a second of that.
        link: bytes a second that it sends to other devices, over all links of the
            fast network (ICI, NVLink).
        source: where these figures stand.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"
# By what JAX calls the device. A chip of TPU7x is two devices.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9, f"{_TPU}v4"),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, f"{_TPU}v5e"),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, f"{_TPU}v5p"),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9, f"{_TPU}v6e"),
    "TPU7x": Chip("tpu7x", 1153.5e12, 96 * GIB, 3690e9, 600e9, f"{_TPU}tpu7x"),
    "NVIDIA A100": Chip(
        *("a100", 312e12, 80 * GIB, 2039e9, 300e9),
        "https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "NVIDIA H100": Chip(
        *("h100", 989e12, 80 * GIB, 3350e9, 450e9),
        "https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "NVIDIA H200": Chip(
        *("h200", 989e12, 141e9, 4800e9, 450e9),
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
}
# Generations of TPUs and how far a pod of them reaches: of two axes its layouts, of
# three one example.
LAYOUTS = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


class Target(NamedTuple):
    """A machine to compile for.

    Attributes:
        name: as it was asked for, ``"v5e:4x4"``.
        platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
        devices: to make a mesh of.
        chip: what one of them can do; ``None`` where no figures are known.
        slices: pods that are joined by a slower network.
    """

    name: str
    platform: str
    devices: list[Any]
    chip: Chip | None
    slices: int = 1


def find_target(name: str | None = None, *, slices: int = 1) -> Target:
    """Returns the machine of a name; none of it need be here.

    Args:
        name: of TPUs a generation and a layout, ``"v5e:16x16"``, ``"v4:2x2x4"``, also
            of ``v5p``, ``v6e`` and ``tpu7x``; needs libtpu. ``"cpu"`` or ``"cpu:8"``,
            so many devices of this computer's; ``"gpu"``, this computer's; ``None``:
            what JAX would run on here.
        slices: how many such slices; of TPUs alone.

    Returns:
        The target.

    Raises:
        ValueError: there is no such machine, with those that have near names; or JAX
            has begun with fewer CPU devices.
        ImportError: libtpu is not installed.

    Example:
        >>> find_target("cpu").platform
        'cpu'
        >>> find_target("v5:4x4")
        Traceback (most recent call last):
        ValueError: `target` 'v5:4x4': there is no such machine; nearest: v5e:4x4, ...
    """
    if slices < 1:
        raise ValueError(f"`slices` must be at least 1, got {slices}.")
    if name is None:
        return _local("local", jax.devices())
    kind, _, rest = name.partition(":")
    if kind in ("cpu", "gpu") and slices != 1:
        raise ValueError(f"`slices` is {slices}, which {name!r} has none of; leave it.")
    if kind == "cpu" and (rest.isdecimal() or not rest) and rest != "0":
        return _local(name, _cpus(int(rest or 1)))
    if kind == "gpu" and not rest:
        try:
            return _local(name, jax.devices("gpu"))
        except RuntimeError as error:
            raise ValueError(
                "`target` is 'gpu', and this computer has none that JAX can use; "
                'write a TPU such as "v5e:4x4", or "cpu".'
            ) from error
    return _tpu(name, kind, rest, slices)


def _local(name: str, devices: list[Any]) -> Target:
    device = devices[0]
    return Target(name, device.platform, list(devices), chip_of(device))


def chip_of(device: Any) -> Chip | None:
    """Returns the figures of a device; ``None`` for one that is not in the table."""
    kind = device.device_kind
    if kind in CHIPS:
        return CHIPS[kind]
    return next(
        (chip for name, chip in CHIPS.items() if kind.startswith(name + " ")), None
    )


def _cpus(count: int) -> list[Any]:
    flags = os.environ.get("XLA_FLAGS", "")
    if count > 1 and "xla_force_host_platform_device_count" not in flags:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # JAX has begun, perhaps with enough of them
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(
            f"`target` 'cpu:{count}': JAX has begun with {len(found)} CPU device(s); "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count} before."
        )
    return found[:count]


def _tpu(name: str, kind: str, layout: str, slices: int) -> Target:
    if kind not in LAYOUTS or layout not in _layouts(kind, layout):
        raise ValueError(_no_such(name, kind))
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"`target` {name!r}: programs for TPUs are compiled by libtpu, which is "
            'not installed. Write: pip install "jaxpeft[tpu]".',
            name="libtpu",
        )
    try:
        devices = topology_devices(name, slices=slices)
    except RuntimeError as error:  # JAX's own kind is one
        raise ValueError(f"`target` {name!r}: libtpu says: {error}") from error
    return Target(name, "tpu", devices, chip_of(devices[0]), slices)


def _layouts(kind: str, layout: str) -> tuple[str, ...]:
    """Layouts of a generation; a torus of three axes has more than are listed."""
    listed = LAYOUTS[kind]
    three = listed[0].count("x") == 2
    if three and re.fullmatch(r"\d+x\d+x\d+", layout) and "0" not in layout.split("x"):
        return (*listed, layout)
    return listed


def _no_such(name: str, kind: str) -> str:
    known = [f"{one}:{layout}" for one, every in LAYOUTS.items() for layout in every]
    known += ["cpu", "cpu:8", "gpu"]
    if kind in LAYOUTS:
        near = [one for one in known if one.startswith(f"{kind}:")]
    else:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.3) or known
    return (
        f"`target` {name!r}: there is no such machine; nearest: {', '.join(near)}. "
        f"Write a generation of TPUs ({', '.join(LAYOUTS)}) and a layout of its chips, "
        '"v5e:4x4"; "cpu", "cpu:8" or "gpu".'
    )
