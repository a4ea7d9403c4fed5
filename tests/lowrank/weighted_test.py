"""One adapter from several, checked against the merged kernels in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers, perturb
from contract_toolbox import METHODS, at_init, make_params, moved, same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from benchmarks.hlo import made_of_shape
from jaxpeft.lowrank._products import is_plain, not_low_rank
from jaxpeft.tree import AdaptedKernel, alphas_of

KEY = jax.random.key(0)
AXES = {"up": "layer in out", "heads": "in out out"}
WEIGHTS = [0.7, -0.4]
RANDOM = ("dare_linear", "dare_ties")
FACTORS = ("linear", "ties", "magnitude_prune", *RANDOM)


@pytest.fixture(scope="module")
def params():
    return {
        "heads": {"kernel": numbers(6, 2, 3, seed=1)},
        "up": {"kernel": numbers(3, 6, 8, seed=2)},
        "norm": numbers(6, seed=3),
    }


def attach(params, adapter, seed=2, **patterns):
    targets = ["heads", "up"]
    start = lambda params, key: jp.attach(
        params, adapter, targets, key=key, axes=AXES, **patterns
    )
    adapted = jax.jit(start)(params, KEY)  # faster than op by op
    return unpad(perturb(adapted, seed=seed))


def unpad(adapted):
    """Zeros again in the padding of unequal ranks, after a perturbation."""
    node = adapted["up"]["kernel"]
    keep = np.arange(max(node.site.ranks))[None] < np.array(node.site.ranks)[:, None]
    keep = jnp.asarray(keep, jnp.float32)
    leaves = node.trainable
    leaves = {"a": leaves["a"] * keep[:, None], "b": leaves["b"] * keep[:, :, None]}
    return adapted | {"up": {"kernel": node.replace(trainable=leaves)}}


@functools.cache
def two():
    """Unequal ranks in the stack, other scales, other factors."""
    tree = {"heads": {"kernel": numbers(6, 2, 3, seed=1)}}
    tree |= {"up": {"kernel": numbers(3, 6, 8, seed=2)}, "norm": numbers(6, seed=3)}
    one = attach(tree, jp.lora(2, 3), rank_pattern={"up": [1, 3, 2]})
    return one, attach(tree, jp.rslora(3, 5), 4, rank_pattern={"up": [2, 1, 2]})


merge = jax.jit(jp.merge)


def change(adapted, base=None):
    """What an adapter adds to each leaf, in float64."""
    base = jp.detach(adapted) if base is None else base
    wide = lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64)
    return jax.tree.map(wide, merge(adapted), base)


def total(adapters, weights):
    each = [change(tree) for tree in adapters]
    return jax.tree.map(
        lambda *x: sum(w * v for w, v in zip(weights, x, strict=True)), *each
    )


def nodes(tree):
    is_node = lambda x: isinstance(x, AdaptedKernel)
    return [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]


@pytest.mark.parametrize("name", METHODS)
def test_cat_is_the_weighted_sum_for_every_method_of_low_rank(name):
    trees = [moved(name), perturb(at_init(name), seed=5, scale=0.1)]
    reasons = [why for node in nodes(trees[0]) if (why := not_low_rank(node))]
    if reasons:
        with pytest.raises(
            ValueError, match="full rank|the leaf itself|on the input"
        ) as told:
            jp.weighted(trees, WEIGHTS, into=jp.lora())
        paths = [node.site.path for node in nodes(trees[0])]
        named = [path for path in paths if path in str(told.value)]
        more = f"and {len(paths) - 1} more"
        assert len(named) == len(paths) or more in str(told.value)
        return
    join = lambda *trees: jp.weighted(trees, WEIGHTS, into=jp.lora())
    joined = jax.jit(join)(*trees)
    expected = total(trees, WEIGHTS)
    # Float32 around kernels near 1: 5e-7 seen of changes near 0.1.
    assert distance(change(joined), expected) < 1e-5
    assert distance(total(trees, [0.7, 0.4]), expected) > 0.1  # control
    same_bits(jp.detach(joined), make_params())
    if not is_plain(nodes(trees[0])[0].adapter):
        with pytest.raises(ValueError, match=r"write into=jaxpeft.lora\(\)"):
            jp.weighted(trees, WEIGHTS)


def test_sites_whose_methods_differ_in_numbers_all_stay(params):
    tree = jp.attach(params, jp.lora(2, alpha=4), ["heads"], key=KEY, axes=AXES)
    tree = jp.attach(tree, jp.lora(2, alpha=8), ["up"], key=KEY, axes=AXES)
    tree = perturb(tree)
    result = jp.weighted([tree, tree], [0.75, 0.25])
    assert len(nodes(result)) == 2
    for x, y in zip(*map(jax.tree.leaves, map(jp.merge, (result, tree))), strict=True):
        assert distance(x, y) < 1e-6


def test_ranks_add_layer_by_layer_and_padding_is_zero(params):
    joined = jax.jit(lambda *trees: jp.weighted(trees, WEIGHTS))(*two())
    node = joined["up"]["kernel"]
    assert node.site.ranks == (3, 4, 4) and node.site.pattern == "up"
    assert joined["heads"]["kernel"].site.ranks == (5,)
    assert not np.any(node.trainable["a"][0, :, 3:])
    assert not np.any(node.trainable["b"][0, 3:])
    assert np.any(node.trainable["b"][1, 3])
    assert distance(change(joined), total(two(), WEIGHTS)) < 1e-5
    assert {n.adapter for n in nodes(joined)} == {jp.lora(2, 3)}
    assert jp.count(joined)[0] == 5 * (6 + 6) + 11 * (6 + 8)
    same_bits(jp.detach(joined), params)
    into_rslora = lambda *trees: jp.weighted(trees, WEIGHTS, into=jp.rslora())
    again = jax.jit(into_rslora)(*two())  # its scale is sqrt(r)
    assert float(again["heads"]["kernel"].frozen["scale"]) > 2
    assert distance(change(again), total(two(), WEIGHTS)) < 1e-5


def test_folded_bases_are_unfolded(params):
    """What each has folded into the kernel is a part of its change."""
    params = {"heads": params["heads"]}
    trees = [
        perturb(
            jp.attach(
                params,
                jp.pissa(rank, residual="folded"),
                ["heads"],
                key=KEY,
                axes={"heads": "in out out"},
            )
        )
        for rank in (1, 2)
    ]
    assert distance(*(t["heads"]["kernel"].base for t in trees)) > 0.1
    joined = jp.weighted(trees, WEIGHTS, into=jp.lora())
    assert joined["heads"]["kernel"].site.ranks == (6,)  # twice 1 + 2
    wide = lambda tree: np.asarray(tree["heads"]["kernel"], np.float64)
    base, each = wide(params), [wide(jp.merge(tree)) for tree in trees]
    expected = sum(w * (x - base) for w, x in zip(WEIGHTS, each, strict=True))
    assert np.abs(wide(jp.merge(joined)) - base - expected).max() < 1e-5
    assert np.abs(wide(jp.detach(joined)) - base).max() < 1e-6


@pytest.mark.parametrize("rank", [None, 2])
def test_svd_is_the_best_of_its_rank(rank):
    join = lambda *trees: jp.weighted(trees, WEIGHTS, "svd", rank=rank)
    joined = jax.jit(join)(*two())
    expected, found = total(two(), WEIGHTS), change(joined)
    ranks = {"heads": [rank or 3], "up": [rank or r for r in (2, 3, 2)]}
    for name, each in ranks.items():
        assert joined[name]["kernel"].site.ranks == tuple(each)
        whole = expected[name]["kernel"].reshape(len(each), 6, -1)
        ours = found[name]["kernel"].reshape(len(each), 6, -1)
        for r, dense, mine in zip(each, whole, ours, strict=True):
            u, s, vt = np.linalg.svd(dense)
            best = (u[:, :r] * s[:r]) @ vt[:r]
            assert np.abs(mine - best).max() < 1e-5 * np.abs(dense).max()
            if r < 4:
                assert np.abs(dense - best).max() > 1e-2  # something was cut


@pytest.mark.parametrize("how", ["cat", "svd", *FACTORS])
def test_nothing_of_the_kernel_s_shape_is_made(how):
    shape = (50, 70)
    base = {"w": jnp.zeros(shape)}
    trees = [jp.attach(base, jp.lora(3), ["w"], key=jax.random.key(i)) for i in (0, 1)]
    adapters, options = [jp.extract(tree) for tree in trees], settings(how)

    def run(adapters, weights):
        trees = [jp.graft({"w": jnp.zeros(shape)}, each) for each in adapters]
        return jp.extract(jp.weighted(trees, weights, how, **options))

    run = jax.jit(run)
    text = run.lower(adapters, jnp.ones(2)).compile().as_text()
    assert not made_of_shape(text, [shape])


def settings(how):
    options = {} if how in ("cat", "svd", "linear") else {"density": 0.6}
    return options | ({"key": jax.random.key(3)} if how in RANDOM else {})


@pytest.mark.parametrize("how", ["svd", "ties"])
def test_sharded_kernels_on_an_explicit_mesh(params, how):
    """Neither a QR decomposition nor a sort has a rule for sharded axes there."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    trees = [attach(params, jp.lora(2), seed) for seed in (2, 4)]
    where = NamedSharding(mesh, P(None, "x", "y"))
    spread = {"kernel": jax.device_put(params["up"]["kernel"], where)}
    heads = jax.device_put(params["heads"]["kernel"], NamedSharding(mesh, P("x")))
    base = params | {"up": spread, "heads": {"kernel": heads}}
    many = [jp.graft(base, jp.extract(tree)) for tree in trees]
    joined = jp.weighted(many, WEIGHTS, how, **settings(how))
    leaves = joined["up"]["kernel"].trainable
    assert leaves["a"].sharding.spec == P(None, "x", None)
    expected = jp.extract(jp.weighted(trees, WEIGHTS, how, **settings(how)))
    for path, node in jp.extract(joined).items():
        for name, x in node.trainable.items():
            want = np.asarray(expected[path].trainable[name])
            np.testing.assert_allclose(np.asarray(x), want, atol=1e-5)


