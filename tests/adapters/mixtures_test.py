"""Mixtures against a loop over tokens and experts, and the properties of their form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import distance, numbers, perturb
from adapters_toolbox import as_a_user as as_a_user
from adapters_toolbox import quick_compiles as quick_compiles
from mixtures_toolbox import alike, domains, leaves_of, one, use

import jaxpeft as jp
from jaxpeft import numerics
from jaxpeft.core import with_inputs

ALIKE = {
    "soft": jp.molora(rank=2, experts=3),
    "two kept": jp.mola(rank=2, experts=3),
    "shared": jp.hydralora(rank=2, experts=3),
    "shared, two kept": jp.mosld(rank=2, experts=4),
}
TWO = ("law", "code")
NAMED = {
    "beside": jp.modula_flan(TWO, rank=2, rank_universal=3, alpha=4),
    "beside, not routed": jp.modula_flan(TWO, rank=2, route_universal=False),
    "behind": jp.modula_res(TWO, rank=2, rank_universal=3, alpha=4),
    "behind, scale 1": jp.modula_res(TWO, rank=2, rank_universal=3, slope=0.2),
}
adapted_use = jp.adapt(use)


def stirred(adapter, d_in=5, d_out=7, dtype=jnp.float32):
    kernel = numbers(d_in, d_out, seed=3).astype(dtype)
    return perturb(one(adapter, kernel), scale=0.7)


def options(node, *names):
    return (dict(node.adapter.options)[n] for n in names)


@pytest.mark.parametrize("name", ALIKE)
def test_a_loop_over_tokens_and_experts(name):
    with jax.enable_x64(True):
        adapted, x = stirred(ALIKE[name], dtype=jnp.float64), numbers(6, 5, seed=4)
        node, x = adapted["w"], x.astype(jnp.float64)
        (k,) = options(node, "top_k")
        expected = alike(x, node.base, leaves_of(node), k)
        assert distance(adapted_use(adapted, x), jnp.asarray(expected)) < 1e-10
        soft = alike(x, node.base, leaves_of(node))
        assert (np.max(np.abs(soft - expected)) > 1e-2) == (k is not None)


@pytest.mark.parametrize("name", NAMED)
def test_a_loop_over_domains(name):
    with jax.enable_x64(True):
        adapted, x = stirred(NAMED[name], dtype=jnp.float64), numbers(6, 5, seed=4)
        node, x = adapted["w"], x.astype(jnp.float64)
        residual = name.startswith("behind")
        leaves = leaves_of(node)
        slope = dict(node.adapter.options).get("slope", 0.0)
        gates = None
        if name == "beside, not routed":
            leaves["router.universal"] = np.zeros((5, 1))
            rows = [leaves[f"router.{n}"] for n in TWO]
            l = np.asarray(x) @ np.concatenate(rows, 1)
            g = np.exp(l) / np.exp(l).sum(1, keepdims=True)
            one_by_one = [
                domains(t[None], node.base, leaves, TWO, False, (0.0, *w))
                for t, w in zip(np.asarray(x), g, strict=True)
            ]
            expected = np.concatenate(one_by_one)
        else:
            expected = domains(x, node.base, leaves, TWO, residual, gates, slope)
        assert distance(adapted_use(adapted, x), jnp.asarray(expected)) < 1e-10


def column(*v):
    return jnp.array(v, jnp.float32)[:, None]


def test_mosld_by_hand():
    x, ln = jnp.ones((1, 2)), np.log
    leaves = {
        "a": column(1, 1),
        "b": jnp.array([[[1.0, 0]], [[0, 1.0]], [[5.0, 5.0]]]),
        "router": jnp.array([[ln(4), ln(3), 0], [0, 0, 0]]),
    }
    adapter = jp.mosld(rank=1, alpha=2, experts=3)
    adapted = one(adapter, jnp.zeros((2, 2)), **leaves)
    got = adapted_use(adapted, x)
    np.testing.assert_allclose(got, [[16 / 7, 12 / 7]], rtol=1e-6)
    # The mask [[1], [0]] at p = 0.5: a is [[2], [0]].
    halved = one(adapter, jnp.zeros((2, 2)), **leaves | {"a": column(2, 0)})
    np.testing.assert_allclose(adapted_use(halved, x), got, rtol=1e-6)
    other = jnp.array([[1.0, 3.0]])
    np.testing.assert_allclose(adapted_use(halved, other), got, rtol=1e-6)
    np.testing.assert_allclose(adapted_use(adapted, other), 2 * got, rtol=1e-6)


def res_by_hand(**options):
    leaves = {
        "a.universal": column(1, 1),
        "b.universal": jnp.array([[1.0, -1, 2]]),
        "a.law": column(1, 0, 0),
        "b.law": jnp.array([[1.0, 0, 0]]),
        "a.code": column(0, 1, 0),
        "b.code": jnp.array([[0, 0, 100.0]]),
        "router.law": column(np.log(3), 0),
        "router.code": column(0, 0),
    }
    adapter = jp.modula_res(TWO, rank=1, rank_universal=1, **options)
    return one(adapter, jnp.eye(2, 3), **leaves)


def test_modula_res_by_hand():
    x = jnp.array([[1.0, 2.0]])
    got = adapted_use(res_by_hand(), x)
    np.testing.assert_allclose(got, [[6.25, -1, 5.25]], rtol=1e-6)
    alone = adapted_use(res_by_hand(stage="domain:code"), x)
    np.testing.assert_allclose(alone, [[4, -1, 3]], rtol=1e-6)
    universal = res_by_hand(stage="universal")
    np.testing.assert_allclose(adapted_use(universal, x), [[4, -1, 6]], rtol=1e-6)
    np.testing.assert_allclose(x @ jp.merge(universal)["w"], [[4, -1, 6]], rtol=1e-6)


def flan_by_hand(**options):
    leaves = {
        "a.universal": column(1, 0),
        "b.universal": jnp.array([[1.0, 0]]),
        "a.law": column(0, 1),
        "b.law": jnp.array([[0, 2.0]]),
        "router.universal": column(0, 0),
        "router.law": column(0, np.log(3) / 4),
    }
    adapter = jp.modula_flan(("law",), rank=1, rank_universal=1, **options)
    return one(adapter, jnp.zeros((2, 2)), **leaves)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [("all", [0.75, 6]), ("universal", [3, 0]), ("domain:law", [0, 8])],
)
def test_modula_flan_by_hand(stage, expected):
    adapted, x = flan_by_hand(stage=stage), jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(adapted_use(adapted, x)[0], expected, rtol=1e-5)
    assert jp.mergeable(adapted) == (stage != "all")
    if stage != "all":
        np.testing.assert_allclose((x @ jp.merge(adapted)["w"])[0], expected)


def test_one_expert_and_equal_experts_are_lora():
    x = numbers(6, 5, seed=4)
    lora = stirred(jp.lora(rank=2, alpha=16))
    leaves, expected = lora["w"].trainable, adapted_use(lora, x)
    for adapter in (jp.mosld(2, experts=1, top_k=1), jp.molora(2, experts=1)):
        shape = (1, 5, 2) if adapter.name == "molora" else (5, 2)
        own = {"a": leaves["a"].reshape(shape), "b": leaves["b"][None]}
        adapted = one(adapter, lora["w"].base, **own)
        assert distance(adapted_use(adapted, x), expected) < 1e-6
        assert distance(jp.merge(adapted), jp.merge(lora)) < 1e-6
    for adapter in (jp.mosld(2, experts=3, top_k=2), jp.hydralora(2, 16, experts=3)):
        tied = {"a": leaves["a"], "b": jnp.stack([leaves["b"]] * 3)}
        adapted = perturb(one(adapter, lora["w"].base), scale=2.0)["w"]
        adapted = {"w": adapted.replace(trainable=adapted.trainable | tied)}
        assert distance(adapted_use(adapted, x), expected) < 1e-5


def test_the_order_of_experts_does_not_matter():
    adapted, x = stirred(ALIKE["two kept"]), numbers(6, 5, seed=4)
    node, order = adapted["w"], jnp.array([2, 0, 1])
    t = node.trainable
    turned = {"a": t["a"][order], "b": t["b"][order], "router": t["router"][:, order]}
    other = {"w": node.replace(trainable=turned)}
    assert distance(adapted_use(other, x), adapted_use(adapted, x)) < 1e-6
    wrong = {"w": node.replace(trainable=t | {"router": turned["router"]})}
    assert distance(adapted_use(wrong, x), adapted_use(adapted, x)) > 1e-2  # control


def test_fixed_gates_fold_and_a_router_does_not():
    x = numbers(6, 5, seed=4)
    for adapter in (ALIKE["two kept"], ALIKE["shared"]):
        adapted = stirred(adapter)
        with pytest.raises(ValueError, match="'w'.*depends on the input"):
            jp.merge(adapted)
        fixed = adapter.rebuild(gates=(0.25, 0.0, 2.0))
        node = adapted["w"].replace(adapter=fixed)
        assert jp.mergeable({"w": node})
        leaves = leaves_of(node)
        a = jnp.broadcast_to(leaves["a"], (3, 5, 2))
        change = sum(g * a[k] @ leaves["b"][k] for k, g in ((0, 0.25), (2, 2.0)))
        expected = x @ (node.base + leaves["scale"] * change)
        assert distance(adapted_use({"w": node}, x), expected) < 1e-5
        assert distance(x @ jp.merge({"w": node})["w"], expected) < 1e-5
        as_lora = jp.weighted([{"w": node}], [1.0], into=jp.lora())
        assert distance(adapted_use(as_lora, x), expected) < 1e-5


def test_gates_by_row():
    """Rows of one call use other experts; a row of zeros is the base, bit for bit."""
    x = numbers(3, 4, 5, seed=4)
    for name in ("beside", "behind"):
        adapted = stirred(NAMED[name])
        node, rows = adapted["w"], jnp.array([[1.0, 0, 1], [0, 0, 0], [1, 0.5, 0.25]])
        got = adapted_use(with_inputs(adapted, gates=rows), x)
        assert np.array_equal(got[1], jax.jit(use)({"w": node.base}, x)[1])
        for i in (0, 2):
            fixed = node.adapter.rebuild(gates=tuple(map(float, rows[i])))
            one_row = adapted_use({"w": node.replace(adapter=fixed)}, x[i])
            assert distance(got[i], one_row) < 1e-5
    with pytest.raises(ValueError, match="inputs are mask and gates, got gate"):
        with_inputs(adapted, gate=rows)
    wrong = with_inputs(adapted, gates=rows[:2])
    with pytest.raises(ValueError, match="`gates` are for a batch of 2 rows.*3, 4"):
        adapted_use(wrong, x)


def test_in_axes_that_change_places_are_refused():
    """A router reads them in the kernel's order; so do taps."""
    x, w = numbers(4, 3, 2, seed=5), numbers(3, 2, 5, seed=6)
    flipped = lambda p, x: jnp.tensordot(x.swapaxes(1, 2), p["w"].swapaxes(0, 1), 2)
    attach = lambda method: jp.attach(
        {"w": w}, method, ["w"], key=jax.random.key(0), axes={"w": "in in out"}
    )
    plain = attach(jp.lora(rank=1))
    assert distance(jp.adapt(flipped)(plain, x), jnp.tensordot(x, w, 2)) < 1e-5
    routed = attach(jp.molora(rank=1, experts=2))
    with pytest.raises(jp.core.UnsupportedError, match="'w'.*transpose.*change places"):
        jp.adapt(flipped)(routed, x)
    with pytest.raises(jp.core.UnsupportedError, match="a tap, reads the input"):
        jp.adapt(flipped, taps=lambda x, *leaves: x.sum(0))(plain, x)


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


