"""Strict settings for every test: eight CPU devices, no silent promotion."""

import atexit
import gc
import inspect
import os
import shutil
import sys
import tempfile
import typing

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import beartype
import jax
import jaxtyping
import pytest

# Runs and commands keep what they compile: not in the folder of whoever tests. What is
# tested in this process compiles anew.
OURS = "jaxpeft-tests-"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=OURS)
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )
elif OURS in os.environ["JAX_COMPILATION_CACHE_DIR"]:  # one that tests side by side
    jax.config.update("jax_compilation_cache_dir", None)

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

# The contract suite ships with the library, and its assertions tell what they compared,
# as those of tests do: pytest's import hook takes it before jaxtyping's.
pytest.register_assert_rewrite("jaxpeft.testing")
sys.meta_path.sort(key=lambda finder: type(finder).__name__ != "AssertionRewritingHook")

from jaxpeft.testing import use_strict_settings  # noqa: E402

use_strict_settings()

# Tracing makes many objects, and the collector would go through all that is imported
# again and again.
gc.freeze()
gc.set_threshold(20_000, 20, 20)


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


@pytest.fixture(scope="module")
def quick_compiles():
    """For files of tiny programs: LLVM's passes would be most of the time.

    A file says ``pytestmark = pytest.mark.usefixtures("quick_compiles")``.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
