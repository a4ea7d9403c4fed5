"""Checkpoints: which tensors lie where, and blocks of them."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft.console import optional
from jaxpeft.models._families import Source
from jaxpeft.models._gguf import GgufFile, is_readable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GGUF = ".gguf"

CHUNK = 1 << 25  # bytes of one read; what a load needs beside what it makes

# The floating dtypes of safetensors that numpy (with ml_dtypes) reads.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}


class Tensor(NamedTuple):
    """One tensor on disk: its file, name there, shape and safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype it is read as, or None if it is no floating type read here."""
        if self.file.suffix == GGUF:
            return np.dtype(np.float32) if is_readable(self.dtype) else None
        found = _DTYPES.get(self.dtype)
        return None if found is None else np.dtype(found)


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint by name; reads headers only.

    Args:
      folder: a folder with safetensors, or a GGUF file.

    Raises:
      ValueError: if there is no safetensors checkpoint, a file is missing or cut
        short, or the index does not fit the files.
    """
    if folder.suffix == GGUF and folder.is_file():
        folder, files, index = folder.parent, [folder.name], {}
    elif (folder / SINGLE).exists():
        files, index = [SINGLE], {}
    elif (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(index.values()))
    else:
        raise ValueError(_no_weights(folder))
    if absent := [name for name in files if not (folder / name).exists()]:
        raise ValueError(f"{folder / INDEX} names files that are not there: {absent}.")
    found = {}
    with opened(folder / name for name in files) as handles:
        for file, handle in handles.items():
            for name in handle.keys():
                block = handle.get_slice(name)
                found[name] = Tensor(
                    file, name, tuple(block.get_shape()), block.get_dtype()
                )
    wrong = [
        f"{name} in {file}"
        for name, file in index.items()
        if name not in found or found[name].file.name != file
    ]
    if wrong:
        raise ValueError(f"{folder / INDEX} names tensors that are not there: {wrong}.")
    return found


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds pytorch_model.bin only, a pickle that may run code when "
            "read. Convert it where PyTorch is installed: transformers.AutoModel"
            f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), or "
            "AutoModelForSequenceClassification to keep a head."
        )
    have = sorted(path.name for path in folder.iterdir())
    return f"{folder} has neither {SINGLE} nor {INDEX}; it has {have}."


@contextlib.contextmanager
def opened(files: Any) -> Iterator[dict[Path, Any]]:
    """Opens safetensors or GGUF files for partial reads.

    Args:
      files: paths.

    Yields:
      A handle for each path.
    """
    with optional("Files of weights"):
        from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        handles = {}
        for file in files:
            if file.suffix == GGUF:
                handles[file] = stack.enter_context(GgufFile(file))
                continue
            try:
                handles[file] = stack.enter_context(safe_open(file, framework="np"))
            except SafetensorError as error:
                raise ValueError(
                    f"{file} ({file.stat().st_size} bytes) is no whole safetensors "
                    f"file: {error}. It was cut short while copied; fetch it again."
                ) from error
        yield handles


def read_block(
    handles: Mapping[Path, Any], tensor: Tensor, index: tuple[slice, ...]
) -> np.ndarray:
    """Reads one block of one tensor; nothing else of the file is touched."""
    return handles[tensor.file].get_slice(tensor.name)[index]


def read_leaf(
    handles: Mapping[Path, Any],
    tensors: tuple[Tensor, ...],
    source: Source,
    index: tuple[slice, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Returns a block of one of our leaves, contiguous and in ``dtype``.

    Args:
      handles: open files.
      tensors: the tensors of ``source``, in its order.
      source: where the leaf lies.
      index: the block of our leaf, a slice (step 1) for every axis.
      dtype: dtype of the result.

    Raises:
      ValueError: a number of it is NaN or infinite, in the file or in ``dtype``.
    """
    if source.stacked:
        layers, index = range(index[0].start, index[0].stop), index[1:]
    else:
        layers = range(1)
    theirs = index[::-1] if source.transposed else index
    shape = tuple(part.stop - part.start for part in index)
    # Filled part by part: transposing and casting are one copy, into its place.
    block = np.empty((len(layers), *shape), dtype)
    for row, layer in zip(block, layers, strict=True):
        view = row.T if source.transposed else row
        for start, stop in _chunks(theirs, tensors[layer].numpy_dtype):
            rows = (slice(theirs[0].start + start, theirs[0].start + stop), *theirs[1:])
            with np.errstate(over="ignore", invalid="ignore"):  # looked for here
                part = read_block(handles, tensors[layer], rows)
                view[start:stop] = _finite(part, tensors[layer], dtype)
    return block if source.stacked else block[0]


def _finite(part: np.ndarray, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """A part of a tensor in another dtype, unless that holds NaN or infinity."""
    cast = part.astype(dtype, copy=False)
    if _is_finite(cast):
        return cast
    if _is_finite(part):
        raise ValueError(
            f"`param_dtype` is {np.dtype(dtype).name}, and {tensor.name} in "
            f"{tensor.file} has numbers up to {np.abs(part).max()}, beyond what that "
            "holds; write param_dtype='bfloat16' or 'float32'."
        )
    count = int(np.sum(~np.isfinite(part)))
    raise ValueError(
        f"{tensor.name} in {tensor.file} is not finite: {count} of the {part.size} "
        "numbers read at once are NaN or infinite. The file was damaged, or saved "
        "from a training that had diverged; fetch it again."
    )


def _is_finite(x: np.ndarray) -> bool:
    if x.dtype.itemsize != 2:
        return bool(np.isfinite(x).all())
    # NumPy has no fast test of half precision; without their sign bits, numbers are
    # ordered as integers are, and infinity and NaN come last.
    infinity = np.array(np.inf, x.dtype).view(np.uint16)
    return bool(((x.view(np.uint16) & 0x7FFF) < infinity).all())


def _chunks(index: tuple[slice, ...], dtype: Any) -> Iterator[tuple[int, int]]:
    """Ranges of an index's first axis that are each about ``CHUNK`` bytes."""
    rows, *rest = (part.stop - part.start for part in index)
    each = max(1, CHUNK // max(1, math.prod(rest) * np.dtype(dtype).itemsize))
    for start in range(0, rows, each):
        yield start, min(start + each, rows)


def are_equal(handles: Mapping[Path, Any], one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; read a part at a time."""
    whole = tuple(slice(0, size) for size in one.shape)
    return one.shape == other.shape and all(
        np.array_equal(
            read_block(handles, one, (slice(start, stop), *whole[1:])),
            read_block(handles, other, (slice(start, stop), *whole[1:])),
        )
        for start, stop in _chunks(whole, one.numpy_dtype)
    )
