"""Meshes over slices that a slower network joins."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxpeft import training
from jaxpeft.training import _slices

ALLOWED = ("data", "fsdp")
# Eight devices of two slices, as far as a mesh looks at them.
DEVICES = [SimpleNamespace(slice_index=n // 4) for n in range(8)]


def test_one_axis_alone_goes_over_the_slower_network(monkeypatch):
    seen = []

    def arrange(inner, outer, *, devices, **options):
        seen.append((tuple(inner), tuple(outer)))
        return np.array(devices, object).reshape(np.multiply(inner, outer))

    monkeypatch.setattr(_slices.mesh_utils, "create_hybrid_device_mesh", arrange)
    for data, fsdp in ((2, 2), (1, 4)):
        sizes = {"data": data, "fsdp": fsdp, "tensor": 2}
        _slices.over_slices(sizes, ALLOWED, 2, DEVICES)
    assert seen == [((1, 2, 2), (2, 1, 1)), ((1, 2, 2), (1, 2, 1))]


def test_the_tensor_axis_does_not():
    with pytest.raises(ValueError, match="`data` or `fsdp` must be a multiple of 2"):
        training.make_mesh(data=1, fsdp=1, tensor=8, devices=DEVICES)
