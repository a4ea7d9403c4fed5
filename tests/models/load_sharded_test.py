"""Straight to shards: same numbers, every block read once by whom it concerns."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
from checkpoint_toolbox import D, F, L, assert_same, tensors
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import models
from jaxpeft.models import _checkpoint as checkpoint


@pytest.fixture
def mesh():
    return jax.make_mesh(
        (2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def spec_for(path, shape):
    if "classifier" in path or len(shape) < 2:
        return PartitionSpec()
    if "word_embeddings" in path:
        return PartitionSpec("fsdp")  # replicated over tensor
    return PartitionSpec(*(None,) * (len(shape) - 2), "fsdp", "tensor")


@pytest.fixture
def reads(monkeypatch):
    """Every block read from disk: (tensor, bounds, bytes)."""
    seen = []
    read = checkpoint.read_block

    def record(handles, tensor, index):
        block = read(handles, tensor, index)
        seen.append((tensor.name, str(index), block.nbytes))
        return block

    monkeypatch.setattr(checkpoint, "read_block", record)
    return seen


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_sharded_equals_plain_and_reads_each_block_once(
    write, mesh, reads, scan_layers
):
    content = tensors()
    folder = write(content, shards=2)
    options = {
        "head": "classification",
        "num_labels": 3,
        "scan_layers": scan_layers,
    }
    _, plain = models.load(folder, **options)
    whole = sum(leaf.nbytes for leaf in content.values())
    assert sum(count for *_, count in reads) == whole
    reads.clear()

    def place(path, shape):
        if "position" in path or "token_type" in path:
            return NamedSharding(mesh, PartitionSpec(None, "tensor"))
        return NamedSharding(mesh, spec_for(path, shape))

    _, params = models.load(folder, sharding=place, **options)
    assert_same(params, plain)
    assert len(reads) == len(set(reads)), "a block was read twice"
    assert sum(count for *_, count in reads) == whole  # eight devices, every byte once
    query = "layer" if scan_layers else "layer_1"
    kernel = params["encoder"][query]["attention"]["query"]["kernel"]
    assert {s.data.shape[-2:] for s in kernel.addressable_shards} == {(D // 2, D // 4)}
    assert kernel.sharding.spec == spec_for("query/kernel", kernel.shape)


def test_shardings_as_one_and_as_a_tree(write, mesh):
    folder = write(tensors(classifier=False))
    options = {"head": "classification", "num_labels": 3, "key": jax.random.key(0)}
    model, plain = models.load(folder, **options)
    everywhere = NamedSharding(mesh, PartitionSpec())
    options["key"] = jax.random.key(0)
    _, params = models.load(folder, sharding=everywhere, **options)
    assert_same(params, plain)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}

    tree = jax.tree.map(lambda _: everywhere, plain)
    tree["classifier"]["kernel"] = NamedSharding(mesh, PartitionSpec("tensor"))
    options["key"] = jax.random.key(0)
    _, params = models.load(folder, sharding=tree, **options)
    assert_same(params, plain)
    assert params["classifier"]["kernel"].sharding.spec == PartitionSpec("tensor")

    drawn = models.init(model, jax.random.key(1), sharding=tree)
    assert_same(drawn, models.init(model, jax.random.key(1)))
    assert drawn["classifier"]["kernel"].sharding.spec == PartitionSpec("tensor")

    del tree["pooler"]["dense"]["bias"]
    with pytest.raises(ValueError, match=r"`sharding` is a tree.*pooler/dense/bias"):
        models.load(folder, sharding=tree, **options)
    with pytest.raises(ValueError, match=r"`sharding` of .*; write jax.sharding.Named"):
        models.load(folder, sharding=spec_for, **options)
    uneven = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    with pytest.raises(ValueError, match="`sharding` of .*should evenly divide"):
        models.load(folder, sharding=uneven, **options)


@pytest.mark.slow
def test_two_processes_read_disjoint_shards(write):
    folder = write(tensors(classifier=False, pooler=False))
    code = textwrap.dedent(
        """
        import json, sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=2, process_id=rank
        )
        from jaxpeft import models
        from jaxpeft.models import _checkpoint as checkpoint
        seen, read = [], checkpoint.read_block
        def record(handles, tensor, index):
            block = read(handles, tensor, index)
            if tensor.name.endswith("dense.weight"):
                seen.append([tensor.name, str(index), block.size])
            return block
        checkpoint.read_block = record
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        def place(path, shape):
            spec = PartitionSpec("x") if path.endswith("kernel") else PartitionSpec()
            return NamedSharding(mesh, spec)
        models.load(folder, sharding=place)
        print("READS", json.dumps(seen))
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    first, second = (
        json.loads(output.partition("READS ")[2].splitlines()[0]) for output in outputs
    )
    blocks = [tuple(read[:2]) for read in first + second]
    assert len(blocks) == len(set(blocks))
    sizes = [sum(read[2] for read in reads) for reads in (first, second)]
    assert sizes == [L * (D * D + 2 * D * F) // 2] * 2
