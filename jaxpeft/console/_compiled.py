"""What is kept from one process to the next: files fetched, programs compiled."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

OFF = "off"
_LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


class Kept(NamedTuple):
    """What became of keeping compiled programs.

    Attributes:
        folder: where they are kept; empty where they are not.
        said: a line that says so, or why they are not.
        failed: whether they were to be kept, and cannot be.
    """

    folder: str
    said: str
    failed: bool = False


def cache_folder() -> Path:
    """Returns the user's folder for what can be made or fetched again.

    It is ``$JAXPEFT_CACHE``, else ``$XDG_CACHE_HOME/jaxpeft``, else
    ``~/.cache/jaxpeft``; it need not be there.

    Example:
        >>> cache_folder().is_absolute() or "JAXPEFT_CACHE" in os.environ
        True
    """
    if own := os.environ.get("JAXPEFT_CACHE"):
        return Path(own).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "jaxpeft"


def keep_compiled(folder: str = "") -> Kept:
    """Keeps the programs that JAX compiles from now on, for this and later processes.

    It is JAX's persistent compilation cache. Processes may share the folder. An entry
    that another one is writing, or left half written, costs a warning and a compile.

    Args:
        folder: where; made if need be. Empty: where ``JAX_COMPILATION_CACHE_DIR`` or
            the program has told JAX to, else ``compiled`` in ``cache_folder()``.
            ``"off"``: nowhere. ``JAX_ENABLE_COMPILATION_CACHE=0`` also turns it off.

    Returns:
        Where they are kept. A folder that cannot be written is said, not raised.

    Example:
        >>> keep_compiled("off").said
        'compiled programs are not kept'
    """
    off = folder == OFF or not jax.config.jax_enable_compilation_cache
    if off:
        _use(None)
        return Kept("", "compiled programs are not kept")
    told = jax.config.jax_compilation_cache_dir  # the variable, as JAX began
    told = told or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    chosen = folder or told or str(cache_folder() / "compiled")
    if "://" not in chosen:  # else JAX knows how to write there
        chosen = str(Path(chosen).expanduser().absolute())
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=chosen).close()
        except OSError as error:
            _use(None)
            said = f"compiled programs are not kept: {chosen!r}: {error.strerror}"
            return Kept("", said, failed=True)
    if _LEAST not in os.environ:  # small programs are many
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _use(chosen)
    return Kept(chosen, f"compiled programs are kept in {chosen}")


def _use(folder: str | None) -> None:
    if jax.config.jax_compilation_cache_dir != folder:
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()  # or it would go on as it began
