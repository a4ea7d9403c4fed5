"""Overheads, with wide margins: a shared machine may be slow, not wrong."""

from benchmarks import overhead


def test_tracing_32_unrolled_layers():
    """Under 1 s on a quiet machine; here relative to the model's own tracing."""
    figures = overhead.tracing(layers=32, repeats=1)
    assert figures["overhead"] < max(1.0, 2 * figures["by hand"])


def test_compile_time_is_flat_in_the_number_of_scanned_layers():
    """Sixteen times the layers; unrolled, it would be some ten times the time."""
    times = overhead.compiling(layers=(2, 32), repeats=2)
    assert times[32] < 2.5 * times[2]


def test_import_adds_little():
    """Under 0.5 s on a quiet machine; here relative to what is imported before."""
    figures = overhead.importing(repeats=2)
    assert figures["jaxpeft"] < max(0.5, 0.5 * figures["jax, flax, optax"])