def test_linear_has_cross_terms_and_padding_stays_zero(params):
    """With itself at halves it is twice the adapter; the docstring says so."""
    adapted = attach(params, jp.lora(2, 3), rank_pattern={"up": [1, 3, 2]})
    twice = jp.weighted([adapted] * 2, [0.5, 0.5], "linear")
    assert twice["norm"] is adapted["norm"]  # nothing was copied
    assert distance(change(twice), total([adapted], [2.0])) < 1e-5
    node = twice["up"]["kernel"]
    assert node.site.ranks == (1, 3, 2) and not np.any(node.trainable["a"][0, :, 1:])
    alone = jp.weighted([adapted], [-0.5], "linear")
    assert distance(change(alone), total([adapted], [-0.5])) < 1e-5


def test_dare_keeps_a_share_and_the_mean(params):
    """Kept entries are over the density; sites and layers draw apart."""
    one = attach(params, jp.lora(2, 3))
    many = jax.vmap(
        lambda key: jp.weighted([one], [1.0], "dare_linear", density=0.25, key=key)[
            "up"
        ]["kernel"].trainable["a"]
    )(jax.random.split(KEY, 400))
    a = np.asarray(one["up"]["kernel"].trainable["a"])
    root = np.sqrt(np.asarray(one["up"]["kernel"].frozen["scale"]))[:, None, None]
    share = np.mean(np.asarray(many) != 0, 0)[np.broadcast_to(a != 0, a.shape)]
    assert abs(share.mean() - 0.25) < 0.02
    assert np.abs(np.mean(many, 0) - root * a).max() < 0.6 * np.abs(a).max()
    kept = np.asarray(many[:, 1:, :, 0]) != 0
    assert np.any(kept[:, 0] != kept[:, 1])