def test_layers_that_cannot_be_shared_out():
    stack, key = {"w": jnp.zeros((5, 4, 4))}, jax.random.key(0)
    with pytest.raises(ValueError, match="'w'.*2 numbers, which do not divide 5"):
        jp.attach(stack, jp.mola(experts=(2, 3)), ["w"], key=key, axes=AXES)
    with pytest.raises(ValueError, match="'q/w'.*no number of a layer"):
        jp.attach({"q": {"w": jnp.zeros((4, 4))}}, jp.mola(), ["w"], key=key)


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
    assert count(seven, flan.rebuild(stage="domain:law"), seven) == 19_988_480
    sizes = [(x.shape[1], x.shape[2]) for x in seven.values()]
    res = jp.modula_res(TWO, stage="domain:law")
    assert count(seven, res, seven) == 32 * sum(2 * 8 * d_out for _, d_out in sizes)
    router = count(seven, res.rebuild(stage="router"), seven)
    assert router == 32 * sum(2 * d_in for d_in, _ in sizes)


# --- dropout on the weight ---


def dropped_a(adapter, seed, layers=None, path="w"):
    """The ``a`` that a step uses, read off the factors."""
    kernel = jnp.zeros((40, 6)) if layers is None else jnp.zeros((layers, 40, 6))
    axes = None if layers is None else {path: "layer in out"}
    with jax.disable_jit():
        adapted = jp.attach(
            {path: kernel}, adapter, [path], key=jax.random.key(0), axes=axes
        )
    node = jp.with_dropout(adapted, jax.random.key(seed))[path]
    return adapted[path].trainable["a"], jp.core._lift.lifted_factors(node).a


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
    off = adapter.rebuild(dropout=0.0)
    assert np.array_equal(*dropped_a(off, 1))
    keep = jax.vmap(lambda k: jp.core._mixture.drop_entries(k, a, 0.25))
    mean = jnp.mean(keep(jax.random.split(jax.random.key(3), 4000)), 0)
    assert np.max(np.abs(mean - a)) < 5 * float(jnp.max(jnp.abs(a))) * 0.0092


