"""No adapter is attached to what is no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.tree import rebuild

METHODS = sorted(
    name
    for name in dir(jp.adapters)
    if not name.startswith("_") and callable(getattr(jp.adapters, name))
)


def made(name):
    """A method at its defaults, of a rank that fits these kernels."""
    adapter = getattr(jp.adapters, name)()
    return adapter if adapter.where.rank is None else rebuild(adapter, rank=2)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_kernel_that_is_not_finite(name, value):
    """The site by name, before an SVD or anything else is computed."""
    adapter = made(name)
    leaf = "bias" if adapter.where.leaf == "bias" else "kernel"
    params = {
        f"{name}_{i}": {"kernel": np.ones((6, 5), np.float32), "bias": np.ones(5)}
        for i in range(4)  # as many layers as some methods count with
    }
    params = jax.tree.map(np.float32, params)
    params[f"{name}_1"][leaf].flat[3] = value
    made_of = []
    init = adapter.init
    adapter = adapter._replace(init=lambda *a, **k: made_of.append(1) or init(*a, **k))
    targets = list(params)
    with pytest.raises(ValueError, match=f"`params`.*{name}_1/{leaf}'.*exclude=") as e:
        jp.attach(params, adapter, targets, key=jax.random.key(0))
    assert f"{name}_0/" not in str(e.value)
    # The advice works, and so do kernels of finite numbers.
    exclude = [f"{name}_1"]
    jp.attach(params, made(name), targets, key=jax.random.key(0), exclude=exclude)


def test_a_stack_names_its_layers():
    stack = np.ones((4, 6, 5), np.float32)
    stack[1, 2, 3], stack[3, 0, 0] = np.nan, np.inf
    options = {"key": jax.random.key(0), "axes": {"up": "layer in out"}}
    with pytest.raises(ValueError, match=r"'up/kernel', layers \[1, 3\]"):
        jp.attach({"up": {"kernel": stack}}, jp.lora(rank=2), ["up"], **options)
    experts = {"up": {"kernel": stack.reshape(2, 2, 6, 5)}}
    options["axes"] = {"up": "layer expert in out"}
    with pytest.raises(ValueError, match=r"layers \[\[0, 1\], \[1, 1\]\]"):
        jp.attach(experts, jp.pissa(rank=2), ["up"], **options)


def test_tables_and_narrow_kernels():
    table = jnp.ones((7, 4), jnp.bfloat16).at[2, 2].set(jnp.inf)
    params = {"embed": {"embedding": table}}
    with pytest.raises(ValueError, match="'embed/embedding'"):
        jp.attach(params, jp.lora(rank=2), ["embed"], key=jax.random.key(0))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_kernels_are_checked_where_they_lie(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=types)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    kernel = np.ones((8, 6), np.float32)
    attach = lambda kernel: jp.attach(
        {"q": jax.device_put(kernel, where)}, jp.lora(2), ["q"], key=jax.random.key(0)
    )
    assert attach(kernel)["q"].base.sharding.is_equivalent_to(where, 2)
    kernel[7, 5] = np.nan
    with pytest.raises(ValueError, match="at: 'q'"):
        attach(kernel)


def test_what_has_no_values_is_passed_over():
    kernel = jnp.full((6, 5), jnp.nan)
    attach = lambda k: jp.attach({"q": k}, jp.lora(2), ["q"], key=jax.random.key(0))
    attach(jax.ShapeDtypeStruct((6, 5), jnp.float32))
    jax.eval_shape(attach, kernel)
    assert np.all(np.isnan(jax.jit(attach)(kernel)["q"].base))
