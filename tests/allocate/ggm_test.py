"""Nodes of a tree, their scores, the choice, and what rests afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import allocate, interop
from jaxpeft.allocate._choices import node_sites, node_sizes
from jaxpeft.tree._node import nodes

pytestmark = pytest.mark.usefixtures("quick_compiles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "up": {"kernel": numbers(6, 9), "bias": numbers(9, seed=7)},
    "heads": {"kernel": numbers(9, 2, 3, seed=1)},
    "layers": {"kernel": numbers(2, 6, 6, seed=2), "bias": numbers(2, 6, seed=8)},
    "head": {"kernel": numbers(6, 3, seed=3), "bias": numbers(3, seed=9)},
}
AXES = {"heads": "in out out", "layers": "layer in out"}
# heads 3, layers 4 and 2, up 3; one bias a layer, and one: 15 nodes.
RANKS = {"up": 3, "layers": [4, 2], "heads": 3}
N = 15
TIMES = {"total_steps": 12, "initial_steps": 1, "collect_steps": 6}


@functools.cache
def halves():
    @jax.jit
    def attach(params, keys):
        adapted = jp.attach(
            *(params, jp.pc(rank=3), list(RANKS)),
            key=keys[0],
            rank_pattern=RANKS,
            axes=AXES,
        )
        adapted = jp.attach(adapted, jp.bitfit(), ["up", "layers"], key=keys[1])
        return jp.attach(adapted, jp.full(), ["head"], key=keys[2])

    return jp.partition(attach(PARAMS, jax.random.split(jax.random.key(0), 3)))


def gradients(seed):
    rng = np.random.default_rng(seed)
    move = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    return jax.tree.map(move, halves()[0])


def by_hand(tree, grads, f=lambda w, g: np.abs(w * g)):
    """Every node's score by a loop over components, in the order of nodes."""
    leaves = lambda name: [
        {n: np.asarray(x, np.float64) for n, x in t[name]["kernel"].trainable.items()}
        for t in (tree, grads)
    ]
    result = []
    for name in ("heads", "layers", "up"):
        w, g = leaves(name)
        for layer, rank in enumerate(RANKS[name] if name == "layers" else [3]):
            for i in range(rank):
                at_a, at_b = (..., i), (i,)
                if name == "layers":
                    at_a, at_b = (layer, ..., i), (layer, i)
                each = [f(w[n][at], g[n][at]) for n, at in (("a", at_a), ("b", at_b))]
                result.append(np.mean([x.mean() for x in each]))
    for name in ("layers", "up"):
        w, g = (t[name]["bias"].trainable["value"] for t in (tree, grads))
        each = f(np.asarray(w, np.float64), np.asarray(g, np.float64))
        result += list(np.atleast_2d(each).mean(-1))
    return np.array(result)


@functools.cache
def stepper(allocator):
    """One step of a loop of one's own: the optimiser moves everything, by 0.01 g."""

    @jax.jit
    def step(state, trainable, grads, number):
        after = jax.tree.map(lambda p, g: 0.99 * p - 0.01 * g, trainable, grads)
        return allocator.update(state, after, grads, number, trainable)

    return step


def run(allocator, steps, state=None, trainable=None, first=1):
    trainable = halves()[0] if trainable is None else trainable
    state = allocator.init(trainable) if state is None else state
    for number in range(first, first + steps):
        state, trainable = stepper(allocator)(
            state, trainable, gradients(number), number
        )
    return state, trainable


def decided(**options):
    """``(state, trainable, allocation, trainable before)`` right after the choice."""
    options = {"n_select": 7, "n_important": 3} | TIMES | options
    allocator = allocate.ggm(**options)
    state, before = run(allocator, allocator.settled)
    return allocator, *allocator.decide(state, before, halves()[1]), before


def test_nodes_are_components_and_biases_in_order():
    sites = node_sites(halves()[0])
    assert list(sites) == [
        *("heads/kernel", "layers/kernel", "up/kernel"),
        *("layers/bias", "up/bias"),
    ]
    assert [int(s.real.sum()) for s in sites.values()] == [3, 6, 3, 2, 1]
    sizes, other = node_sizes(halves()[0], sites)
    assert sizes.tolist() == [15] * 3 + [12] * 6 + [15] * 3 + [6] * 2 + [9]
    assert other == 6 * 3 + 3  # the head