def test_weight_dropout_in_use():
    x = numbers(6, 5, seed=4)
    adapted = stirred(jp.mosld(rank=2, experts=3, dropout=0.5))
    on = jp.with_dropout(adapted, jax.random.key(1))
    trainable, frozen = jp.partition(on)
    f = lambda t: jnp.sum(adapted_use(jp.combine(t, frozen), x) ** 2)
    mask = np.asarray(jp.core._lift.lifted_factors(on["w"]).a != 0)
    assert 0 < mask.sum() < mask.size
    g = jax.jit(jax.grad(f))(trainable)["w"].trainable["a"]
    assert np.all(g[~mask] == 0) and np.all(g[mask] != 0)
    # Every token, whatever else is in the batch, meets the same weights.
    out = adapted_use(on, x)
    assert distance(adapted_use(on, x[2:4]), out[2:4]) < 1e-6
    alone = on["w"].replace(
        key=None,
        trainable=on["w"].trainable
        | {"a": jnp.where(mask, 2 * on["w"].trainable["a"], 0.0)},
    )
    assert distance(adapted_use({"w": alone}, x), out) < 1e-6
    # Micro-batches of one step: other keys for inputs, one for the leaves.
    again = jp.with_dropout(adapted, jax.random.key(8), leaves_key=jax.random.key(1))
    assert np.array_equal(jp.core._lift.lifted_factors(again["w"]).a != 0, mask)
    for where in ("b", "input"):
        other = on["w"].adapter.rebuild(dropout_on=where)
        got = adapted_use({"w": on["w"].replace(adapter=other)}, x)
        assert distance(got, out) > 1e-2
        off = adapted_use({"w": on["w"].replace(adapter=other, key=None)}, x)
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


