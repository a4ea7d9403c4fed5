"""Mixtures in stacks of unequal layers, their counts, dropout on leaves, learning."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import distance, numbers, perturb
from mixtures_toolbox import TWO, adapted_use, one, stirred

import jaxpeft as jp
from jaxpeft import numerics
from jaxpeft.tree import nodes, rebuild

# --- stacks whose layers have other numbers of experts ---

L = 2
AXES = {"w": "layer in out"}


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def unrolled(p, x):
    for i in range(L):
        x = jnp.tanh(x @ p[f"layer_{i}"]["w"])
    return x


def test_unequal_layers_stacked_and_apart():
    adapter = jp.mosld(rank=2, experts=(3, 1))
    stack = numbers(L, 6, 6, seed=1)
    run = lambda p, k: jp.attach(p, adapter, ["w"], key=k, axes=AXES)
    adapted = perturb(jax.jit(run)({"w": stack}, jax.random.key(0)))
    node = adapted["w"]
    real = {"b": node.frozen["active"][:, :, None, None]}
    real["router"] = node.frozen["active"][:, None, :]
    half = L // 2
    layers = [[True] * 3] * half + [[True, False, False]] * half
    assert node.frozen["active"].tolist() == layers
    kept = {n: jnp.where(m, node.trainable[n], 0.0) for n, m in real.items()}
    node = node.replace(trainable=node.trainable | kept)
    apart = {f"layer_{i}": {"w": stack[i]} for i in range(L)}
    with jax.disable_jit():
        apart = jp.attach(apart, adapter, ["w"], key=jax.random.key(0))
    counts = [L * 12 + half * 3 * 12 + half * 12 + half * 18 + half * 6, L * 36]
    assert jp.count({"w": node}) == jp.count(apart) == (counts[0], sum(counts))
    for i in range(L):
        own = apart[f"layer_{i}"]["w"]
        n = own.frozen["active"].size
        assert dict(own.adapter.options)["experts"] == n == (3 if i < half else 1)
        t = node.trainable
        t = {"a": t["a"][i], "b": t["b"][i, :n], "router": t["router"][i, :, :n]}
        apart[f"layer_{i}"]["w"] = own.replace(trainable=t)
    x = numbers(2, 3, 6, seed=2)
    trainable, frozen = jp.partition({"w": node})

    def loss(t):
        out, stats = jp.adapt(scanned, taps="own")(jp.combine(t, frozen), x)
        return jnp.sum(out**2), (out, stats["w"])

    (_, (out, stats)), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    expected, each = jp.adapt(unrolled, taps="own")(apart, x)
    assert distance(out, expected) < 1e-5
    balance, z = numerics.balance_and_z(stats)
    own = [numerics.balance_and_z(each[f"layer_{i}/w"]) for i in range(L)]
    np.testing.assert_allclose(balance, [b for b, _ in own], rtol=1e-5)
    np.testing.assert_allclose(z, [z for _, z in own], rtol=1e-4)
    np.testing.assert_allclose(balance[half:], 1, rtol=1e-6)
    # The padding: no gradient, and AdamW with decay leaves it at zero.
    g = g["w"].trainable
    for n, mask in real.items():
        mask = jnp.broadcast_to(mask, g[n].shape)
        assert np.all(g[n][~mask] == 0) and np.any(g[n][mask] != 0)
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
        updates, _ = optimizer.update(g, optimizer.init(g), node.trainable)
    moved = node.trainable["b"] + updates["b"]
    assert np.all(jnp.where(real["b"], 0.0, moved) == 0)


@pytest.mark.parametrize("layers", [1, 2, 6, 18, 26, 30])
def test_mosld_sits_on_any_number_of_layers(layers):
    """Apart and stacked; the paper's spread is rounded, and says how."""
    key = jax.random.key(0)
    apart = {f"layer_{i}": {"q": {"kernel": jnp.zeros((8, 8))}} for i in range(layers)}
    stack = {"q": jnp.zeros((layers, 8, 8))}
    axes = {"q": "layer in out"}
    attach = lambda params, adapter, axes=None: jax.eval_shape(
        lambda p: jp.attach(p, adapter, ["q"], key=key, axes=axes), params
    )
    assert len(nodes(attach(apart, jp.mosld(rank=2)))) == layers
    attach(stack, jp.mosld(rank=2), axes)
    spread = jp.mosld(rank=2, experts=(8, 6, 4, 2))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        each = nodes(attach(apart, spread))
        attach(stack, spread, axes)
    number = lambda node: int(node.site.path.split("/")[0][6:])
    own = [n.adapter.options["experts"] for n in sorted(each, key=number)]
    assert own == [(8, 6, 4, 2)[4 * i // layers] for i in range(layers)]
    said = {str(w.message) for w in heard if "do not divide" in str(w.message)}
    sizes = [own.count(n) for n in (8, 6, 4, 2)]
    assert bool(said) == bool(layers % 4)
    assert all(f"{layers} layers" in text and str(sizes) in text for text in said)


def test_layers_that_cannot_be_shared_out():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'q/w'.*no number of a layer"):
        jp.attach({"q": {"w": jnp.zeros((4, 4))}}, jp.mola(rank=2), ["w"], key=key)


def test_published_counts():
    """LLaMA-2-7B's q and v, rank 8; and all seven linears of MoDULA."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    square = shape(32, 4096, 4096)
    qv = {"q": square, "v": square}
    apart = {
        f"layers_{i}": {n: shape(4096, 4096) for n in ("q", "v")} for i in range(32)
    }
    axes = {n: "layer in out" for n in ("q", "v", "k", "o", "gate", "up", "down")}

    def count(params, adapter, names=("q", "v")):
        run = lambda p, k: jp.attach(p, adapter, list(names), key=k, axes=own)
        own = None if "layers_0" in params else {n: axes[n] for n in names}
        return jp.count(jax.eval_shape(run, params, jax.random.key(0)))[0]

    assert count(qv, jp.lora(8)) == 4_194_304
    assert count(qv, jp.mosld()) == 13_893_632
    assert count(qv, jp.mosld(experts=(2, 4, 6, 8))) == 13_893_632
    assert count(apart, jp.mosld()) == 13_893_632
    wide, narrow = shape(32, 4096, 11008), shape(32, 11008, 4096)
    seven = qv | {"k": square, "o": square, "gate": wide, "up": wide, "down": narrow}
    flan = jp.modula_flan(("law",), stage="universal")
    assert count(seven, flan, seven) == 39_976_960
    assert count(seven, rebuild(flan, stage="domain:law"), seven) == 19_988_480
    sizes = [(x.shape[1], x.shape[2]) for x in seven.values()]
    res = jp.modula_res(TWO, stage="domain:law")
    assert count(seven, res, seven) == 32 * sum(2 * 8 * d_out for _, d_out in sizes)
    router = count(seven, rebuild(res, stage="router"), seven)
    assert router == 32 * sum(2 * d_in for d_in, _ in sizes)


# --- dropout on the weight ---


def dropped_a(adapter, seed, layers=None, path="w"):
    """The ``a`` that a step uses, read off the factors."""
    kernel = jnp.zeros((40, 8)) if layers is None else jnp.zeros((layers, 40, 8))
    axes = None if layers is None else {path: "layer in out"}
    with jax.disable_jit():
        adapted = jp.attach(
            {path: kernel}, adapter, [path], key=jax.random.key(0), axes=axes
        )
    node = jp.with_dropout(adapted, jax.random.key(seed))[path]
    return adapted[path].trainable["a"], jp.tree._lift.lifted_factors(node).terms[0].a


def test_weight_dropout_is_one_mask_a_step_site_and_layer():
    adapter = jp.mosld(rank=8, experts=2, dropout=0.25)
    a, used = dropped_a(adapter, 1)
    kept = np.asarray(used != 0)
    np.testing.assert_allclose(used[kept], a[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)
    assert np.array_equal(dropped_a(adapter, 1)[1], used)
    assert not np.array_equal(dropped_a(adapter, 2)[1] != 0, kept)
    assert not np.array_equal(dropped_a(adapter, 1, path="v")[1] != 0, kept)
    _, stack = dropped_a(adapter, 1, layers=2)
    assert not np.array_equal(stack[0] != 0, stack[1] != 0)
    off = rebuild(adapter, dropout=0.0)
    assert np.array_equal(*dropped_a(off, 1))
    keep = jax.vmap(lambda k: jp.parts._mixture.drop_entries(k, a, 0.25))
    mean = jnp.mean(keep(jax.random.split(jax.random.key(3), 4000)), 0)
    assert np.max(np.abs(mean - a)) < 5 * float(jnp.max(jnp.abs(a))) * 0.0092


def test_weight_dropout_in_use():
    x = numbers(6, 5, seed=4)
    adapted = stirred(jp.mosld(rank=2, experts=3, dropout=0.5))
    on = jp.with_dropout(adapted, jax.random.key(1))
    trainable, frozen = jp.partition(on)
    f = lambda t: jnp.sum(adapted_use(jp.combine(t, frozen), x) ** 2)
    mask = np.asarray(jp.tree._lift.lifted_factors(on["w"]).terms[0].a != 0)
    assert 0 < mask.sum() < mask.size
    g = jax.jit(jax.grad(f))(trainable)["w"].trainable["a"]
    assert np.all(g[~mask] == 0) and np.all(g[mask] != 0)
    # Every token, whatever else is in the batch, meets the same weights.
    out = adapted_use(on, x)
    assert distance(adapted_use(on, x[2:4]), out[2:4]) < 1e-6
    alone = on["w"].replace(
        call=None,
        trainable=on["w"].trainable
        | {"a": jnp.where(mask, 2 * on["w"].trainable["a"], 0.0)},
    )
    assert distance(adapted_use({"w": alone}, x), out) < 1e-6
    # Micro-batches of one step: other keys for inputs, one for the leaves.
    again = jp.with_dropout(adapted, jax.random.key(8), leaves_key=jax.random.key(1))
    assert np.array_equal(
        jp.tree._lift.lifted_factors(again["w"]).terms[0].a != 0, mask
    )
    for where in ("b", "input"):
        other = rebuild(on["w"].adapter, dropout_on=where)
        off = {"w": on["w"].replace(adapter=other, call=None)}
        got = adapted_use(jp.with_dropout(off, jax.random.key(1)), x)
        assert distance(got, out) > 1e-2
        off = adapted_use(off, x)
        assert distance(off, adapted_use(adapted, x)) == 0


# --- learning ---


def train(adapter, steps, router=None):
    """A few steps on one site; the ``b`` of each expert afterwards."""
    adapted = one(adapter, numbers(6, 4, seed=3), **({} if router is None else router))
    trainable, frozen = jp.partition(adapted)
    x, y = numbers(16, 6, seed=4), numbers(16, 4, seed=5)
    f = lambda t: jnp.mean((adapted_use(jp.combine(t, frozen), x) - y) ** 2)
    step = jax.jit(lambda t: jax.tree.map(lambda v, g: v - 0.3 * g, t, jax.grad(f)(t)))
    first = jax.jit(jax.grad(f))(trainable)["w"].trainable
    for _ in range(steps):
        trainable = step(trainable)
    return first, trainable["w"].trainable


def test_at_first_only_b_moves_and_experts_become_different():
    first, after = train(jp.mosld(2, 4, experts=3), 8)
    assert np.all(first["a"] == 0) and np.all(first["router"] == 0)
    assert np.any(first["b"] != 0)
    b = after["b"]
    gaps = [float(jnp.max(jnp.abs(b[i] - b[j]))) for i in range(3) for j in range(i)]
    assert min(gaps) > 1e-4
    # What is refused below: a router of zeros over a shared a never leaves it.
    zero = {"router": jnp.zeros((6, 3))}
    _, stuck = train(jp.hydralora(2, 4, experts=3, dropout=0.0), 8, zero)
    assert np.array_equal(stuck["b"][0], stuck["b"][1])
    assert np.max(np.abs(stuck["router"])) < 1e-6