def test_scores_are_recorded_before_the_update():
    allocator = allocate.ggm(7, 3, **TIMES)
    state, trainable = allocator.init(halves()[0]), halves()[0]
    expected = []
    for number in range(1, 9):
        if 2 <= number <= 7:
            expected.append(by_hand(trainable, gradients(number)))
        state, trainable = stepper(allocator)(
            state, trainable, gradients(number), number
        )
    np.testing.assert_allclose(state.samples, expected, rtol=1e-5)


def test_scores_do_not_see_how_a_and_b_share_their_scale():
    trainable, grads = halves()[0], gradients(3)
    allocator = allocate.ggm(7, 3, **TIMES | {"initial_steps": 0})
    scale = lambda tree, c: jp.tree.unflat(
        tree,
        {
            n: x * (c if n[-2:] == "/a" else 1 / c if n[-2:] == "/b" else 1)
            for n, x in jp.tree.flat(tree).items()
        },
    )
    seen = []
    for c in (1.0, 5.0):
        w, g = scale(trainable, c), scale(grads, 1 / c)
        state, _ = stepper(allocator)(allocator.init(w), w, g, 1)
        seen.append(np.asarray(state.samples)[0])
    np.testing.assert_allclose(seen[1], seen[0], rtol=1e-5)


def test_running_means_are_those_of_three_steps():
    allocator = allocate.ggm(7, 3, score="ema", **TIMES)
    state, trainable = allocator.init(halves()[0]), halves()[0]
    mean = spread = 0.0
    for number in (1, 2, 3):
        w = np.asarray(trainable["up"]["kernel"].trainable["a"], np.float64)
        now = np.abs(w * gradients(number)["up"]["kernel"].trainable["a"])
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * np.abs(now - mean)
        state, trainable = stepper(allocator)(
            state, trainable, gradients(number), number
        )
    held = [m["up"]["kernel"].trainable["a"] for m in state.means]
    np.testing.assert_allclose(held[0], mean, rtol=1e-5)
    np.testing.assert_allclose(held[1], spread, rtol=1e-5)
    b = [m["up"]["kernel"].trainable["b"] for m in state.means]
    each = (mean * spread).mean(0) / 2 + np.asarray(b[0] * b[1]).mean(1) / 2
    np.testing.assert_allclose(state.samples[1, 9:12], each, rtol=1e-5)


@pytest.mark.parametrize("by", ["ggm", "score", "cov", "ridge", "pinv", "random"])
def test_every_selector_chooses_so_many(by):
    _, state, _, allocation, _ = decided(by=by)
    kept = sum(int(np.sum(x)) for x in state.keep.values())
    ranks = jax.tree.leaves(allocation.ranks())
    biases = jax.tree.leaves(allocation.facts["biases"])
    assert kept == sum(ranks) + sum(biases) == allocation.facts["chosen"] == 7
    assert allocate.Allocation.from_json(allocation.to_json()) == allocation
    mine = [np.asarray(x)[s.real] for x, s in zip_sites(state)]
    assert np.all(np.concatenate(mine)[allocation.facts["important"]])
    assert not np.any(np.asarray(state.keep["layers/kernel"])[1, 2:])  # padding
    if by in allocation.facts["agreement"]:
        assert allocation.facts["agreement"][by] == {
            "rank_correlation": 1.0,
            "overlap": 1.0,
        }
    assert ("graph" in allocation.facts) == (by == "ggm")


def zip_sites(state):
    sites = node_sites(halves()[0])
    return [(state.keep[path], site) for path, site in sites.items()]


def entries(tree, keep):
    """``{node: its entries}`` of kept or other nodes, padding left out."""
    found = {}
    for path, site in node_sites(tree).items():
        name, kind = path.split("/")
        for leaf, at in site.leaves.items():
            x = np.asarray(tree[name][kind].trainable[leaf])
            x = x if at is None else np.moveaxis(x, at, site.batch)
            x = x.reshape(*site.real.shape, -1)
            for i, j in np.argwhere(site.real & (np.asarray(keep[path]) == 1)):
                found[path, int(i), int(j), leaf] = x[i, j]
    return found


def test_what_is_not_chosen_rests_to_the_bit():
    allocator, state, trainable, allocation, before = decided()
    same = jax.tree.map(np.array_equal, trainable, before)
    assert all(jax.tree.leaves(same))  # "keep": as the steps before left them
    state, after = run(allocator, 4, state, trainable, first=8)
    others = {path: ~np.asarray(mask) for path, mask in state.keep.items()}
    for mask, moves in ((state.keep, True), (others, False)):
        one, other = entries(trainable, mask), entries(after, mask)
        assert one and all(np.array_equal(one[k], other[k]) != moves for k in one)
    for leaf in ("kernel", "bias"):
        now, then = (t["head"][leaf].trainable["value"] for t in (after, trainable))
        assert not np.any(np.asarray(now) == np.asarray(then))
    facts = allocation.facts
    sizes = node_sizes(trainable, node_sites(trainable))[0]
    kept = np.concatenate([np.asarray(x)[s.real] for x, s in zip_sites(state)])
    assert facts["trained"] == sizes[kept].sum() + 21
    assert facts["stored"] == sizes.sum() + 21


