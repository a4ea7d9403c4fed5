"""What the tests of numerics share."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Tiny programs, each run a few times: LLVM's passes would be most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
