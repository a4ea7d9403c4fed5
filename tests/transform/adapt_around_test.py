"""``adapt`` inside other transformations, and they inside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import (
    CLOSE,
    distance,
    everything,
    numbers,
    pair,
    prepare,
    run_with_gradients,
)
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft as jp

P = PartitionSpec
D, F, L = 12, 20, 2


def model(params, x, *, scale=1.0, flip=False):
    """A scanned stack, an embedding-like head and a plain layer."""

    def block(x, layer):
        y = jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x + y, None

    x, _ = lax.scan(block, x, params["layers"])
    y = x @ params["head"]
    return scale * (jnp.flip(y, -1) if flip else y)


@pytest.fixture(scope="module")
def params():
    return {
        "layers": {
            "up": numbers(L, D, F, seed=1, scale=0.3),
            "down": numbers(L, F, D, seed=2, scale=0.3),
        },
        "head": numbers(D, 7, seed=3, scale=0.3),
    }


@pytest.fixture
def x():
    return numbers(8, D)


AXES = {"up": "layer in out", "down": "layer in out"}


@pytest.fixture(scope="module")
def adapted(params):
    keys = iter([jax.random.key(0)])
    return prepare(params, everything(), ["up", "down", "head"], keys, axes=AXES)


def forward(trainable, frozen, x):
    return jp.adapt(model)(jp.combine(trainable, frozen), x)


def merged(trainable, frozen, x):
    return model(jp.merge(jp.combine(trainable, frozen)), x)


def loss_of(call):
    return lambda trainable, frozen, x: jnp.mean(jnp.square(call(trainable, frozen, x)))


def like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def both(f, *args):
    """The same transformation of the adapted function and of the merged one."""
    return jax.jit(functools.partial(f, forward))(*args), jax.jit(
        functools.partial(f, merged)
    )(*args)


def test_eager_equals_jit(adapted, x):
    trainable, frozen = jp.partition(adapted)
    # Not bit for bit: XLA fuses differently.
    assert (
        distance(forward(trainable, frozen, x), jax.jit(forward)(trainable, frozen, x))
        < CLOSE
    )
    assert distance(forward(trainable, frozen, x), merged(trainable, frozen, x)) < CLOSE


def test_jit_and_grad(adapted, x):
    trainable, frozen = jp.partition(adapted)
    f = lambda call, *args: jax.value_and_grad(loss_of(call))(*args)
    got, expected = both(f, trainable, frozen, x)
    assert distance(got, expected) < CLOSE
    assert jax.tree.structure(got[1]) == jax.tree.structure(trainable)


def test_jvp(adapted, x):
    trainable, frozen = jp.partition(adapted)

    def f(call, trainable, tangent, frozen, x, x_tangent):
        of = lambda t, x: call(t, frozen, x)
        return jax.jvp(of, (trainable, x), (tangent, x_tangent))

    got, expected = both(f, trainable, like(trainable, 5), frozen, x, like(x, 6))
    assert distance(got[0], expected[0]) < CLOSE
    assert distance(got[1], expected[1]) < CLOSE


def test_hessian_vector_product_in_the_adapter(adapted, x):
    trainable, frozen = jp.partition(adapted)

    def f(call, trainable, vector, frozen, x):
        slope = lambda t: jax.grad(loss_of(call))(t, frozen, x)
        return jax.jvp(slope, (trainable,), (vector,))[1]

    got, expected = both(f, trainable, like(trainable, 5), frozen, x)
    assert distance(got, expected) < CLOSE


def test_vmap_over_a_stack_of_adapters_on_one_base(adapted, x):
    trainable, frozen = jp.partition(adapted)
    several = jax.tree.map(lambda t: jnp.stack([t, 0.5 * t, -t]), trainable)

    def f(call, several, frozen, x):
        return jax.vmap(lambda t: call(t, frozen, x))(several)

    got, expected = both(f, several, frozen, x)
    assert distance(got, expected) < CLOSE
    assert distance(got[0], got[1]) > 1e-2
    text = str(jax.make_jaxpr(functools.partial(f, forward))(several, frozen, x))
    assert f"f32[3,{L},{D},{F}]" not in text, "a base kernel for each adapter"


def test_gradients_of_each_example_by_vmap(adapted, x):
    trainable, frozen = jp.partition(adapted)

    def f(call, trainable, frozen, x):
        of = lambda x: jax.grad(loss_of(call))(trainable, frozen, x[None])
        return jax.vmap(of)(x)

    got, expected = both(f, trainable, frozen, x)
    assert distance(got, expected) < CLOSE
    assert {g.shape[0] for g in jax.tree.leaves(got)} == {8}


@pytest.mark.parametrize(
    "policy", [None, "dots_saveable", "dots_with_no_batch_dims_saveable"]
)
def test_outer_checkpoint(policy, adapted, x):
    trainable, frozen = jp.partition(adapted)
    chosen = policy and getattr(jax.checkpoint_policies, policy)
    f = lambda call, *args: jax.grad(loss_of(jax.checkpoint(call, policy=chosen)))(
        *args
    )
    got, expected = both(f, trainable, frozen, x)
    assert distance(got, expected) < CLOSE


def test_outer_scan_accumulates_gradients(adapted, x):
    trainable, frozen = jp.partition(adapted)

    def f(call, trainable, frozen, x):
        def step(total, x):
            gradient = jax.grad(loss_of(call))(trainable, frozen, x)
            return jax.tree.map(jnp.add, total, gradient), None

        zero = jax.tree.map(jnp.zeros_like, trainable)
        return lax.scan(step, zero, x.reshape(4, 2, D))[0]

    got, expected = both(f, trainable, frozen, x)
    assert distance(got, expected) < CLOSE


def test_eval_shape(adapted, x):
    shapes = jax.eval_shape(lambda tree: tree, (adapted, x))
    y = jax.eval_shape(jp.adapt(model), *shapes)
    assert (y.shape, y.dtype) == ((8, 7), jnp.float32)


def test_fsdp_and_tensor_shardings(params, adapted, x):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), auto)
    specs = {
        "layers": {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")},
        "head": P("fsdp", None),
    }
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        jp.tree.inherit_specs(adapted, specs),
        is_leaf=lambda s: isinstance(s, P),
    )
    placed = jax.device_put(adapted, shardings)
    a = placed["layers"]["up"].trainable["a"]
    assert a.sharding.spec == P(None, "fsdp", None)
    here = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
    step = jax.jit(jax.value_and_grad(loss_of(forward)))
    got = step(*jp.partition(placed), here)
    expected = step(*jp.partition(adapted), x)
    assert distance(got, expected) < CLOSE


@pytest.mark.parametrize("check_vma", [True, False])
def test_outer_shard_map_over_the_data(check_vma, adapted, x):
    """Parameters are the same on all devices, data vary: mind the varying axes."""
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    trainable, frozen = jp.partition(adapted)

    def f(call, trainable, frozen, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P(), P("data")),
            out_specs=(P(), P("data")),
            check_vma=check_vma,
        )
        def step(trainable, frozen, x):
            share = jax.grad(lambda *a: loss_of(call)(*a) / 4)
            gradient = share(trainable, frozen, x)
            if not check_vma:  # with varying axes known, the sum is in the transpose
                gradient = lax.psum(gradient, "data")
            return gradient, call(trainable, frozen, x)

        return step(trainable, frozen, x)

    got, expected = both(f, trainable, frozen, x)
    assert distance(got, expected) < CLOSE
    whole = jax.grad(loss_of(merged))(trainable, frozen, x)
    assert distance(got[0], whole) < CLOSE


def test_static_keyword_arguments(adapted, x):
    plain = jp.merge(adapted)
    call = jp.adapt(model)
    for kwargs in ({}, {"flip": True}, {"flip": True, "scale": 2.0}):
        assert distance(call(adapted, x, **kwargs), model(plain, x, **kwargs)) < CLOSE
    by_jit = jax.jit(call, static_argnames=("flip",))
    assert distance(by_jit(adapted, x, flip=True), model(plain, x, flip=True)) < CLOSE


def test_trees_anywhere_among_the_arguments(adapted, x):
    def nested(x, *, variables, training: bool):
        assert training is True  # not an array
        return model(variables["params"][0], x)

    got = jp.adapt(nested)(x, variables={"params": [adapted]}, training=True)
    assert distance(got, model(jp.merge(adapted), x)) < CLOSE


def test_a_plain_tree_passes_through(params, x):
    assert jnp.array_equal(jp.adapt(model)(params, x), model(params, x))
    assert jnp.array_equal(jp.adapt(jp.adapt(model))(params, x), model(params, x))


def test_adapt_of_adapt(adapted, x):
    inner = jp.adapt(model)
    outer = jp.adapt(lambda params, x: 2.0 * inner(params, x))
    assert distance(outer(adapted, x), 2.0 * model(jp.merge(adapted), x)) < CLOSE


def test_two_adapters_on_different_sites(params, x, keys):
    axes = {"up": "layer in out"}
    adapted = prepare(params, pair(), ["up"], keys, axes=axes)
    adapted = prepare(adapted, everything(), ["head"], keys)
    got, got_grads, _ = run_with_gradients(jp.adapt(model), adapted, [x])
    through_merge = lambda tree, x: model(jp.merge(tree), x)
    expected, expected_grads, _ = run_with_gradients(through_merge, adapted, [x])
    assert distance(got, expected) < CLOSE
    assert distance(got_grads, expected_grads) < CLOSE


def test_full_replaces_a_leaf(params, x, keys):
    adapted = jp.attach(params, jp.full(), ["head"], key=next(keys))
    moved = jax.tree.map(lambda t: t + 0.1, jp.partition(adapted)[0])
    adapted = jp.combine(moved, jp.partition(adapted)[1])
    expected = model(params | {"head": params["head"] + 0.1}, x)
    assert distance(jp.adapt(model)(adapted, x), expected) < CLOSE


def test_gradients_of_other_arguments_and_outputs_as_trees(adapted, x):
    def fn(params, batch):
        y = model(params, batch["x"]) * batch["gain"]
        return {"logits": y, "mean": (jnp.mean(y), batch["label"])}

    batch = {"x": x, "gain": jnp.float32(1.5), "label": jnp.arange(8)}
    got = jp.adapt(fn)(adapted, batch)
    expected = fn(jp.merge(adapted), batch)
    assert distance(got, expected) < CLOSE
    assert jnp.array_equal(got["mean"][1], batch["label"])


def test_debug_prints_are_kept_once(adapted, x, capfd):
    def fn(params, x):
        y = model(params, x)
        jax.debug.print("rows {n}", n=y.shape[0])
        return y

    jax.jit(jp.adapt(fn))(adapted, x).block_until_ready()
    jax.effects_barrier()
    assert capfd.readouterr().out.count("rows 8") == 1


def test_names_of_the_model_survive(adapted, x):
    def fn(params, x):
        with jax.named_scope("encoder_scope"):
            return model(params, x)

    text = jax.jit(jp.adapt(fn)).lower(adapted, x).compile().as_text()
    assert "encoder_scope" in text
    assert "adapt_around_test.py" in text  # source lines of the model


def test_no_retrace_per_step(adapted, x):
    traces = []

    def counted(params, x):
        traces.append(1)
        return model(params, x)

    trainable, frozen = jp.partition(adapted)
    call = jp.adapt(counted)
    for i in range(4):  # eager
        call(jp.combine(trainable, frozen), x + i)
    assert len(traces) == 1

    @jax.jit
    def step(trainable, frozen, x):
        loss = lambda t: jnp.mean(call(jp.combine(t, frozen), x))
        return jax.tree.map(
            lambda t, g: t - 0.1 * g, trainable, jax.grad(loss)(trainable)
        )

    before = len(traces)
    for i in range(4):
        trainable = step(trainable, frozen, x + i)
    assert len(traces) <= before + 1
    before = len(traces)
    step(trainable, frozen, jnp.concatenate([x, x]))
    assert len(traces) == before + 1  # another shape: the count does count


def test_a_node_outside_of_adapt_says_what_to_write(adapted, x):
    with pytest.raises(TypeError, match="layers/up.*jaxpeft.adapt"):
        model(adapted, x)
