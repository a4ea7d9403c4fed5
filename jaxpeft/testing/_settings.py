"""Strict settings for tests: eight CPU devices, no silent promotion."""

import importlib.metadata
import os

import jax

_DEVICES = "--xla_force_host_platform_device_count"
# Most of the tests' time is the compiler's, and most of that LLVM's. The programs' HLO,
# and so every count of operations and bytes, is the same without its passes.
_QUICK = (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Cut into parts for many threads, a small program costs nearly twice the work.
    " --xla_cpu_parallel_codegen_split_count=1"
    # Without these a program compiles in half the time; later versions need them.
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)


def use_strict_settings() -> None:
    """Makes JAX strict for the whole process; call it before anything is computed.

    There are eight devices, all of them the CPU. Dtypes and ranks are not promoted
    silently, a key that is used twice is an error, and products of float32 are of
    float32. Programs compile in half the time and run slowly, unless ``XLA_FLAGS`` is
    set already: then it is only given the devices.

    Example:
        >>> use_strict_settings()  # at the top of a conftest.py
        >>> jax.config.jax_numpy_dtype_promotion.value
        'strict'
    """
    given = os.environ.get("XLA_FLAGS")
    if given is None:
        os.environ["XLA_FLAGS"] = f"{_DEVICES}=8{_QUICK}"
    elif _DEVICES not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_DEVICES}=8"
    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that tests start
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent bf16/f32 mix
    jax.config.update("jax_numpy_rank_promotion", "raise")  # no silent broadcasting
    jax.config.update("jax_debug_key_reuse", True)  # sees typed keys only
    jax.config.update("jax_default_matmul_precision", "highest")
