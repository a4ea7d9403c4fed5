"""safetensors files of whole arrays; the only caller of the library's writer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft.console import optional


def on_host(x: Any) -> np.ndarray:
    """Returns an array as a contiguous NumPy array of the same shape and bits.

    The writer takes a pointer and a byte count and looks at no strides: a transposed
    or broadcast view would be written in the wrong order, without an error. Arrays
    that are spread over several processes are gathered; every process must call this.

    Args:
        x: a JAX or NumPy array, or a scalar.

    Returns:
        ``[*x.shape]``, C-contiguous.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    # ascontiguousarray alone would turn a scalar into shape (1,).
    return np.ascontiguousarray(np.asarray(x)).reshape(np.shape(x))


def is_finite(x: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite."""
    return bool(np.isfinite(x).all())


def write_tensors(
    file: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays to a safetensors file, bit for bit.

    Args:
        file: where to; overwritten if it exists.
        tensors: arrays by name, of any strides, 0-d and empty ones included.
        metadata: strings for the header.

    Raises:
        ValueError: an array's dtype has no form in the file that reads back.
    """
    with optional("Files of weights"):
        from safetensors.numpy import save_file

    arrays = {name: on_host(x) for name, x in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _READABLE:
            raise ValueError(
                f"tensor {name!r} has dtype {array.dtype}, which safetensors does not "
                f"read back; cast it to one of {', '.join(_READABLE)}."
            )
    save_file(arrays, file, metadata=dict(metadata))


_READABLE = (
    *("float64", "float32", "float16", "bfloat16", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)


class TensorFile:
    """A safetensors file opened for reading: the header first, arrays on demand."""

    def __init__(self, file: str | Path):
        with optional("Files of weights"):
            from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(file, framework="np")
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{file} is no whole safetensors file ({e}); copy it again from where "
                "it was saved."
            ) from e
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape())
            for name in self._file.keys()
        }

    def read(self, name: str) -> np.ndarray:
        """Reads one array."""
        return self._file.get_tensor(name)

    def not_finite(self, names: Iterable[str]) -> list[str]:
        """What is wrong with those of some arrays that hold NaN or infinity."""
        return [
            f"{name!r} is not finite (it has NaN or infinity)"
            for name in sorted(names)
            if not is_finite(self.read(name))
        ]