def test_strength(params):
    adapted = attach(params, jp.lora(2, 3))
    same_bits(jp.scaled(adapted, 1.0), adapted)
    same_bits(merge(jp.scaled(adapted, 0.0)), params)
    assert distance(change(jp.scaled(adapted, -0.5)), total([adapted], [-0.5])) < 1e-5
    traced = jax.jit(jp.scaled)
    for t in (0.25, 0.5):  # another strength is no other program
        same_bits(traced(adapted, t), jp.scaled(adapted, t))
    assert traced._cache_size() == 1
    off = jp.scaled(jp.extract(adapted), 0.5)
    same_bits(jp.graft(params, off), jp.scaled(adapted, 0.5))


@pytest.mark.parametrize("adapter", [jp.adalora(2, 3), jp.pissa(2, 3), jp.lora_xs(2)])
def test_strength_of_what_is_a_multiple_of_its_scale(adapter):
    kernel = jax.random.normal(jax.random.key(3), (9, 7))
    adapted = jp.attach({"w": kernel}, adapter, ["w"], key=jax.random.key(4))
    moved = {n: x + 0.1 for n, x in adapted["w"].trainable.items()}
    adapted = {"w": adapted["w"].replace(trainable=moved)}
    half = jp.scaled(adapted, 0.5)
    expected = kernel + 0.5 * (merge(adapted)["w"] - kernel)
    assert distance(merge(half)["w"], expected) < 1e-5
    same_bits(half["w"].trainable, adapted["w"].trainable)
    assert alphas_of(half["w"]) == tuple(x / 2 for x in alphas_of(adapted["w"]))


def test_strength_of_kasa_is_not_its_scale(params):
    """What it has dropped is no part of what the scale multiplies."""
    with pytest.raises(ValueError, match="'kasa'"):
        jp.scaled(attach(params, jp.kasa(2)), 0.5)


