"""Checkpoints that are quantised as they are read."""

import jax
import numpy as np
import pytest
from checkpoint_toolbox import tensors
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.models import _quantised
from jaxpeft.tree import flat

OPTIONS = {"head": "classification", "num_labels": 3}


def place(mesh):
    def where(path, shape):
        cut = ("fsdp", "tensor") if len(shape) > 1 and path.endswith("kernel") else ()
        spec = PartitionSpec(*(None,) * (len(shape) - 2), *cut)
        return NamedSharding(mesh, PartitionSpec() if "classifier" in path else spec)

    return where


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_codes_are_those_of_the_floats(write, scan_layers, monkeypatch):
    """Whole or layer by layer, on one device or on a mesh."""
    floats = []
    stored = _quantised.stored_as

    def record(x, like):
        floats.append((x, x.shape))
        return stored(x, like)

    monkeypatch.setattr(_quantised, "stored_as", record)
    folder, options = write(tensors()), OPTIONS | {"scan_layers": scan_layers}
    model, params = models.load(folder, **options)
    expected = jp.quantise(params, "int8", axes=model.axes)
    _, found = models.load(folder, quantise="int8", **options)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    _, spread = models.load(folder, quantise="int8", sharding=place(mesh), **options)
    for tree in (found, spread):
        assert jax.tree.structure(tree) == jax.tree.structure(expected)
        for path, x in flat(tree).items():
            assert np.array_equal(x, flat(expected)[path]), path
    names = [path for path in flat(found) if path.endswith("codes")]
    assert names and not [n for n in names if "embeddings" in n or "classifier" in n]
    # No kernel of floats was larger than one layer's, and each was given up.
    assert all(len(shape) == 2 and x.is_deleted() for x, shape in floats)
    codes = flat(spread)[names[0]]
    assert codes.sharding.spec[-2:] == ("fsdp", "tensor")
    assert flat(spread)[names[0][:-5] + "scale"].sharding.spec[-1] == "tensor"


def test_kernels_without_a_whole_group_are_named(write, monkeypatch):
    monkeypatch.setattr(models._load, "_make", None)  # nothing is read
    folder = write(tensors())
    with pytest.raises(
        ValueError, match=r"key/kernel' of .*fewer than one group of 64"
    ):
        models.load(folder, quantise="nf4", **OPTIONS)
    with pytest.raises(ValueError, match="`kind` must be one of int8, int4, nf4"):
        models.load(folder, quantise="int3", **OPTIONS)


def test_a_merged_checkpoint_is_of_floats(write, tmp_path):
    """Kernels without an adapter are written dequantised, those with one merged."""
    model, params = models.load(write(tensors()), quantise="int8", **OPTIONS)
    adapted = jp.attach(params, jp.lora(2), ["query"], key=jax.random.key(0))
    saved = dict(names=model.names, config=model.hf_config)
    interop.save_hf(adapted, tmp_path / "merged", **saved)
    _, again = models.load(tmp_path / "merged", **OPTIONS)
    for path, x in flat(jp.merge(adapted)).items():
        np.testing.assert_allclose(flat(again)[path], x, atol=1e-6, err_msg=path)
