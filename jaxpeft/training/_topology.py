"""Compiling for a TPU pod on any computer."""

import os
import re
from typing import Any

# What the drivers of a TPU make, and what tells libtpu that there is none to look for.
_TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_devices(name: str, *, platform: str = "tpu", slices: int = 1) -> list[Any]:
    """Returns the devices of a topology, to compile for, not to run on.

    Needs libtpu (``pip install "jaxpeft[tpu]"``), no TPU: where there is none, libtpu
    is told so by environment variables that are not set yet. Set ``JAX_PLATFORMS=cpu``
    before JAX is imported, or JAX itself looks for one.

    Args:
        name: chips and their layout: ``"v5e:16x16"``, ``"v5p:4x4x8"``.
        platform: the kind of device.
        slices: how many such slices, joined by the slower network.

    Returns:
        The devices, for ``make_mesh(devices=...)``.

    Example:
        ``compile_step(...).lower(state, frozen, batch).compile()`` with a state, a
        frozen tree and a batch of ``jax.ShapeDtypeStruct`` on a mesh of these devices
        allocates nothing and fails where a chip's memory is too small.
    """
    from jax.experimental import topologies

    if platform == "tpu" and not any(map(os.path.exists, _TPU_FILES)):
        for variable, value in _NO_TPU.items():
            os.environ.setdefault(variable, value)
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    sizes = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
    if len(sizes) == 2 and min(sizes) == 1:  # less than a host
        options["chips_per_host_bounds"] = [*sizes, 1]
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device
    return list(
        topologies.get_topology_desc(
            platform=platform, topology_name=name, **options
        ).devices
    )


def memory_report(compiled: Any) -> dict[str, int]:
    """Returns what a compiled function needs on each device, in bytes.

    Args:
        compiled: the result of ``jax.jit(f).lower(...).compile()``.

    Returns:
        ``arguments``, ``outputs``, ``aliased`` (of the outputs, what takes the place of
        donated arguments), ``temporaries``, ``code``, and ``total``, the peak: their
        sum, aliased bytes counted once.
    """
    stats = compiled.memory_analysis()
    report = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(report.values()) - 2 * report["aliased"]
    return {**report, "total": total}
