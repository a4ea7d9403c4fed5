"""safetensors files written one tensor at a time, from shapes known beforehand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
# As the format calls them.
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def shards(planned: Iterable[Planned], most: int) -> list[list[Planned]]:
    """Cuts a list of tensors into files of at most ``most`` bytes, where that goes.

    A tensor that is larger than that has a file of its own.
    """
    files: list[list[Planned]] = [[]]
    room = most
    for tensor in planned:
        if files[-1] and tensor.size > room:
            files.append([])
            room = most
        files[-1].append(tensor)
        room -= tensor.size
    return files


class Writer:
    """One file, opened with a header of everything that is to come.

    Args:
        file: where to.
        planned: all tensors, in the order in which they will be added.

    Raises:
        ValueError: a dtype has no name in the format.
    """

    def __init__(self, file: Path, planned: list[Planned]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in planned:
            if tensor.dtype.name not in _DTYPES:
                raise ValueError(
                    f"tensor {tensor.name!r} has dtype {tensor.dtype}; write dtype= "
                    f"one of {', '.join(_DTYPES)}."
                )
            header[tensor.name] = {
                "dtype": _DTYPES[tensor.dtype.name],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.size],
            }
            at += tensor.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self._left = list(planned)
        self._file = open(file, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, value: np.ndarray) -> None:
        """Writes the next tensor; closes the file after the last."""
        expected = self._left.pop(0)
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise AssertionError(f"{expected} was planned, {value.dtype} {value.shape}")
        # tobytes: in the order of the axes, whatever the strides are.
        self._file.write(value.tobytes())
        if not self._left:
            self._file.close()

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._file.close()


def shard_bytes(size: int | str) -> int:
    """A number of bytes, also of ``"500MB"``; raises where it is none above zero."""
    if isinstance(size, str):
        for unit, factor in UNITS.items():
            number = size.upper().removesuffix(unit).strip()
            if size.upper().endswith(unit) and number.replace(".", "", 1).isdigit():
                size = int(float(number) * factor)
                break
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"`max_shard_size` must be a number of bytes or a string such as '5GB', "
            f"got {size!r}."
        )
    return size
