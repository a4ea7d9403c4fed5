"""Strict settings for every test: eight CPU devices, no silent promotion."""

import importlib.metadata
import inspect
import os
import typing

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

import beartype
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no silent bf16/f32 mix
jax.config.update("jax_numpy_rank_promotion", "raise")  # no silent broadcasting
jax.config.update("jax_debug_key_reuse", True)  # sees typed keys only
jax.config.update("jax_default_matmul_precision", "highest")

_jaxtyped = jaxtyping.jaxtyped
_plainly = beartype.beartype(
    conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError)
)


def _names_shapes(hint) -> bool:
    """Whether a hint is, or holds, one of jaxtyping's; a hint in quotes may be."""
    if isinstance(hint, str) or type(hint).__module__.startswith("jaxtyping."):
        return True
    inner = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(map(_names_shapes, inner))


def _checked(fn=None, **options):
    """What the import hook puts on every function: checks all of its hints.

    Where none names a shape there are no sizes to compare, and beartype checks the
    same by itself, in far less time for each call and each definition.
    """
    if fn is None:
        return lambda fn: _checked(fn, **options)
    if (
        not inspect.isfunction(fn)
        or inspect.isgeneratorfunction(fn)  # beartype allows fewer hints of these
        or any(map(_names_shapes, fn.__annotations__.values()))
    ):
        return _jaxtyped(fn, **options)
    return _plainly(fn)


jaxtyping.jaxtyped = _checked  # before anything of the library is imported


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
