"""The mesh, the placement rules, and batches on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft import training
from jaxpeft.training import _batch
from jaxpeft.tree import flat


def shapes(tree):
    is_shape = lambda x: isinstance(x, tuple)
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.tree.map(make, tree, is_leaf=is_shape)


def test_one_axis_takes_what_the_others_leave():
    assert dict(training.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = training.make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = training.make_mesh(data=1, fsdp=-1)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    mesh = training.make_mesh(devices=jax.devices()[:2])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    mesh = training.make_mesh(tensor=2, sequence=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"fsdp=3, tensor=1 does not fit 8 devices.*\[1, 2, 4, 8\]"),
        ({"data": 2, "fsdp": 2}, "does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices"),
        ({"fsdp": 0}, "`fsdp` must be a positive number"),
        ({"data": -1, "tensor": -1}, "only one mesh axis may be -1"),
        ({"sequence": 3}, r"fsdp=1, sequence=3, tensor=1 does not fit 8 devices"),
        ({"sequnce": 2}, "no axis 'sequnce'; its axes are data, fsdp, sequence, tens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        training.make_mesh(**sizes)


def test_rows_that_processes_would_share_are_refused(monkeypatch):
    half = property(lambda mesh: list(mesh.devices.flat)[:4])
    monkeypatch.setattr(jax.sharding.Mesh, "local_devices", half)
    monkeypatch.setattr(_batch, "_processes", lambda mesh: 2)
    mesh = training.make_mesh(data=1, tensor=2, sequence=4)
    message = "sequence=4 x tensor=2 reaches over.*sequence times tensor that divides"
    with pytest.raises(ValueError, match=message + " the 4 devices"):
        training.check_rows(4, mesh)


def test_placement_rules():
    params = shapes(
        {
            "query": {"kernel": (8, 16), "bias": (16,)},
            "output": {"dense": {"kernel": (16, 8)}},
            "norm": {"scale": (8, 8)},
            "embed": {"embedding": (30, 8)},
            "odd": {"kernel": (3, 5)},
            "layer": {"key": {"kernel": (3, 8, 4)}},
            "heads": {"value": {"kernel": (8, 2, 6)}},
            "conv": {"kernel": (3, 3, 4, 8)},
        }
    )
    mesh = training.make_mesh(2, 2, 2)
    axes = {"layer/key": "layer in out", "heads/value": "in out out"}
    assert training.param_specs(params, mesh, axes=axes) == {
        "query": {"kernel": P("fsdp", "tensor"), "bias": P(None)},
        "output": {"dense": {"kernel": P("tensor", "fsdp")}},
        "norm": {"scale": P(None, None)},
        "embed": {"embedding": P("fsdp", None)},
        "odd": {"kernel": P(None, None)},
        "layer": {"key": {"kernel": P(None, "fsdp", "tensor")}},
        "heads": {"value": {"kernel": P("fsdp", None, "tensor")}},
        "conv": {"kernel": P(None, None, None, "fsdp")},
    }


def test_what_does_not_divide_stays_whole():
    mesh = training.make_mesh(1, 4, 2)
    params = shapes({"query": {"kernel": (6, 8)}, "key": {"kernel": (6, 7)}})
    specs = training.param_specs(params, mesh)
    assert specs == {
        "query": {"kernel": P(None, "tensor")},
        "key": {"kernel": P(None, None)},
    }


def test_a_tensor_axis_that_cuts_nothing_is_an_error():
    mesh = training.make_mesh(tensor=2)
    params = shapes({"mine": {"kernel": (8, 8)}})
    with pytest.raises(ValueError, match="no kernel is cut by it.*'mine'"):
        training.param_specs(params, mesh)
    rules = [("mine", "in")]
    specs = training.param_specs(params, mesh, tensor_rules=rules)
    assert specs["mine"]["kernel"] == P("tensor", "fsdp")


def test_bad_axes_are_named():
    mesh = training.make_mesh()
    params = shapes({"query": {"kernel": (2, 8, 8)}})
    with pytest.raises(ValueError, match="`axes` entry 'querry' matched none"):
        training.param_specs(params, mesh, axes={"querry": "layer in out"})
    with pytest.raises(ValueError, match="2 words for the 3 axes"):
        training.param_specs(params, mesh, axes={"query": "in out"})


def test_adapters_are_placed_like_their_kernels(keys):
    mesh = training.make_mesh(2, 2, 2)
    params = {"query": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}
    adapted = jp.attach(params, jp.lora(rank=2), ["query"], key=next(keys))
    specs = training.param_specs(params, mesh)
    placed = flat(training.place(adapted, mesh, specs))
    found = {n: x.sharding.spec for n, x in placed.items() if x.ndim}
    assert found == {
        "query/kernel/base": P("fsdp", "tensor"),
        "query/kernel/a": P("fsdp", None),
        "query/kernel/b": P(None, "tensor"),
        "query/bias": P(None),
    }
    for name, x in flat(adapted).items():
        assert np.array_equal(placed[name], x), name
    abstract = jax.eval_shape(lambda: adapted)
    held = flat(training.place(abstract, mesh, specs))
    assert {type(x) for x in held.values()} == {jax.ShapeDtypeStruct}
    assert {n: x.sharding for n, x in held.items()} == {
        n: x.sharding for n, x in placed.items()
    }


def test_batches_carry_weights_and_padding():
    mesh = training.make_mesh(2, 2, 2)
    batch = {
        "x": np.arange(6, dtype=np.int32),
        "weight": np.full(6, 2.0, np.float32),
        "valid": np.arange(6) < 5,
    }
    placed = training.put_batch(batch, mesh, rows=8)
    assert sorted(placed) == ["weight", "x"]
    assert placed["weight"].tolist() == [2.0] * 5 + [0.0] * 3
    assert placed["x"].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    assert placed["x"].sharding == training.batch_sharding(mesh)
    plain = training.put_batch({"x": np.zeros(4)}, mesh)
    assert plain["weight"].tolist() == [1.0] * 4
    assert plain["weight"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"x": np.zeros(6)}, {}, "6 rows on this process is not divisible by its 4"),
        ({"x": np.zeros(4)}, {"accumulate": 2}, "times accumulate=2.*multiple of 8"),
        ({"x": np.zeros(4), "y": np.zeros(8)}, {}, "equal numbers of rows.*'y': 8"),
        ({"x": np.zeros(4), "y": np.float32(1)}, {}, "equal numbers of rows"),
        ({"x": np.array(["a", "b"])}, {}, "'x' has dtype <U1"),
        ({"x": np.zeros(12)}, {"rows": 8}, "`rows` is 8, but the batch has 12"),
        ({"x": np.zeros(0)}, {"rows": 8}, "no rows"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, options, message):
    with pytest.raises(ValueError, match=message):
        training.put_batch(batch, training.make_mesh(2, 2, 2), **options)


def test_gradients_do_not_depend_on_the_mesh():
    # Two dense layers after a row scale. With the batch cut by ("data", "fsdp") the
    # partitioner forgets a permutation of the rows here: the error was 3.1 of the
    # largest gradient.
    rng = np.random.default_rng(66)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernels = [draw(16, 8), draw(8, 8)]
    x, scale, weight = draw(16, 16), 1 + np.abs(draw(16, 1)), draw(16, 1)

    def loss(kernels, x, scale, weight):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel) / scale
        return jnp.sum(jnp.sin(x) * weight)

    expected = jax.jit(jax.grad(loss))(kernels, x, scale, weight)
    mesh = training.make_mesh(2, 2, 2)
    cut = jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
    rows = training.batch_sharding(mesh)
    placed = jax.device_put((kernels, x, scale, weight), (cut, rows, rows, rows))
    found = jax.jit(jax.grad(loss), out_shardings=[cut, cut])(*placed)
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, atol=1e-5)  # of about 3
