"""The safetensors writer, and that nobody goes around it; fingerprints."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft.interop import write_tensors
from jaxpeft.interop._tensors import TensorFile
from jaxpeft.numerics import checksum, projection

ROOT = Path(jaxpeft.__file__).parent
WRITERS = {"save_file", "save", "serialize", "serialize_file"}

ARRAYS = {
    "transposed": np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
    "broadcast": np.broadcast_to(np.float32(7), (2, 3)),
    "strided": np.arange(10, dtype=np.int32)[::-3],
    "bf16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T,
    "scalar": np.float32(2.5),
    "empty": np.zeros((3, 0), np.float32),
    "jax": jnp.arange(6.0).reshape(2, 3).T,
    "jax_scalar": jnp.array(1.5, jnp.bfloat16),
    "bool": np.array([True, False]),
    "negative_zero": np.array([-0.0, np.nan, np.inf], np.float16),
}


def test_any_array_reads_back_bit_for_bit(tmp_path):
    write_tensors(tmp_path / "x.safetensors", ARRAYS, {"note": "here"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"note": "here"}
    assert file.shapes == {name: np.shape(x) for name, x in ARRAYS.items()}
    for name, x in ARRAYS.items():
        back = file.read(name)
        assert back.dtype == np.asarray(x).dtype, name
        assert back.shape == np.shape(x), name
        assert back.tobytes() == np.ascontiguousarray(x).tobytes(), name


def test_the_library_alone_would_write_it_wrongly(tmp_path):
    """The reason for the helper; when this fails the helper has become needless."""
    x = ARRAYS["transposed"]
    safetensors.numpy.save_file({"x": x}, tmp_path / "x.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"]
    assert not np.array_equal(back, x)


def test_spread_arrays_are_gathered(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    x = jnp.arange(32.0).reshape(8, 4)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
    write_tensors(tmp_path / "x.safetensors", {"x": spread}, {})
    assert np.array_equal(TensorFile(tmp_path / "x.safetensors").read("x"), x)


def test_dtypes_that_do_not_read_back_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'x' has dtype float8_e4m3fn.*cast it"):
        write_tensors(tmp_path / "x", {"x": jnp.ones(2, jnp.float8_e4m3fn)}, {})


def test_nobody_else_calls_the_librarys_writers():
    def callers(file):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.split(".")[0] == "safetensors":
                    yield from (a.name for a in node.names if a.name in WRITERS)
            if isinstance(node, ast.Import):  # `import safetensors.numpy` hides calls
                yield from (
                    a.name for a in node.names if a.name.startswith("safetensors.")
                )

    files = [*ROOT.rglob("*.py"), *ROOT.parent.glob("*.py")]
    files += [*(ROOT.parent / "benchmarks").rglob("*.py")]
    found = {str(f.relative_to(ROOT)) for f in files if any(callers(f))}
    assert found == {"interop/_tensors.py"}


# --- fingerprints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checksum_sees_every_bit_and_place(dtype, keys):
    x = np.asarray(jax.random.normal(next(keys), (3, 5)).astype(dtype))
    seen = {checksum(jnp.asarray(x))}
    for i in range(x.size):
        for bit in (0, 8 * x.itemsize - 1):
            y = x.copy()
            y.view(f"uint{8 * x.itemsize}").reshape(-1)[i] ^= 1 << bit
            seen.add(checksum(jnp.asarray(y)))
    seen.add(checksum(jnp.asarray(x[::-1])))
    seen.add(checksum(jnp.asarray(x.T)))
    assert len(seen) == 2 * x.size + 3


def test_checksum_is_the_same_everywhere(keys):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    x = jax.random.normal(next(keys), (8, 6))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
    assert checksum(x) == checksum(spread) == checksum(np.asarray(x))
    with jax.enable_x64(True):
        assert checksum(np.asarray(x)) == checksum(x)


def test_checksum_is_pinned():
    # Files that exist rely on it: exact integer arithmetic, the same on every device.
    assert checksum(jnp.arange(6.0).reshape(2, 3)) == "8599ff1fe49c4e48"


def test_projection_forgives_rounding_only(keys):
    x = jax.random.normal(next(keys), (64, 32))
    along, norm = projection(x)
    near, _ = projection(x * (1 + 1e-6))
    other, _ = projection(jax.random.normal(next(keys), (64, 32)))
    assert abs(near - along) < 1e-4 * norm
    assert abs(other - along) > 1e-2 * norm
