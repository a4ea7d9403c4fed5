"""Strict settings for every test: eight CPU devices, no silent promotion."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    # Most of the tests' time is the compiler's, and most of that LLVM's. The programs'
    # HLO, and so every count of operations and bytes, is the same without its passes.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Without these a program compiles in half the time; later versions need them.
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent bf16/f32 mix
jax.config.update("jax_numpy_rank_promotion", "raise")  # no silent broadcasting
jax.config.update("jax_debug_key_reuse", True)  # sees typed keys only
jax.config.update("jax_default_matmul_precision", "highest")


class Keys:
    """An endless supply of fresh keys: ``next(keys)``."""

    def __init__(self, seed: int):
        self._key = jax.random.key(seed)

    def __next__(self):
        self._key, key = jax.random.split(self._key)
        return key


@pytest.fixture
def keys():
    return Keys(0)