def test_what_is_not_chosen_may_go_back_to_the_start():
    allocator, state, trainable, allocation, before = decided(unselected="revert")
    others = {path: ~np.asarray(mask) for path, mask in state.keep.items()}
    now, start = entries(trainable, others), entries(halves()[0], others)
    assert now and all(np.array_equal(now[k], start[k]) for k in now)
    now, last = entries(trainable, state.keep), entries(before, state.keep)
    assert now and all(np.array_equal(now[k], last[k]) for k in now)
    assert allocation.facts["stored"] == allocation.facts["trained"]
    adapted = jp.combine(trainable, halves()[1])
    change = jp.merge(adapted)["up"]["kernel"] - PARAMS["up"]["kernel"]
    singular = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False)
    assert np.sum(singular > 1e-4) <= 2 * allocation["up/kernel"].rank


def test_a_budget_of_parameters():
    _, state, trainable, allocation, _ = decided(n_select=None, budget=100)
    sizes = node_sizes(trainable, node_sites(trainable))[0]
    kept = np.concatenate([np.asarray(x)[s.real] for x, s in zip_sites(state)])
    spent = int(sizes[kept].sum())
    assert 100 - 15 < spent <= 100
    assert allocation.facts["trained"] == spent + 21


def test_the_counts_of_the_paper():
    """RoBERTa-base, queries, keys and values, ten components each, and all biases."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    dense = lambda i, o: {"kernel": shape(i, o), "bias": shape(o)}
    block = {name: dense(768, 768) for name in ("query", "key", "value", "output")}
    block |= {"up": dense(768, 3072), "down": dense(3072, 768)}
    params = {f"layer_{i}": block for i in range(12)}
    key = jax.random.key(0)
    adapted = jp.attach(params, jp.pc(rank=10), ["query", "key", "value"], key=key)
    adapted = jp.attach(adapted, jp.bitfit(), ".*", key=key)
    trainable, _ = jp.partition(adapted)
    sizes, other = node_sizes(trainable, node_sites(trainable))
    assert len(sizes) == 360 + 72 and other == 0
    assert set(sizes[:360].tolist()) == {1536}
    assert sizes[:360].sum() == 552_960 and sizes[360:].sum() == 82_944
    assert sizes[:60].sum() == 92_160
    assert np.sort(sizes)[-60:].sum() == 110_592


def test_any_low_rank_method_has_components():
    adapted = jp.attach(
        {"up": PARAMS["up"]}, jp.dora(rank=2), ["up"], key=jax.random.key(0)
    )
    sites = node_sites(jp.partition(adapted)[0])
    assert list(sites["up/kernel"].leaves) == ["a", "b"]  # magnitudes always train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_select": 16}, r"at most `n_select` \(16\), and that at most the 15"),
        ({"n_important": 8}, r"`n_important` \(8\) must be at least 1 and at most"),
        ({"n_important": 0}, r"`n_important` \(0\)"),
        ({"shrink": 0}, "6 samples of 15 nodes make a singular matrix"),
    ],
)
def test_too_few_nodes_or_steps(change, message):
    allocator = allocate.ggm(**{"n_select": 7, "n_important": 3} | TIMES | change)
    with pytest.raises(ValueError, match=message):
        allocator.init(halves()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collect_steps": 1}, "`collect_steps` must be a whole number from 2 up"),
        ({"initial_steps": -1}, "`initial_steps` must be a whole number from 0 up"),
        ({"total_steps": 7}, "must leave at least one of the 7 steps after them"),
        ({"n_select": 7, "budget": 9}, "`n_select` or `budget`, not both"),
    ],
)
def test_arguments_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        allocate.ggm(**TIMES | change)


def test_a_tree_without_nodes():
    adapted = jp.attach(PARAMS, jp.full(), ["head"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="no site has components or biases"):
        allocate.ggm(**TIMES).init(jp.partition(adapted)[0])


# --- what was chosen, alone


def forward(params, x):
    x = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    x = jnp.einsum("bi,ijk->bjk", x, params["heads"]["kernel"]).reshape(-1, 6)
    for i in range(2):
        x = jnp.tanh(x @ params["layers"]["kernel"][i])
        x = x + params["layers"]["bias"][i][None]
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def test_the_chosen_alone_compute_the_same(tmp_path):
    allocator, _, trainable, allocation, before = decided(
        n_select=5, n_important=1, unselected="revert"
    )
    adapted = jp.combine(trainable, halves()[1])
    small = allocate.compact(adapted, allocation)
    x = numbers(4, 6, seed=5)
    y = jp.adapt(forward)(adapted, x)
    np.testing.assert_allclose(jp.adapt(forward)(small, x), y, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(forward(PARAMS, x) - y)) > 1e-2  # control
    mixed = allocation.facts["biases"]["layers/bias"]  # of a stack all stay, or none
    spare = 6 * mixed.count(False) if any(mixed) else 0
    assert jp.count(small)[0] == allocation.facts["stored"] + spare
    assert jp.count(small)[0] < jp.count(adapted)[0]
    ranks = {node.site.path: node.site.ranks for node in nodes(small)}
    for path, site in allocation.sites:
        wanted = site.rank if isinstance(site.rank, tuple) else (site.rank,)
        assert ranks.get(path, (0,) * len(wanted)) == wanted
    # From the file, too; and from the pretrained kernels, by `attach`.
    interop.save_adapter(small, tmp_path / "small")
    read = interop.load_adapter(tmp_path / "small", PARAMS)
    assert np.array_equal(jp.adapt(forward)(read, x), jp.adapt(forward)(small, x))
    anew = jp.attach(PARAMS, jp.pc(), allocation, key=jax.random.key(0), axes=AXES)
    for node in nodes(anew):
        (same,) = [n for n in nodes(small) if n.site.path == node.site.path]
        assert node.site.ranks == same.site.ranks
        for name, a0 in node.frozen.items():
            np.testing.assert_allclose(np.abs(a0), np.abs(same.frozen[name]), atol=1e-4)
    kept = jp.combine(before, halves()[1])  # as "keep" leaves it
    with pytest.raises(ValueError, match="a share in what the site computes.*revert"):
        allocate.compact(kept, allocation)
    with pytest.raises(ValueError, match="which are not adapted in the tree"):
        allocate.compact(PARAMS, allocation)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_the_chosen_alone_in_peft(tmp_path):
    """A stack of three, of which the middle one has nothing that was chosen."""
    import peft
    import torch

    kernel = numbers(3, 6, 6, seed=4)
    params = {"layers": {"kernel": kernel}}
    axes = {"layers": AXES["layers"]}
    adapted = jp.attach(
        *(params, jp.pc(rank=4), ["layers"]), key=jax.random.key(0), axes=axes
    )
    chosen = allocate.Allocation.of(
        {
            "layers/kernel": allocate.SiteRank(
                (2, 0, 1), (2.0, 0.0, 1.0), ((0, 2), (), (3,))
            )
        }
    )
    mask = np.zeros((3, 4), np.float32)
    mask[0, [0, 2]] = mask[2, 3] = 1
    node = adapted["layers"]["kernel"]
    moved = {
        "a": node.trainable["a"] + mask[:, None, :],
        "b": node.trainable["b"] + 0.3 * mask[:, :, None],
    }
    adapted = {"layers": {"kernel": node.replace(trainable=moved)}}
    names = [jp.models.ModuleName("layers.{i}", "layers", "linear")]
    saved = interop.save_peft(
        allocate.compact(adapted, chosen), tmp_path / "p", names=names
    )
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(
        [torch.nn.Linear(6, 6, bias=False) for _ in kernel]
    )
    net.forward = lambda x: torch.stack([layer(x) for layer in net.layers])
    for layer, w in zip(net.layers, np.asarray(kernel), strict=True):
        layer.weight.data = torch.tensor(w.T.copy())
    model = peft.PeftModel.from_pretrained(net, saved.folder)
    layers = model.base_model.model.layers
    # The middle one is left as it is; the others have one rank in a portable file.
    assert [hasattr(layer, "lora_A") for layer in layers] == [True, False, True]
    x = numbers(5, 6, seed=6)
    with torch.no_grad():
        theirs = [layer(torch.tensor(np.asarray(x))).numpy() for layer in layers]
    whole = jp.merge(adapted)["layers"]["kernel"]
    ours = np.einsum("bi,lio->lbo", np.asarray(x), np.asarray(whole))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(ours - np.einsum("bi,lio->lbo", x, kernel))) > 0.1  # control
