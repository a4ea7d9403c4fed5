"""Adapters of kernels on a mesh begin as they do on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft import training
from jaxpeft.tree import BATCH, IN, OUT, flat
from jaxpeft.tree._spread import _spread

AXES = {"heads": "layer in out out", "query": "layer in out"}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)], ids=str)
def test_layers_begin_on_devices_of_their_own(sizes, capfd):
    """Stacks of two ranks, of more axes, more layers than devices; and no stack."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {
        "query": {"kernel": draw(9, 8, 6)},
        "heads": {"kernel": draw(3, 8, 2, 4)},
        "key": {"kernel": draw(8, 4)},
    }
    mesh = training.make_mesh(*sizes)
    specs = training.param_specs(params, mesh, axes=AXES)
    placed = jax.device_put(params, training.shardings(specs, mesh))

    def attach(params):
        ranks = {"query": [2, 3, 2, 2, 3, 2, 2, 2, 2]}
        method, key = jp.kasa(rank=2), jax.random.key(0)
        targets = ["query", "heads", "key"]
        return jp.attach(
            params, method, targets, axes=AXES, rank_pattern=ranks, key=key
        )

    wanted, found = flat(attach(params)), flat(attach(placed))
    assert "rematerialization" not in capfd.readouterr().err
    assert sorted(found) == sorted(wanted)
    for path, leaf in found.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(leaf, wanted[path], atol=2e-5, err_msg=path)
    assert found["query/kernel/u_d"].sharding.spec == P(None, "fsdp", None)


def test_no_device_holds_a_stack():
    mesh = training.make_mesh(1, 4, 2)
    kernel = jnp.zeros((8, 16, 12))
    where = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    adapter = jp.kasa(rank=2)
    index = jnp.arange(8, dtype=jnp.int32)
    given = jax.random.split(jax.random.key(0), 8), index, jnp.ones(8)
    static = dict(start=None, roles=(BATCH, IN, OUT), rank=2, where=where)
    lowered = _spread.lower(
        jax.device_put(kernel, where), *given, adapter=adapter, **static
    )
    text = lowered.compile().as_text()
    assert "f32[8,16,12]" not in text and "f32[8,4,6]" in text
    assert "all-to-all" in text
