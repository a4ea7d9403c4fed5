"""Compiling for a TPU pod on any computer."""

from typing import Any


def topology_devices(name: str, *, platform: str = "tpu") -> list[Any]:
    """Returns the devices of a topology, to compile for, not to run on.

    Needs libtpu (``pip install "jaxpeft[tpu]"``), no TPU. Set these environment
    variables before JAX is imported, so that libtpu does not look for a chip:
    ``JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1``.

    Args:
        name: chips and their layout: ``"v5e:16x16"``, ``"v5p:4x4x8"``.
        platform: the kind of device.

    Returns:
        The devices, for ``make_mesh(devices=...)``.

    Example:
        ``compile_step(...).lower(state, frozen, batch).compile()`` with a state, a
        frozen tree and a batch of ``jax.ShapeDtypeStruct`` on a mesh of these devices
        allocates nothing and fails where a chip's memory is too small.
    """
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(platform=platform, topology_name=name).devices
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
