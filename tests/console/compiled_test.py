"""Compiled programs are kept in the user's cache folder, or it is said why not."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft.console import cache_folder, keep_compiled

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """No folder is told of; afterwards JAX keeps programs where it did."""
    told = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAXPEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    compilation_cache.set_cache_dir(None)
    yield
    compilation_cache.set_cache_dir(told)
    compilation_cache.reset_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def compiled(value):
    """Compiles a program of its own."""
    jax.jit(lambda x: x * value + 1)(jnp.arange(3)).block_until_ready()


def test_the_folder_is_the_users_unless_another_is_told(tmp_path, monkeypatch):
    assert cache_folder() == Path("~/.cache/jaxpeft").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    usual = tmp_path / "xdg/jaxpeft/compiled"
    assert cache_folder() == usual.parent
    kept = keep_compiled()
    assert kept == (str(usual), f"compiled programs are kept in {usual}", False)
    compiled(17)
    assert list(usual.iterdir())
    # JAX's own variable wins over it, and a folder that is named over both.
    compilation_cache.set_cache_dir(None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "told"))
    assert keep_compiled().folder == str(tmp_path / "told")
    assert keep_compiled(str(tmp_path / "named")).folder == str(tmp_path / "named")
    compiled(19)
    assert list((tmp_path / "named").iterdir())
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_off_is_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled("off") == ("", "compiled programs are not kept", False)
    compiled(23)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "told"))
    jax.config.update("jax_enable_compilation_cache", False)  # or JAX's variable
    try:
        assert not keep_compiled().folder
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept = keep_compiled(str(tmp_path / "file"))
    assert kept.failed and not kept.folder
    assert kept.said.startswith(f"compiled programs are not kept: '{tmp_path}/file': ")
    compiled(29)  # and goes on


@pytest.mark.filterwarnings("default:Error reading persistent compilation cache")
def test_a_half_written_entry_costs_a_warning(tmp_path):
    keep_compiled(str(tmp_path))
    compiled(31)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        compiled(31)


def test_importing_keeps_nothing(tmp_path):
    code = (
        "import jaxpeft, jax, jax.numpy as jnp; jax.jit(lambda x: x + 1)(1.0);"
        "assert jax.config.jax_compilation_cache_dir is None"
    )
    told = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=told, check=True)
    assert not list(tmp_path.iterdir())
