"""KaSA on whole trees: what the forward, the merge and a training step do with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import change
from adapters_toolbox import cost

import jaxpeft as jp
from jaxpeft.tree import Call

OPTIONS = [
    {},
    {"core": "full"},
    {"sigma": "ones"},
    {"truncation": "official"},
    {"truncation": "none"},
    {"truncation": "none", "core": "full"},
    {"scaling": "alpha/sqrt_r"},
    {"base": "folded"},
    {"base": "folded", "core": "full"},
]
ids = lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


@pytest.fixture
def params(keys):
    # Wide, then square: the official rule drops something from both.
    return {
        "up": {"kernel": jax.random.normal(next(keys), (6, 9))},
        "down": {"kernel": jax.random.normal(next(keys), (9, 9))},
    }


def attach(params, adapter, **options):
    return jp.attach(params, adapter, ["up", "down"], key=jax.random.key(7), **options)


def perturb(adapted, keys, std=0.5):
    trainable, frozen = jp.partition(adapted)
    moved = jax.tree.map(
        lambda x: std * jax.random.normal(next(keys), x.shape, x.dtype), trainable
    )
    return jp.combine(moved, frozen)


def dropped(node):
    f = node.frozen
    return f["u_d"] @ (f["s_d"][:, None] * f["v_d"])


def far(one, other):
    return np.max(np.abs(np.asarray(one) - np.asarray(other))) > 1e-2


@pytest.mark.parametrize("base", ["separate", "folded"])
def test_it_starts_as_the_kept_kernels(base, params, keys):
    adapted = attach(params, jp.kasa(rank=3, base=base))
    x = jax.random.normal(next(keys), (5, 6))
    kept = {
        name: {"kernel": params[name]["kernel"] - dropped(adapted[name]["kernel"])}
        for name in params
    }
    y = jp.adapt(apply)(adapted, x)
    np.testing.assert_allclose(y, apply(kept, x), atol=1e-5)
    assert far(y, apply(params, x))
    one = jp.adapt(lambda p, x: x @ p["up"]["kernel"])(adapted, x)
    away = x @ params["up"]["kernel"] - one
    np.testing.assert_allclose(away, x @ dropped(adapted["up"]["kernel"]), atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_forward_merge_and_plain_lora_are_one_function(options, params, keys):
    adapted = perturb(attach(params, jp.kasa(rank=3, alpha=7, **options)), keys)
    x = jax.random.normal(next(keys), (5, 6))
    y = jp.adapt(apply)(adapted, x)
    np.testing.assert_allclose(apply(jp.merge(adapted), x), y, atol=2e-5)
    plain = {}
    for name, module in adapted.items():  # the exact export, rank r + m, scale 1
        f, t = module["kernel"].frozen, module["kernel"].trainable
        middle = t.get("core", jnp.diag(t.get("sigma", jnp.ones(3))))
        a, b = [t["a"]], [f["scale"] * middle @ t["b"]]
        if "u_d" in f:
            a, b = [*a, f["u_d"]], [*b, -f["s_d"][:, None] * f["v_d"]]
        a, b = jnp.concatenate(a, 1), jnp.concatenate(b, 0)
        assert a.shape[1] == (3 if options.get("truncation") == "none" else 6)
        leaves = {"a": a, "b": b}
        lora = jp.attach(
            {name: params[name]},
            jp.lora(rank=a.shape[1]),
            [name],
            key=jax.random.key(0),
        )
        plain[name] = {"kernel": lora[name]["kernel"].replace(trainable=leaves)}
    np.testing.assert_allclose(jp.adapt(apply)(plain, x), y, atol=2e-5)
    assert far(apply(params, x), y)


def train(adapted, x, steps=2):
    """``(trainable after each step, optimiser state)``."""
    trainable, frozen = jp.partition(adapted)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return jnp.sum(jp.adapt(apply)(jp.combine(trainable, frozen), x) ** 2)

        gradients = jax.grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state

    history = [trainable]
    for _ in range(steps):
        trainable, state = step(trainable, state)
        history.append(trainable)
    return history, state


def test_only_b_moves_first_and_then_everything(params, keys):
    adapted = attach(params, jp.kasa(rank=3))
    x = jax.random.normal(next(keys), (5, 6))
    history, state = train(adapted, x)
    zero, one, two = map(jp.tree.flat, history)
    for path in zero:
        moved = [not np.array_equal(zero[path], one[path])]
        moved.append(not np.array_equal(one[path], two[path]))
        assert moved == [path.endswith("/b"), True], path
    trained = sum(x.size for x in jax.tree.leaves(history[0]))
    assert sum(x.size for x in jax.tree.leaves(state)) == trained
    after = jp.combine(history[-1], jp.partition(adapted)[1])
    for tree in (adapted, after):
        for old, new in zip(
            jax.tree.leaves(params), jax.tree.leaves(jp.detach(tree)), strict=True
        ):
            assert np.array_equal(old, new)


def test_detaching_a_folded_tree_is_accurate_to_rounding(params):
    adapted = attach(params, jp.kasa(rank=3, base="folded"))
    for name in params:
        again = jp.detach(adapted)[name]["kernel"]
        np.testing.assert_allclose(again, params[name]["kernel"], atol=1e-6)
        assert far(adapted[name]["kernel"].base, params[name]["kernel"])


# --- penalty over sites


def test_sum_is_the_number_of_sites_times_mean(params, keys):
    stack = {"layers": {"kernel": jax.random.normal(next(keys), (4, 8, 6))}}
    axes = {"layers": "layer in out"}
    for tree, targets, sites in ((params, ["up", "down"], 2), (stack, ["layers"], 4)):
        values = []
        for reduction in ("mean", "sum"):
            adapter = jp.kasa(rank=3, reduction=reduction)
            adapted = (
                jp.attach(tree, adapter, targets, key=jax.random.key(1), axes=axes)
                if sites == 4
                else jp.attach(tree, adapter, targets, key=jax.random.key(1))
            )
            values.append(jp.penalty(adapted))
        np.testing.assert_allclose(values[1], sites * values[0], rtol=1e-6)


def test_a_stack_has_one_norm_per_layer(keys):
    stack = {"layers": {"kernel": jax.random.normal(next(keys), (3, 8, 6))}}
    adapter = jp.kasa(rank=2, beta=0.3, gamma=0.7, reduction="sum")
    adapted = perturb(
        jp.attach(
            stack, adapter, ["layers"], key=next(keys), axes={"layers": "layer in out"}
        ),
        keys,
    )
    node = adapted["layers"]["kernel"]
    per_layer = [
        cost(adapter)({}, {name: x[i] for name, x in node.trainable.items()})
        for i in range(3)
    ]
    np.testing.assert_allclose(jp.penalty(adapted), sum(per_layer), rtol=1e-6)


def test_the_penalty_ignores_alpha_and_dropout(params):
    values = []
    for alpha, dropout in ((1, 0.0), (64, 0.0), (1, 0.5)):
        adapted = attach(params, jp.kasa(rank=3, alpha=alpha, dropout=dropout))
        values.append(jp.penalty(jp.with_dropout(adapted, jax.random.key(3))))
    assert values[0] == values[1] == values[2]


# --- forms of input, kernel and transformation


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
def test_inputs_of_any_rank_and_every_transformation(shape, params, keys):
    adapted = perturb(attach(params, jp.kasa(rank=3)), keys)
    x = jax.random.normal(next(keys), shape)
    forward = jp.adapt(apply)
    y = apply(jp.merge(adapted), x)
    np.testing.assert_allclose(forward(adapted, x), y, atol=2e-5)
    np.testing.assert_allclose(jax.jit(forward)(adapted, x), y, atol=2e-5)
    if len(shape) > 1:
        mapped = jax.vmap(forward, (None, 0))(adapted, x)
        np.testing.assert_allclose(mapped, y, atol=2e-5)
    trainable, frozen = jp.partition(adapted)

    def loss(trainable, wrap):
        tree = jp.combine(trainable, frozen)
        return jnp.sum(wrap(forward)(tree, x) ** 2) + jp.penalty(tree)

    plain = jax.grad(loss)(trainable, lambda f: f)
    rematerialised = jax.grad(loss)(trainable, jax.checkpoint)
    for one, other in zip(
        jax.tree.leaves(plain), jax.tree.leaves(rematerialised), strict=True
    ):
        assert np.any(one != 0)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_dense_general_kernels_are_the_flat_ones(keys):
    flat = jax.random.normal(next(keys), (6, 8))
    key, x = next(keys), jax.random.normal(next(keys), (5, 6))
    adapter = jp.kasa(rank=3)

    def site(kernel, roles):
        tree = {"dense": {"kernel": kernel}}
        axes = {"dense": roles}
        made = jp.attach(tree, adapter, ["dense"], key=jax.random.clone(key), axes=axes)
        node = made["dense"]["kernel"]
        shape = node.trainable["b"].shape
        b = jnp.linspace(-1, 1, 24).reshape(shape)
        node = node.replace(trainable={**node.trainable, "b": b})
        return {"dense": {"kernel": node}}

    def run(equation, tree, x):
        f = lambda p, x: jnp.einsum(equation, x, p["dense"]["kernel"])
        return jp.adapt(f)(tree, x)

    y = run("ti,io->to", site(flat, "in out"), x)
    heads_out = site(flat.reshape(6, 2, 4), "in out out")
    heads_in = site(flat.reshape(2, 3, 8), "in in out")
    shapes = {n: z.shape for n, z in heads_out["dense"]["kernel"].frozen.items()}
    assert (shapes["u_d"], shapes["v_d"]) == ((6, 3), (3, 2, 4))
    np.testing.assert_allclose(
        run("ti,ihd->thd", heads_out, x).reshape(5, 8), y, atol=1e-5
    )
    np.testing.assert_allclose(
        run("thd,hdo->to", heads_in, x.reshape(5, 2, 3)), y, atol=1e-5
    )
    assert far(y, x @ flat)


def test_a_scanned_stack_is_the_same_unrolled(keys):
    stack = {"layers": {"kernel": jax.random.normal(next(keys), (3, 6, 6))}}
    axes = {"layers": "layer in out"}
    adapted = jp.attach(stack, jp.kasa(rank=2), ["layers"], key=next(keys), axes=axes)
    a = adapted["layers"]["kernel"].trainable["a"]
    assert not np.array_equal(a[0], a[1])  # a key per layer
    assert np.max(np.abs(a)) > 0.9 / np.sqrt(6)  # and d_in, not L * d_in
    adapted = perturb(adapted, keys)
    node = adapted["layers"]["kernel"]
    x = jax.random.normal(next(keys), (5, 6))

    def scanned(params, x):
        return jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["kernel"]
        )[0]

    y = jp.adapt(scanned)(adapted, x)
    for i in range(3):
        f, t = (
            {n: z[i] for n, z in part.items()} for part in (node.frozen, node.trainable)
        )
        one = node.adapter.factors(node.base[i], f, t, Call())
        x = jnp.tanh(x @ (node.base[i] + change(one)))
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_layers_of_unequal_rank(keys):
    stack = {"layers": {"kernel": jax.random.normal(next(keys), (3, 8, 6))}}
    adapter = jp.kasa(rank=2, reduction="sum")
    adapted = jp.attach(
        stack,
        adapter,
        ["layers"],
        key=next(keys),
        axes={"layers": "layer in out"},
        rank_pattern={"layers": [1, 4, 2]},
    )
    node = adapted["layers"]["kernel"]
    assert node.trainable["sigma"].shape == (3, 4)
    assert jp.count(adapted)[0] == (1 + 4 + 2) * (8 + 6 + 1)
    total = 0.0
    for i, rank in enumerate((1, 4, 2)):
        layer = {
            "a": node.trainable["a"][i, :, :rank],
            "b": node.trainable["b"][i, :rank],
            "sigma": node.trainable["sigma"][i, :rank],
        }
        assert np.all(node.trainable["sigma"][i, rank:] == 0)
        assert np.all(node.frozen["s_d"][i, rank:] == 0)
        total += cost(adapter)({}, layer)
    np.testing.assert_allclose(jp.penalty(adapted), total, rtol=1e-6)


def test_layers_that_drop_unequal_numbers(keys):
    stack = {"layers": {"kernel": jax.random.normal(next(keys), (3, 8, 6))}}
    with pytest.warns(UserWarning, match="drops nothing.*at rank 2") as heard:
        adapted = jp.attach(
            stack,
            jp.kasa(rank=2, truncation="official"),
            ["layers"],
            key=next(keys),
            axes={"layers": "layer in out"},
            rank_pattern={"layers": [2, 4, 3]},  # so that m = 0, 2, 1
        )
        rows = sorted(jp.describe(adapted).report, key=lambda row: row["layer"])
    assert any("layers/kernel" in str(warning.message) for warning in heard)
    assert [row["dropped"] for row in rows] == [0, 2, 1]
    values = np.linalg.svd(np.asarray(stack["layers"]["kernel"]), compute_uv=False)
    drifts = [row["dropped_norm"] for row in rows]
    expected = [0, np.linalg.norm(values[1, -2:]), values[2, -1]]
    np.testing.assert_allclose(drifts, expected, rtol=1e-4)
    merged = jp.merge(adapted)["layers"]["kernel"]
    assert np.array_equal(merged[0], stack["layers"]["kernel"][0])
    assert far(merged[1], stack["layers"]["kernel"][1])


def test_a_site_that_drops_nothing_is_named_every_time():
    tree = {"tall": {"kernel": jnp.ones((9, 4))}}
    adapter = jp.kasa(rank=2, truncation="official")
    for _ in range(2):
        with pytest.warns(UserWarning, match="tall/kernel.*'official' drops nothing"):
            adapted = jp.attach(tree, adapter, ["tall"], key=jax.random.key(0))
    (row,) = jp.describe(adapted).report
    assert row["dropped"] == row["drift"] == 0


def test_the_drift_report_is_sorted_and_prints(params):
    report = jp.describe(attach(params, jp.kasa(rank=3))).report
    drifts = [row["drift"] for row in report]
    assert len(drifts) == 2
    assert drifts == sorted(drifts, reverse=True)
    printed = str(jp.describe(attach(params, jp.kasa(rank=3))))
    assert all(name in printed for name in ("drift", "largest/top", "exact_residual"))


def test_bfloat16_kernels(params, keys):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapted = attach(half, jp.kasa(rank=3))
    for module in adapted.values():
        node = module["kernel"]
        assert node.base.dtype == jnp.bfloat16
        leaves = {**node.frozen, **node.trainable}
        assert {x.dtype for x in leaves.values()} == {jnp.dtype("float32")}
    x = jax.random.normal(next(keys), (5, 6)).astype(jnp.bfloat16)
    y = jp.adapt(apply)(adapted, x)
    assert y.dtype == jnp.bfloat16
    assert jp.penalty(adapted).dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    exact = jp.adapt(apply)(attach(wide, jp.kasa(rank=3)), x.astype(jnp.float32))
    np.testing.assert_allclose(
        y.astype(jnp.float32), exact, atol=2e-2 * np.max(np.abs(exact))
    )
    history, _ = train(adapted, x, steps=3)
    first, last = jp.tree.flat(history[0]), jp.tree.flat(history[-1])
    for path in first:
        assert np.all(np.isfinite(last[path])), path
        assert np.all(first[path] != last[path]), path  # sigma too


def test_folding_into_bfloat16_warns_and_says_how_much_is_lost(keys):
    kernel = (0.02 * jax.random.normal(next(keys), (256, 256))).astype(jnp.bfloat16)
    tree = {"dense": {"kernel": kernel}}
    with pytest.warns(
        UserWarning, match=r"dense/kernel.*rounding error is 0\.\d+"
    ) as w:
        jp.attach(tree, jp.kasa(8, base="folded"), ["dense"], key=next(keys))
    assert len(w) == 1


def test_dropout_leaves_the_dropped_part_alone(params, keys):
    adapted = attach(params, jp.kasa(rank=3, dropout=0.5))
    x = jax.random.normal(next(keys), (5, 6))
    forward = jp.adapt(apply)
    noisy = forward(jp.with_dropout(adapted, next(keys)), x)
    np.testing.assert_allclose(noisy, forward(adapted, x), atol=1e-5)  # as b = 0
    moved = perturb(adapted, keys)
    assert far(forward(jp.with_dropout(moved, next(keys)), x), forward(moved, x))


# --- cost


def test_a_training_step_holds_no_second_kernel():
    d, r, tokens = 2048, 16, 16
    kernel = jax.ShapeDtypeStruct((d, d), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapter = jp.kasa(rank=r)
    adapted = jax.eval_shape(
        lambda w, k: jp.attach({"dense": {"kernel": w}}, adapter, ["dense"], key=k),
        kernel,
        key,
    )
    trainable, frozen = jp.partition(adapted)

    def step(trainable, frozen, x):
        def loss(trainable):
            tree = jp.combine(trainable, frozen)
            y = jp.adapt(lambda p, x: x @ p["dense"]["kernel"])(tree, x)
            return jnp.sum(y**2) + jp.penalty(tree)

        return jax.tree.map(lambda p, g: p - g, trainable, jax.grad(loss)(trainable))

    x = jax.ShapeDtypeStruct((tokens, d), jnp.float32)
    jax.config.update("jax_disable_most_optimizations", False)  # see the toolbox
    compiled = jax.jit(step).lower(trainable, frozen, x).compile()
    jax.config.update("jax_disable_most_optimizations", True)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * d * d / 4


# --- parameter counts of real models, without their weights


def stack(layers, **shapes):
    return {
        name: {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)}
        for name, shape in shapes.items()
    }


LLAMA2 = functools.partial(
    stack, 32, q=(4096, 4096), k=(4096, 4096), v=(4096, 4096), o=(4096, 4096)
)(gate=(4096, 11008), up=(4096, 11008), down=(11008, 4096))
LLAMA3 = functools.partial(
    stack, 32, q=(4096, 4096), k=(4096, 1024), v=(4096, 1024), o=(4096, 4096)
)(gate=(4096, 14336), up=(4096, 14336), down=(14336, 4096))
ROBERTA = {
    f"layer_{i}": {
        name: {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}
        for name in ("query", "key", "value", "output")
    }
    for i in range(12)
}
ALL = ["q", "k", "v", "o", "gate", "up", "down"]


@pytest.mark.parametrize(
    ("params", "targets", "rank", "sites", "lora", "diagonal", "full"),
    [
        (ROBERTA, ["query", "value"], 8, 24, 294_912, 295_104, 296_448),
        (
            LLAMA2,
            ["q", "k", "v", "up", "down"],
            *(32, 160, 56_098_816, 56_103_936, 56_262_656),
        ),
        (LLAMA3, ["q", "v"], 16, 64, 6_815_744, 6_816_768, 6_832_128),
        (LLAMA3, ALL, 16, 224, 41_943_040, 41_946_624, 42_000_384),
    ],
    ids=["roberta-base", "llama2-7b", "llama3-8b", "llama3-8b-all"],
)
def test_golden_counts(params, targets, rank, sites, lora, diagonal, full):
    axes = None if params is ROBERTA else {name: "layer in out" for name in params}
    key = jax.eval_shape(lambda: jax.random.key(0))

    def trained(adapter):
        adapted = jax.eval_shape(
            lambda p, k: jp.attach(p, adapter, targets, key=k, axes=axes), params, key
        )
        counted = sum(len(row["ranks"]) for row in jp.describe(adapted).rows)
        assert counted == sites
        return jp.count(adapted)[0]

    assert trained(jp.lora(rank)) == lora
    assert trained(jp.kasa(rank)) == diagonal
    assert trained(jp.kasa(rank, core="full")) == full