def test_strength_refuses(params):
    adapted = jp.attach(params, jp.lora(2), ["heads"], key=KEY, axes=AXES)
    mixed = jp.attach(adapted, jp.dora(2), ["up"], key=KEY, axes=AXES)
    with pytest.raises(ValueError, match=r"into=jaxpeft.lora\(\)(.|\n)*'up/kernel'"):
        jp.scaled(mixed, 0.5)
    with pytest.raises(ValueError, match="'up/kernel': 'dora' scales the kernel"):
        jp.scaled(mixed, 0.5, into=jp.lora())
    with pytest.raises(ValueError, match="`strength` must be a finite"):
        jp.scaled(adapted, float("nan"))
    with pytest.raises(ValueError, match="has no adapters"):
        jp.scaled(params, 0.5)
    with pytest.raises(ValueError, match="only whole low-rank adapters"):
        jp.scaled(jp.partition(adapted)[0], 0.5)


def test_weights_have_a_gradient():
    def loss(weights):
        tree = jp.merge(jp.weighted(two(), weights))
        return jnp.sum(jnp.sin(tree["heads"]["kernel"]))

    slope = jax.grad(loss)(jnp.array(WEIGHTS))
    for i in range(2):
        step = 1e-2 * np.eye(2, dtype=np.float32)[i]
        central = (loss(WEIGHTS + step) - loss(WEIGHTS - step)) / 2e-2
        assert abs(float(slope[i]) - float(central)) < 2e-3 * max(1, abs(central))


def test_everything_that_differs_is_listed(params):
    one, _ = two()
    moved_base = params | {"norm": params["norm"] + 1}
    moved_base["up"] = {"kernel": params["up"]["kernel"].at[0, 0, 0].add(1e-3)}
    other = jp.attach(moved_base, jp.lora(2), ["up"], key=KEY, axes=AXES)
    with pytest.raises(ValueError) as told:
        jp.weighted([one, other], WEIGHTS)
    for part in (
        "'heads/kernel' has no adapter in adapters[1]",
        "'up/kernel' has another base in adapters[1] than in adapters[0]",
        "'norm' has another base",
    ):
        assert part in str(told.value)
    with pytest.raises(ValueError, match=r"adapters\[1\] has no adapters"):
        jp.weighted([one, params], WEIGHTS)
    with pytest.raises(ValueError, match="'new' is not in both"):
        jp.weighted([one, one | {"new": jnp.ones(2)}], WEIGHTS)
    with pytest.raises(ValueError, match="`weights` must be 2 numbers.*shape"):
        jp.weighted([one, other], jnp.ones(()))


@pytest.mark.parametrize("how", FACTORS)
def test_unequal_ranks_are_refused_where_factors_are_joined(how):
    with pytest.raises(ValueError) as told:
        jp.weighted(two(), WEIGHTS, how, **settings(how))
    text = str(told.value)
    assert f"'heads/kernel' has ranks [2, 3], which {how!r} cannot join" in text
    assert "'up/kernel' has ranks [1, 2]" in text and 'how="svd"' in text


def test_what_is_not_finite_is_refused(params):
    one, other = two()
    node = one["up"]["kernel"]
    bad = node.trainable | {"a": node.trainable["a"].at[0, 0, 0].set(jnp.inf)}
    bad = one | {"up": {"kernel": node.replace(trainable=bad)}}
    with pytest.raises(ValueError, match="'up/kernel' has leaves that are not finite"):
        jp.weighted([bad, other], WEIGHTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "average"}, "`how` must be one of linear, cat, svd"),
        ({"weights": [1.0]}, "`weights` must be 2 numbers"),
        ({"weights": [1.0, float("inf")]}, "`weights` must be finite"),
        ({"rank": 2}, '`rank` is for how="svd"'),
        ({"how": "svd", "rank": 0}, "`rank` must be a whole number"),
        ({"how": "svd", "rank": 7}, "`rank` 7 is more than the 5"),
        ({"how": "ties"}, "needs `density`"),
        ({"density": 0.5}, "leave `density` out"),
        ({"how": "ties", "density": 0.0}, r"`density` must be in \(0, 1\]"),
        ({"how": "ties", "density": 1.5}, r"`density` must be in \(0, 1\]"),
        ({"how": "dare_ties", "density": 0.5}, "key=jax.random.key"),
        ({"key": KEY}, "leave `key` out"),
        ({"election": "loud"}, "`election` must be one of total, frequency"),
        ({"into": jp.dora()}, "`into` must be a plain low-rank method"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_arguments_that_do_not_fit(arguments, message):
    given = {"weights": WEIGHTS} | arguments
    with pytest.raises(ValueError, match=message):
        jp.weighted(two(), **given)
    with pytest.raises(ValueError, match="`adapters` is empty"):
        jp.weighted([], [])
