"""Two processes with a kernel spread over both: attach, save, load."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpeft

PROGRAM = """
import os, sys

index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", "count=2")

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)

import jaxpeft as jp
from jaxpeft import interop

kernel = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
spread = jax.make_array_from_callback(kernel.shape, sharding, lambda i: kernel[i])
params = {"dense": {"kernel": spread}}
adapted = jp.attach(params, jp.kasa(rank=2), ["dense"], key=jax.random.key(0))
assert not adapted["dense"]["kernel"].trainable["a"].is_fully_addressable
loaded = interop.load_adapter(interop.save_adapter(adapted, folder), params)
assert jax.tree.structure(loaded) == jax.tree.structure(adapted)
for one, other in zip(jax.tree.leaves(adapted), jax.tree.leaves(loaded), strict=True):
    assert one.sharding == other.sharding
    for mine, theirs in zip(
        one.addressable_shards, other.addressable_shards, strict=True
    ):
        assert np.array_equal(mine.data, theirs.data)

whole = interop.load_adapter(folder, {"dense": {"kernel": jax.numpy.asarray(kernel)}})
assert whole["dense"]["kernel"].trainable["a"].shape == (8, 2)
print("fine")
"""


@pytest.mark.slow
def test_spread_adapters_are_saved_once_and_loaded_by_all(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), str(port), str(tmp_path / "a")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(jaxpeft.__file__).parents[1],
        )
        for i in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=240)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0 and "fine" in output, output[-3000:]
