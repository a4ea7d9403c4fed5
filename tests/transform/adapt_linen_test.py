"""``adapt`` through Linen models, against the same model on the merged tree."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import (
    CLOSE,
    check,
    distance,
    fill,
    gate,
    gated,
    input_scale,
    numbers,
    output_scale,
    pair,
    prepare,
)
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp

D = 12


def functional(model, x, **kwargs):
    """The parameters of a model, and a function of them."""
    params = fill(jax.eval_shape(model.init, jax.random.key(7), x)["params"])
    return (lambda params, x: model.apply({"params": params}, x, **kwargs)), params


class Gelu(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(20, dtype=self.dtype, name="up")(x)
        return nn.Dense(D, dtype=self.dtype, name="down")(nn.gelu(x))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(
            num_heads=4, qkv_features=28, name="attention"
        )(x, x)


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(23, D, name="table")
        return table.attend(nn.tanh(table(ids)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(20, name="up")(nn.LayerNorm(name="norm")(x))
        y = nn.gelu(checkpoint_name(y, "hidden"))
        return x + nn.Dense(D, name="down")(y), None


class Stack(nn.Module):
    """Layers under ``nn.scan``, with ``nn.remat`` or without."""

    length: int = 3
    policy: str | None = None

    @nn.compact
    def __call__(self, x):
        block = Block
        if self.policy == "everything":
            block = nn.remat(Block, prevent_cse=False)
        elif self.policy is not None:
            policy = jax.checkpoint_policies.save_only_these_names(self.policy)
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.length,
        )
        return layers(name="layers")(x, None)[0]


class Nested(nn.Module):
    """A scan of a scan: kernels ``[2, 3, d_in, d_out]``."""

    @nn.compact
    def __call__(self, x):
        class Group(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Stack(name="stack")(x), None

        groups = nn.scan(
            Group, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return groups(name="groups")(x, None)[0]


@pytest.fixture
def x():
    return numbers(3, 5, D)


def up_down(prefix="", roles="in out"):
    return {f"{prefix}up/kernel": roles, f"{prefix}down/kernel": roles}


def test_dense_with_gelu(x, keys):
    fn, params = functional(Gelu(), x)
    check(fn, params, x, sites=up_down(), keys=keys)


@pytest.mark.parametrize("adapter", [pair(), output_scale(), input_scale()], ids=str)
def test_each_term_of_the_formula_alone(adapter, x, keys):
    fn, params = functional(Gelu(), x)
    check(fn, params, x, sites=up_down(), keys=keys, adapter=adapter)


def test_dense_in_bfloat16_over_float32_parameters(x, keys):
    fn, params = functional(Gelu(dtype=jnp.bfloat16), x)
    # bfloat16 keeps 8 bits: 2 ** -8 = 4e-3 a rounding, a handful of them in a row.
    adapted = check(fn, params, x, sites=up_down(), keys=keys, close=3e-2, far=0.2)
    assert jp.adapt(fn)(adapted, x).dtype == jnp.bfloat16
    loss = lambda t, f: jnp.sum(jp.adapt(fn)(jp.combine(t, f), x).astype(jnp.float32))
    gradient = jax.grad(loss)(*jp.partition(adapted))
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_attention_with_dense_general_kernels(x, keys):
    fn, params = functional(Attention(), x)
    sites = {f"attention/{n}/kernel": "in out out" for n in ("query", "key", "value")}
    sites["attention/out/kernel"] = "in in out"
    adapted = check(fn, params, x, sites=sites, keys=keys)
    query, out = (adapted["attention"][n]["kernel"].trainable for n in ("query", "out"))
    assert query["a"].shape == (D, 3) and query["b"].shape == (3, 4, 7)
    assert query["c"].shape == (D,) and query["o"].shape == (4, 7)
    assert out["a"].shape == (4, 7, 3) and out["b"].shape == (3, D)


def test_embedding_look_up_and_attend(keys):
    ids = jnp.asarray([[1, 7, 22], [0, 7, 3]])
    fn, params = functional(TiedEmbedding(), ids)
    check(fn, params, ids, sites={"table/embedding": "in out"}, keys=keys)


def test_look_up_is_not_a_one_hot_matmul(keys):
    ids = jnp.asarray([[1, 7, 22], [0, 7, 3]])
    _, params = functional(TiedEmbedding(), ids)
    look_up = lambda params, ids: params["table"]["embedding"][ids]
    adapted = prepare(params, pair(), ["table"], keys)
    text = jax.jit(jp.adapt(look_up)).lower(adapted, ids).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots  # the rows of a times b
    assert not any("23x" in line for line in dots), "a contraction over the vocabulary"


class TwoEinsums(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Einsum((2, D, 4, 7), "btd,kdhe->kbthe", use_bias=False, name="qk")(x)
        return nn.Einsum((4, 7, D), "bthe,hed->btd", name="out")(y[0] * nn.tanh(y[1]))


@pytest.mark.parametrize("roles", ["batch in out out", "out in out out"])
def test_einsum_module(roles, x, keys):
    """An axis that only the kernel has may be one of batch or one of out."""
    fn, params = functional(TwoEinsums(), x)
    sites = {"qk/kernel": roles, "out/kernel": "in in out"}
    inferred = sites | {"qk/kernel": "out in out out"}
    adapted = check(fn, params, x, sites=sites, inferred=inferred, keys=keys)
    a = adapted["qk"]["kernel"].trainable["a"]
    assert a.shape == ((2, D, 3) if roles.startswith("batch") else (D, 3))


def test_scan(x, keys):
    fn, params = functional(Stack(), x)
    check(fn, params, x, sites=up_down("layers/", "layer in out"), keys=keys)


def test_scanned_layers_equal_the_unrolled_ones(x, keys):
    fn, params = functional(Stack(), x)
    axes = up_down("layers/", "layer in out")
    adapted = prepare(params, pair(), list(axes), keys, axes=axes)
    block = jp.adapt(lambda p, x: Block().apply({"params": p}, x)[0])
    expected = x
    for i in range(3):
        layer = jax.tree.map(lambda leaf: leaf[i], adapted["layers"])  # noqa: B023
        expected = block(layer, expected)
    assert distance(jp.adapt(fn)(adapted, x), expected) < CLOSE


def test_scan_of_a_scan(x, keys):
    fn, params = functional(Nested(), x)
    sites = up_down("groups/stack/layers/", "layer layer in out")
    check(fn, params, x, sites=sites, keys=keys)


@pytest.mark.parametrize("policy", ["everything", "hidden"])
def test_scan_of_remat_with_a_policy(policy, x, keys):
    fn, params = functional(Stack(policy=policy), x)
    check(fn, params, x, sites=up_down("layers/", "layer in out"), keys=keys)


def test_a_policy_still_decides_what_is_saved(x, keys):
    """The names in the body mean the same to ``checkpoint`` as without an adapter."""
    saved = {}
    axes = up_down("layers/", "layer in out")
    for policy in ("everything", "hidden"):
        fn, params = functional(Stack(policy=policy), x)
        adapted = prepare(params, pair(), list(axes), keys, axes=axes)
        loss = lambda t, f: jnp.sum(jp.adapt(fn)(jp.combine(t, f), x))  # noqa: B023
        text = str(jax.make_jaxpr(jax.grad(loss))(*jp.partition(adapted)))
        saved[policy] = text.count("[3,3,5,20]")  # the hidden layer, stacked
    assert saved["hidden"] > saved["everything"] == 0


def test_remat_and_jit(x, keys):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.jit(nn.remat(Block))(name="first")(x, None)[0]
            return nn.remat(nn.jit(Block))(name="second")(x, None)[0]

    fn, params = functional(Model(), x)
    check(fn, params, x, sites=up_down("first/") | up_down("second/"), keys=keys)


def test_vmapped_dense(keys):
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    x = numbers(4, 5, D)
    fn, params = functional(nn.vmap(nn.Dense, in_axes=0, **split)(20), x)
    check(fn, params, x, sites={"kernel": "batch in out"}, keys=keys)


def test_vmapped_dense_on_one_input(x, keys):
    """The batch axis of the kernel is free: the input does not have it."""
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.vmap(nn.Dense, in_axes=None, axis_size=5, **split)(20)
    fn, params = functional(model, x)
    check(fn, params, x, sites={"kernel": "batch in out"}, keys=keys)


def test_boxed_parameters(x, keys):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    fn, params = functional(nn.Dense(20, kernel_init=init), x)
    assert isinstance(params["kernel"], nn.Partitioned)
    adapted = check(fn, params, x, sites={"kernel": "in out"}, keys=keys)
    assert isinstance(adapted["kernel"], nn.Partitioned)
    assert adapted["kernel"].value.site.path == "kernel"


def test_a_gate_meets_the_input_of_the_layer(x, keys):
    fn, params = functional(Gelu(), x)
    adapted = prepare(params, gated(), ["up"], keys)
    leaf = adapted["up"]["kernel"].trainable
    dense = lambda x, p: x @ p["kernel"] + p["bias"][None, None]
    gates = gate(x @ leaf["router"], x @ leaf["a"])
    expected = dense(
        nn.gelu(dense(x, params["up"]) + gates @ leaf["b"]), params["down"]
    )
    assert distance(jp.adapt(fn)(adapted, x), expected) < CLOSE


def test_a_gate_in_a_scanned_attention(x, keys):
    """One layer at a time, its own router each, N-D kernels on both sides."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + Attention()(x), None

    layers = functools.partial(
        nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    model = layers(Layer)()
    params = fill(jax.eval_shape(model.init, jax.random.key(7), x, None)["params"])
    axes = {"query": "layer in out out", "out": "layer in in out"}
    adapted = prepare(params, gated(), ["query", "out"], keys, axes=axes)
    fn = lambda p, x: model.apply({"params": p}, x, None)[0]

    expected = x
    for i in range(2):
        p = jax.tree.map(lambda leaf: leaf[i], adapted)["Attention_0"]["attention"]  # noqa: B023
        q, k, v = (
            jnp.einsum(
                "btd,dhe->bthe",
                expected,
                getattr(p[n]["kernel"], "base", p[n]["kernel"]),
            )
            + p[n]["bias"][None, None]
            for n in ("query", "key", "value")
        )
        leaf = p["query"]["kernel"].trainable
        gates = gate(expected @ leaf["router"], expected @ leaf["a"])
        q = q + jnp.einsum("btr,rhe->bthe", gates, leaf["b"])
        y = nn.dot_product_attention(q, k, v)
        leaf, flat = p["out"]["kernel"].trainable, y.reshape(*y.shape[:2], 28)
        a, router = (leaf[n].reshape(28, 3) for n in ("a", "router"))
        y = jnp.einsum("bthe,hed->btd", y, p["out"]["kernel"].base)
        y = y + gate(flat @ router, flat @ a) @ leaf["b"] + p["out"]["bias"][None, None]
        expected = expected + y
    assert distance(jp.adapt(fn)(adapted, x), expected) < CLOSE