# --- bad input ---


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.mosld(router_std=0), "`router_std` of mosld is 0.*one plain LoRA"),
        (lambda: jp.hydralora(router_std=0.0), "`router_std` of hydralora is 0"),
        (lambda: jp.mola(experts=2, top_k=3), "`top_k` is 3, .* at most 2 experts"),
        (lambda: jp.mola(top_k=0), "`top_k` must be a whole number from 1 up"),
        (lambda: jp.molora(experts=0), "`experts` must be whole numbers from 1 up"),
        (lambda: jp.molora(experts=()), "`experts` is empty"),
        (lambda: jp.molora(experts=3, gates=(1, 0)), "one number for each of 3"),
        (lambda: jp.molora(temperature=0), "`temperature` of molora must be positive"),
        (lambda: jp.mosld(balance_coef=-1), "`balance_coef` must be at least 0"),
        (lambda: jp.mosld(aux_reduce="max"), "`aux_reduce` must be one of sum, mean"),
        (lambda: jp.mosld(dropout_on="x"), "`dropout_on` must be one of a, b, input"),
        (lambda: jp.modula_res(("law", "law")), r"names \['law'\] twice"),
        (lambda: jp.modula_res(("universal",)), "cannot be named 'universal'"),
        (lambda: jp.modula_flan(("a/b",)), "letters, digits, .* got 'a/b'"),
        (lambda: jp.modula_flan(TWO, stage="domain:la"), "universal, router, domain:l"),
        (lambda: jp.modula_flan(TWO, inactive=("x",)), r"`inactive` names \['x'\]"),
        (lambda: jp.modula_flan(TWO, gates=(1, 0)), "`gates` must hold 3 numbers"),
        (lambda: jp.modula_res(TWO, folded=True), "stage 'all' trains it"),
        (lambda: jp.modula_res(slope=1.5), r"`slope` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_lone_kept_expert_without_a_balance_loss_is_warned_of():
    with pytest.warns(UserWarning, match=r"mola\(top_k=1.*never learns"):
        jp.mola(experts=4, top_k=1)
    with pytest.warns(UserWarning, match=r"modula_flan\(top_k=1.*never learns"):
        jp.modula_flan(TWO, top_k=1)
    jp.modula_flan(("law",), route_universal=False, top_k=1)
    jp.modula_res(TWO, top_k=1, z_coef=0.01)
    jp.mola(experts=4, top_k=1, balance_coef=0.01)
    jp.mola(experts=4, top_k=1, renormalise=False)
