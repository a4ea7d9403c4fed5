"""What every adapter must do; knows no method's name.

Where methods differ, the fact is read from the adapter itself: from its factors, its
leaves, its report, its options. Both branches assert; nothing is skipped. ``_edges``
goes on with files, padding, dropout, dtypes and bad input, ``_beside`` with two
adapters on one kernel. Each test is given the ``name`` of a method.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.console import optional
from jaxpeft.hlo import made_of_shape
from jaxpeft.testing._compare import (
    CLOSE,
    distance,
    kernel_shapes,
    run_with_gradients,
)
from jaxpeft.testing._fixtures import params as params
from jaxpeft.testing._fixtures import x as x
from jaxpeft.testing._net import (
    AXES,
    KERNELS,
    RANK,
    D,
    L,
    at_init,
    attached,
    constructor,
    loss,
    make,
    moved,
    net,
    node_in,
    nodes,
    replaces_kernel,
    same_bits,
    starter,
    unrolled,
    value_and_grad,
)
from jaxpeft.transform import adapt
from jaxpeft.tree import (
    Adapter,
    attach,
    combine,
    count,
    describe,
    detach,
    flat,
    inherit_specs,
    merge,
    mergeable,
    partition,
    shared_names,
    unflat,
)

with optional("Contract tests"):
    import pytest

P = PartitionSpec


# --- the registry ---


def test_the_defaults_alone_make_an_adapter(name):
    adapter = constructor(name)()
    assert isinstance(adapter, Adapter) and adapter.name == name
    assert constructor(name)() is adapter  # equal trees have equal structures
    options = json.loads(json.dumps(dict(adapter.options)))
    assert constructor(name)(**options) is adapter
    assert repr(adapter).startswith(f"{name}(")


def test_unknown_options_are_refused(name):
    with pytest.raises(TypeError, match="rnak"):
        constructor(name)(rnak=3)


# --- at the start ---


def test_the_output_at_init_is_the_bases_or_that_of_a_declared_truncation(
    name, params, x
):
    adapted = at_init(name)
    if not mergeable(adapted):
        assert np.array_equal(adapt(net)(adapted, x), jax.jit(net)(params, x))
        return

    @jax.jit
    def run(adapted, params):
        merged = merge(adapted)
        return adapt(net)(adapted, x), merged, net(merged, x), net(params, x)

    got, merged, folded, plain = run(adapted, params)
    assert distance(got, folded) < CLOSE
    site = node_in(adapted, "dense").site.path
    assert site in [row["path"] for row in describe(adapted).rows]
    base = np.asarray(params["dense"]["kernel"], np.float64)
    change = base - np.asarray(merged["dense"]["kernel"], np.float64)
    size = np.linalg.norm(change) / np.linalg.norm(base)
    facts = [r for r in describe(adapted).report if r["site"] == site]
    if size < 1e-4:  # nothing, or a random start meant to be next to nothing
        tolerance = CLOSE if size < 1e-6 else 1e-4
        assert distance(got, plain) < tolerance
        return
    # The change is a fixed low-rank part: exactly the smallest singular components.
    values = np.linalg.svd(base, compute_uv=False)
    lost = np.linalg.svd(change, compute_uv=False)
    m = int(np.sum(lost > 1e-5 * values[0]))
    assert 0 < m < D
    np.testing.assert_allclose(lost[:m], values[-m:], rtol=1e-3)
    left = np.linalg.svd(base - change, compute_uv=False)
    np.testing.assert_allclose(left[: D - m], values[: D - m], rtol=1e-4)
    assert np.all(left[D - m :] < 1e-5 * values[0])
    # And the drift that `describe` shows is what these values say.
    expected = np.sqrt(np.sum(values[-m:] ** 2) / np.sum(values**2))
    np.testing.assert_allclose(facts[0]["drift"], expected, rtol=1e-3)
    np.testing.assert_allclose(size, expected, rtol=1e-3)


def test_leaves_are_float32_and_never_nan(name):
    trainable, frozen = partition(at_init(name))
    for leaf in jax.tree.leaves(trainable):
        assert leaf.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(leaf)))
    for leaf in jax.tree.leaves(frozen):
        assert leaf.dtype in (jnp.float32, jnp.bool_)  # or a mask
        assert bool(jnp.all(jnp.isfinite(leaf)))


def test_shapes_need_no_memory(name, params):
    attach_ = lambda p, k: attach(p, make(name), KERNELS, key=k, axes=AXES)
    shapes = jax.eval_shape(attach_, params, jax.random.key(0))
    real = at_init(name)
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    kind = lambda t: {n: (v.shape, v.dtype) for n, v in flat(t).items()}
    assert kind(shapes) == kind(real)
    assert count(shapes) == count(real)
    trained = sum(leaf.size for leaf in jax.tree.leaves(partition(real)[0]))
    base = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count(real) == (trained, base + trained)


def test_random_leaves_differ_between_sites_layers_and_keys(name, params):
    one, two = at_init(name), attached(params, name, jax.random.key(12))
    stack, others = (node_in(tree, "layers", "up") for tree in (one, two))
    again = starter(make(name))(params, jax.random.key(11))  # traced anew
    same_bits(again, one)
    for leaf in stack.trainable:
        first, second = (stack.trainable[leaf][i] for i in range(L))
        if not np.array_equal(stack.trainable[leaf], others.trainable[leaf]):
            assert not np.array_equal(first, second), f"{leaf}: one draw, two layers"


def test_no_key_is_used_twice(name, params):
    """The checker is on for every test; here it is seen to work."""
    adapter, key = make(name), jax.random.key(5)
    attached(params, name, jax.random.clone(key))
    attach(params, adapter, ["dense"], key=jax.random.clone(key))
    kernel = params["dense"]["kernel"]
    init = functools.partial(adapter.init, kernel=kernel, rank=RANK, alpha=1.0)
    one = init(key)
    try:
        two = init(key)
    except jax.errors.KeyReuseError:
        return  # it draws: the key was consumed
    same_bits(one, two)
    same_bits(one, init(jax.random.key(6)))  # it does not draw at all


# --- in use ---


def test_merge_is_the_function(name, params, x):
    adapted = moved(name)
    if not mergeable(adapted):
        with pytest.raises(ValueError, match="depends on the input"):
            merge(adapted)
        return
    got, got_grads, text = run_with_gradients(adapt(net), adapted, [x])
    through = lambda tree, x: net(merge(tree), x)
    expected, expected_grads, merged_text = run_with_gradients(through, adapted, [x])
    assert distance(got, expected) < CLOSE
    assert distance(got_grads, expected_grads) < CLOSE
    # Control: something happened, if little where three moved leaves are multiplied.
    assert distance(net(params, x), expected) > 100 * CLOSE
    shapes = kernel_shapes(adapted)
    assert made_of_shape(merged_text, shapes)
    formed = made_of_shape(text, shapes)
    if not any(map(replaces_kernel, nodes(adapted))):
        assert not formed, formed
    else:
        assert formed  # the gradient of the kernel is what is wanted


def test_only_trainable_leaves_learn_and_all_of_them_do(name, params, x):
    trainable, frozen = partition(moved(name))
    _, gradient = value_and_grad(trainable, frozen, x)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    for path, leaf in flat(gradient).items():
        assert np.any(np.asarray(leaf) != 0), f"{path} never learns"
        assert bool(jnp.all(jnp.isfinite(leaf))), path
    names = {n for node in nodes(moved(name)) for n in node.trainable}
    assert {p.rpartition("/")[2] for p in flat(gradient)} == names
    bases = {p for p in flat(frozen) if p.endswith("/base")}
    assert len(bases) == len(nodes(moved(name)))


def test_training_moves_what_is_trained_and_nothing_else(name, params, x):
    start = at_init(name)
    trainable, frozen = partition(start)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)
    moments = [s for s in jax.tree.leaves(state) if s.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trainable))

    traced = []

    @jax.jit
    def step(trainable, state):
        traced.append(True)
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    values = []
    for _ in range(5):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
    assert values[-1] < values[0] and len(traced) == 1
    end = combine(trainable, frozen)
    assert jax.tree.structure(end) == jax.tree.structure(start)
    for path, leaf in flat(partition(start)[0]).items():
        now = flat(trainable)[path]
        assert now.dtype == leaf.dtype and np.any(np.asarray(now != leaf)), path
    original = detach(end)
    if node_in(start, "dense").adapter.folded is None:
        same_bits(original, params)
        same_bits(jax.jit(detach)(end), params)
    else:
        assert distance(original, params) < 1e-6


def test_jit_equals_eager(name, x):
    trainable, frozen = partition(moved(name))
    eager = loss(trainable, frozen, x)
    np.testing.assert_allclose(
        value_and_grad(trainable, frozen, x)[0], eager, rtol=1e-5
    )


def test_the_function_is_traced_once(name, x):
    traces = []

    def counted(params, x):
        traces.append(1)
        return net(params, x)

    trainable, frozen = partition(moved(name))
    call = adapt(counted)
    for scale in (1.0, 2.0, 3.0):
        tree = jax.tree.map(lambda t: t * scale, trainable)  # noqa: B023
        call(combine(tree, frozen), scale * x)
    assert len(traces) == 1


def test_scan_equals_unrolled(name, params, x):
    """The same leaves, one layer at a time."""
    adapted = moved(name)
    apart = dict(params) | {
        "layers": {
            f"layer_{i}": jax.tree.map(lambda w: w[i], params["layers"])  # noqa: B023
            for i in range(L)
        }
    }
    axes = {"heads": "in out out"}
    begin = lambda p, k: attach(p, make(name), KERNELS, key=k, axes=axes)
    target = jax.eval_shape(begin, apart, jax.random.key(0))
    leaves = {}
    for path, leaf in flat(adapted).items():
        if not path.startswith("layers/"):
            leaves[path] = leaf
            continue
        shared = path.rpartition("/")[2] in shared_names(make(name))
        for i in range(L):
            one = leaf if shared else leaf[i]
            leaves[path.replace("layers/", f"layers/layer_{i}/")] = one
    target = unflat(target, leaves)
    trainable, frozen = partition(target)
    apart_loss = functools.partial(loss, fn=unrolled)
    value, gradient = jax.jit(jax.value_and_grad(apart_loss))(trainable, frozen, x)
    expected, expected_gradient = value_and_grad(*partition(adapted), x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    stacked = {}
    gradient = flat(gradient)
    for path in flat(expected_gradient):
        each = [path.replace("layers/", f"layers/layer_{i}/") for i in range(L)]
        stack = path.startswith("layers/")
        stacked[path] = (
            jnp.stack([gradient[p] for p in each]) if stack else gradient[path]
        )
    assert distance(stacked, flat(expected_gradient)) < CLOSE
    assert count(target)[0] == count(adapted)[0]


def test_remat_equals_not(name, x):
    trainable, frozen = partition(moved(name))
    fn = functools.partial(net, remat=True)
    again = jax.jit(jax.value_and_grad(functools.partial(loss, fn=fn)))
    expected = value_and_grad(trainable, frozen, x)
    assert distance(again(trainable, frozen, x), expected) < CLOSE


def test_eight_devices_equal_one(name, x):
    auto = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), auto)
    specs = {
        "dense": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
        "heads": {"kernel": P("tensor", None, "fsdp"), "bias": P(None, "fsdp")},
        "layers": {
            "up": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
            "down": {"kernel": P(None, "tensor", "fsdp"), "bias": P(None, "fsdp")},
        },
    }
    adapted = moved(name)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        inherit_specs(adapted, specs),
        is_leaf=lambda s: isinstance(s, P),
    )
    placed = jax.device_put(adapted, shardings)
    assert len(node_in(placed, "dense").base.devices()) == 8
    here = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    got = value_and_grad(*partition(placed), here)
    expected = value_and_grad(*partition(adapted), x)
    assert distance(got, expected) < CLOSE
