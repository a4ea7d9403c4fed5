"""The budget of AdaLoRA: how many components, which ones, and what is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import allocate

pytestmark = pytest.mark.usefixtures("quick_compiles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "up": {"kernel": numbers(6, 9)},
    "heads": {"kernel": numbers(9, 2, 3, seed=1)},
    "layers": {"kernel": numbers(2, 6, 6, seed=2)},
    "head": {"kernel": numbers(6, 3, seed=3)},
}
AXES = {"heads": "in out out", "layers": "layer in out"}
RANKS = {"up": 3, "layers": [4, 2]}  # 3 + 4 + (4 + 2) components, at most
SITES = ["up", "heads", "layers"]
PATHS = [f"{name}/kernel" for name in SITES]


def apply(params, x):
    y = jnp.einsum("td,dhe->the", x @ params["up"]["kernel"], params["heads"]["kernel"])
    step = lambda x, w: (x + jnp.tanh(x @ w), None)
    y = jax.lax.scan(step, y.reshape(x.shape[0], 6), params["layers"]["kernel"])[0]
    return y @ params["head"]["kernel"]


@functools.cache
def made():
    @jax.jit
    def attach(params, key, head_key):
        adapter = jp.adalora(rank=4, alpha=7)
        adapted = jp.attach(
            params, adapter, SITES, key=key, rank_pattern=RANKS, axes=AXES
        )
        return jp.attach(adapted, jp.full(), ["head"], key=head_key)

    return attach(PARAMS, *jax.random.split(jax.random.key(0)))


def moved(seed=5):
    """Every leaf at random, but for the padding of the shorter layer."""
    trainable, frozen = jp.partition(made())
    rng = np.random.default_rng(seed)
    move = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    tree = jax.tree.map(move, trainable)
    node = tree["layers"]["kernel"]
    t = node.trainable
    cut = {
        "a": t["a"].at[1, :, 2:].set(0),
        "b": t["b"].at[1, 2:].set(0),
        "e": t["e"].at[1, 2:].set(0),
    }
    tree["layers"] = {"kernel": node.replace(trainable=cut)}
    return tree, frozen


def weights(tree):
    return {n: tree[n]["kernel"].trainable["e"] for n in SITES}


# --- how many


def test_the_schedule_is_the_published_one():
    few = allocate.budgets(8, 4, total_steps=20, initial_steps=2, final_steps=4)
    assert few[:9] == [8, 8, 8, 7, 6, 5, 5, 5, 4] and set(few[9:]) == {4}
    assert len(few) == 21
    many = allocate.budgets(
        24 * 12, 24 * 8, total_steps=1000, initial_steps=100, final_steps=200
    )
    found = [many[t] for t in (0, 100, 101, 200, 300, 500, 700, 1000)]
    assert found == [288, 288, 287, 252, 226, 199, 192, 192]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end": 9}, "`end` must be from 1 to the 8 components"),
        ({"end": 0}, "`end` must be from 1 to the 8 components"),
        ({"initial_steps": 5, "final_steps": 5}, "leave at least one of the 10 steps"),
        ({"initial_steps": -1}, r"`initial_steps` \(-1\)"),
        ({"final_steps": -1}, r"`final_steps` \(-1\)"),
    ],
)
def test_schedules_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        allocate.budgets(**{"start": 8, "end": 4, "total_steps": 10} | given)


# --- which


def test_scores_are_the_sum_over_a_component():
    trainable, _ = moved()
    allocation = allocate.importance(1, total_steps=10)
    state = allocation.init(trainable)
    gradients = moved(seed=6)[0]
    state, _ = jax.jit(allocation.update)(state, trainable, gradients, 1)
    scored = allocate.scores(state)
    assert list(scored) == sorted(PATHS)  # the tree's order, which settles ties
    for name in SITES:
        t, g = (x[name]["kernel"].trainable for x in (trainable, gradients))
        batch = t["e"].ndim - 1
        expected = 0
        for leaf, axis in (("a", t["a"].ndim - 1), ("b", batch), ("e", batch)):
            now = np.abs(np.asarray(t[leaf], np.float64) * g[leaf])
            # From zero: 0.15 I, and 0.15 |I - 0.15 I|.
            each = np.moveaxis(0.15 * now * 0.15 * 0.85 * now, axis, batch)
            shape = (*each.shape[: batch + 1], -1)
            expected = expected + each.reshape(shape).mean(-1)
        got = scored[f"{name}/kernel"]
        expected = np.atleast_2d(expected)
        if name == "layers":
            assert np.all(np.asarray(got)[1, 2:] == -np.inf)
            got, expected = got[:, :2], expected[:, :2]
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_running_means_over_three_steps():
    trainable, _ = moved()
    allocation = allocate.importance(1, total_steps=10, b1=0.6, b2=0.7)
    state, update = allocation.init(trainable), jax.jit(allocation.update)
    mean = spread = 0.0
    for step in (1, 2, 3):
        gradients = moved(seed=10 + step)[0]
        old = trainable["up"]["kernel"].trainable["a"]
        state, _ = update(state, trainable, gradients, step)
        now = np.abs(np.asarray(old) * gradients["up"]["kernel"].trainable["a"])
        mean = 0.6 * mean + 0.4 * now
        spread = 0.7 * spread + 0.3 * np.abs(now - mean)
    np.testing.assert_allclose(
        state.sensitivity["up"]["kernel"].trainable["a"], mean, rtol=1e-5
    )
    np.testing.assert_allclose(
        state.uncertainty["up"]["kernel"].trainable["a"], spread, rtol=1e-5
    )
    # What is trained whole has no scores, and takes no memory.
    names = set(jp.tree.flat(state.sensitivity))
    assert names == {f"{path}/{leaf}" for path in PATHS for leaf in "abe"}
    assert set(jp.tree.flat(state.keep)) == {f"{path}/e" for path in PATHS}


@pytest.mark.parametrize("budget", [0, 1, 3, 6])
def test_exactly_the_budget_is_kept(budget):
    scored = {
        "one": jnp.array([[0.5, 0.9, 0.5]]),
        "two": jnp.array([[0.5, -jnp.inf], [0.7, 0.5]]),
    }
    kept = allocate.most_important(scored, budget)
    flat = np.concatenate([np.asarray(x).ravel() for x in kept.values()])
    order = [1, 5, 0, 2, 3, 6]  # the best first; equals in the order of the sites
    assert sorted(np.flatnonzero(flat)) == sorted(order[:budget])
    traced = jax.jit(allocate.most_important)(scored, budget)
    assert all(np.array_equal(traced[n], kept[n]) for n in kept)


# --- over a run


def run(total=12, **options):
    """``(the numbers of non-zero weights after each step, trainable, state)``."""
    options = {"initial_steps": 2, "final_steps": 3, "every": 2} | options
    allocation = allocate.importance(2, total_steps=total, **options)
    trainable, _ = moved()
    state, counts = allocation.init(trainable), []
    traces = []

    @jax.jit
    def update(state, trainable, gradients, step):
        traces.append(1)
        # The optimiser moves every weight, those of pruned components too.
        trainable = jax.tree.map(lambda p, g: p - 0.01 * g, trainable, gradients)
        return allocation.update(state, trainable, gradients, step)

    for step in range(1, total + 1):
        gradients = moved(seed=20 + step)[0]
        state, trainable = update(state, trainable, gradients, step)
        counts.append(sum(int(jnp.sum(e != 0)) for e in weights(trainable).values()))
    assert len(traces) == 1
    return counts, trainable, state


def test_pruning_follows_the_budget_and_ends_for_good():
    counts, trainable, state = run()
    want = allocate.budgets(13, 8, total_steps=12, initial_steps=2, final_steps=3)
    # 1, 2, 3: too early or not due; 4, 6, 8: pruned; 5, 7: back; from 9 on: final.
    assert counts[:3] == [13] * 3
    assert [counts[t - 1] for t in (4, 6, 8)] == [want[t] for t in (4, 6, 8)]
    assert [counts[t - 1] for t in (5, 7)] == [13, 13]
    assert counts[8:] == [8] * 4
    kept = weights(state.keep)
    for name, e in weights(trainable).items():
        assert np.array_equal(np.asarray(e) != 0, kept[name] & (np.asarray(e) != 0))
    assert sum(int(jnp.sum(x)) for x in kept.values()) == 8
    assert not np.any(np.asarray(kept["layers"])[1, 2:])  # padding is never kept


def test_scores_rest_after_the_last_pruning():
    allocation = allocate.importance(2, total_steps=4, final_steps=2)
    assert allocation.settled == 2
    trainable, _ = moved()
    state, update = allocation.init(trainable), jax.jit(allocation.update)
    seen = []
    for step in (1, 2, 3):
        state, trainable = update(state, trainable, moved(seed=step)[0], step)
        seen.append(np.asarray(state.sensitivity["up"]["kernel"].trainable["a"]))
    assert np.any(seen[0] != 0)
    assert np.array_equal(seen[0], seen[1]) and np.array_equal(seen[1], seen[2])


def test_the_last_step_prunes_where_nothing_follows():
    counts, _, _ = run(total=5, initial_steps=0, final_steps=0, every=100)
    assert counts == [13, 13, 13, 13, 8]


def test_a_target_equal_to_the_start_keeps_everything():
    tree = {"up": PARAMS["up"]}
    adapted = jp.attach(tree, jp.adalora(rank=3), ["up"], key=jax.random.key(0))
    trainable, _ = jp.partition(adapted)
    trainable = jax.tree.map(lambda x: x + 1, trainable)
    allocation = allocate.importance(3, total_steps=4)
    state = allocation.init(trainable)
    for step in range(1, 5):
        state, trainable = allocation.update(state, trainable, trainable, step)
    assert np.all(trainable["up"]["kernel"].trainable["e"] != 0)


# --- what is left


def pruned():
    trainable = run()[1]
    return jp.combine(trainable, jp.partition(made())[1])


def test_ranks_are_counted_by_site_and_layer():
    adapted = pruned()
    ranks = allocate.kept_ranks(adapted)
    assert list(ranks) == sorted(PATHS)
    each = weights(adapted)
    assert ranks["up/kernel"] == int(jnp.sum(each["up"] != 0))
    assert ranks["layers/kernel"] == [int(n) for n in (each["layers"] != 0).sum(1)]
    total = ranks["up/kernel"] + ranks["heads/kernel"] + sum(ranks["layers/kernel"])
    assert total == 8


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt_r"])
def test_finalised_adapters_compute_the_same(scaling):
    adapted = pruned()
    adapter = jp.lora(scaling=scaling)
    plain = allocate.finalise(adapted, adapter, key=jax.random.key(3))
    x = numbers(5, 6, seed=9)
    y = jp.adapt(apply)(adapted, x)
    np.testing.assert_allclose(jp.adapt(apply)(plain, x), y, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(apply(PARAMS, x) - y)) > 0.1
    ranks = allocate.kept_ranks(adapted)
    for name in SITES:
        node = plain[name]["kernel"]
        assert node.adapter is adapter
        wanted = ranks[f"{name}/kernel"]
        wanted = wanted if isinstance(wanted, list) else [wanted]
        assert node.site.ranks == tuple(max(1, r) for r in wanted)
    assert plain["head"]["kernel"].adapter is jp.full()


def test_what_lost_everything_is_plain_again():
    adapted = pruned()
    for name, dead in (("up", slice(None)), ("layers", (0, slice(None)))):
        node = adapted[name]["kernel"]
        e = node.trainable["e"].at[dead].set(0)
        adapted[name] = {"kernel": node.replace(trainable=node.trainable | {"e": e})}
    plain = allocate.finalise(adapted, jp.lora(), key=jax.random.key(3))
    assert np.array_equal(plain["up"]["kernel"], PARAMS["up"]["kernel"])
    stack = plain["layers"]["kernel"]
    assert stack.site.ranks[0] == 1 and np.all(stack.trainable["b"][0] == 0)
    x = numbers(5, 6, seed=9)
    y = jp.adapt(apply)(adapted, x)
    np.testing.assert_allclose(jp.adapt(apply)(plain, x), y, rtol=1e-4, atol=1e-4)
    nothing = allocate.finalise(made(), jp.lora(), key=jax.random.key(3))
    assert np.array_equal(nothing["layers"]["kernel"], PARAMS["layers"]["kernel"])


# --- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_rank": 0}, "`target_rank` must be a whole number from 1 up, got 0"),
        ({"total_steps": 0}, "`total_steps` must be a whole number from 1 up, got 0"),
        ({"every": 0}, "`every` must be a whole number from 1 up, got 0"),
        ({"b1": 1.0}, r"`b1` must be between 0 and 1, got 1\.0"),
        ({"b2": 0.0}, r"`b2` must be between 0 and 1, got 0\.0"),
        ({"initial_steps": 10}, "leave at least one of the 10 steps between them"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        allocate.importance(**{"target_rank": 2, "total_steps": 10} | given)


def test_trees_that_cannot_be_pruned():
    plain = jp.attach(PARAMS, jp.lora(rank=2), ["up"], key=jax.random.key(0))
    allocation = allocate.importance(2, total_steps=10)
    for call in (
        lambda: allocation.init(jp.partition(plain)[0]),
        lambda: allocate.kept_ranks(plain),
        lambda: allocate.finalise(plain, jp.lora(), key=jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=r"no site has a trained weight.*adalora"):
            call()
    with pytest.raises(ValueError, match="`target_rank` 4 asks for 16.*there are 13"):
        allocate.importance(4, total_steps=10).init(moved()[0])
    with pytest.raises(ValueError, match=r"`adapter` kasa.*is not a plain"):
        allocate.finalise(pruned(), jp.kasa(rank=1), key=jax.random.key(0))
    kasa = jp.attach(PARAMS, jp.kasa(rank=2), ["up"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="'up/kernel': 'kasa' does more than a low"):
        allocate.finalise(kasa, jp.lora(), key=jax.random.key(0))
