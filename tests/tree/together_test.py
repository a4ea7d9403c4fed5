"""Several adapters on one kernel, by name."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers, perturb

import jaxpeft as jp
from jaxpeft import interop, serving, training
from jaxpeft.models import ModuleName
from jaxpeft.tree import flat

PARAMS = {
    "query": {"kernel": numbers(6, 5, seed=1)},
    "layers": {"up": numbers(2, 5, 5, seed=2)},
}
AXES = {"layers/up": "layer in out"}
TARGETS = ["query", "layers/up"]
X = numbers(2, 3, 6, seed=3)
KEY = jax.random.key(0)


def net(params, x):
    y = jnp.tanh(x @ params["query"]["kernel"])
    step = lambda y, w: (y + jnp.tanh(y @ w), None)
    return jax.lax.scan(step, y, params["layers"]["up"])[0]


def attach(params, adapter, name="default", targets=TARGETS, **more):
    return jp.attach(params, adapter, targets, key=KEY, axes=AXES, name=name, **more)


def one(adapter, seed=0):
    return perturb(attach(PARAMS, adapter), seed, 0.3)


def both(first, other, name="french"):
    """``other`` put beside ``first``, with the values of both."""
    return jp.graft(first, jp.extract(other), name=name)


def changes(tree):
    merged, plain = jp.merge(tree), jp.detach(tree)
    return jax.tree.map(lambda a, b: a - b, merged, plain)


PAIRS = {
    "lora, lora": (jp.lora(2), jp.lora(3, alpha=5.0)),
    "lora, pissa": (jp.lora(2), jp.pissa(2)),
    "kasa, vera": (jp.kasa(2), jp.vera(2)),
    "vera, vera": (jp.vera(2), jp.vera(3)),
    "adalora, lora_xs": (jp.adalora(2), jp.lora_xs(2)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_changes_of_two_are_added_up(pair, tmp_path):
    first, other = one(PAIRS[pair][0], 1), one(PAIRS[pair][1], 2)
    tree = both(first, other)
    total = jax.tree.map(jnp.add, changes(first), changes(other))
    merged = jax.tree.map(jnp.add, PARAMS, total)
    assert distance(jp.merge(tree), merged) < 1e-5
    assert distance(jp.adapt(net)(tree, X), net(merged, X)) < 1e-5
    for leaf, plain in zip(
        jax.tree.leaves(jp.detach(tree)), jax.tree.leaves(PARAMS), strict=True
    ):
        assert np.array_equal(leaf, plain)
    np.testing.assert_allclose(
        jp.penalty(tree), jp.penalty(first) + jp.penalty(other), rtol=1e-6
    )
    counts = [jp.count(x)[0] for x in (tree, first, other)]
    assert counts[0] == counts[1] + counts[2]
    # Each comes off as it was.
    for name, had in (("default", first), ("french", other)):
        off = jp.graft(PARAMS, jp.extract(tree, name))
        assert jax.tree.structure(off) == jax.tree.structure(had)
        assert same_leaves(off, had)
    folder = interop.save_adapter(tree, tmp_path / "all")
    assert same_leaves(interop.load_adapter(folder, PARAMS), tree)
    folder = interop.save_adapter(tree, tmp_path / "french", name="french")
    again = interop.load_adapter(folder, first)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert same_leaves(again, tree)


def same_leaves(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_attach_by_name_is_as_good_as_alone():
    alone = attach(PARAMS, jp.lora(2, init="gaussian"))
    tree = attach(
        alone, jp.lora(2, init="gaussian"), "french", rank_pattern={"up": [1, 2]}
    )
    node = tree["query"]["kernel"]
    assert sorted(node.trainable) == ["a", "b", "french:a", "french:b"]
    assert np.array_equal(node.trainable["a"], alone["query"]["kernel"].trainable["a"])
    # Another name is another draw.
    assert distance(node.trainable["a"], node.trainable["french:a"]) > 0.1
    fresh = attach(PARAMS, jp.lora(2, init="gaussian"), "french")
    own = fresh["query"]["kernel"].trainable["french:a"]
    assert np.array_equal(own, node.trainable["french:a"])
    rows = jp.describe(tree).rows
    assert [(row["name"], row["ranks"]) for row in rows] == [
        ("default", (2, 2)),
        ("french", (1, 2)),
        ("default", (2,)),
        ("french", (2,)),
    ]
    assert "french" in str(jp.describe(tree)) and "name" not in str(jp.describe(alone))


def test_both_train_and_one_alone():
    tree = both(one(jp.lora(2), 1), one(jp.kasa(2), 2))
    trainable, frozen = jp.partition(tree)
    loss = lambda t: jnp.sum(jp.adapt(net)(jp.combine(t, frozen), X) ** 2)
    gradients = flat(jax.grad(loss)(trainable))
    assert len(gradients) == 2 * (2 + 3) and all(map(np.any, gradients.values()))
    small = jax.tree.map(lambda x: x - 1e-3 * np.sign(x), trainable)
    assert not np.array_equal(loss(small), loss(trainable))
    options = {"total_steps": 9, "learning_rate": 1e-3, "weight_decay": 0.1}
    optimizer = training.adamw(trainable, **options, lora_plus_ratio=4.0).transform
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(
            jax.grad(loss)(trainable), optimizer.init(trainable), trainable
        )
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)


def test_dropout_of_each_is_its_own():
    wide = {"w": jnp.eye(64)}
    adapter = jp.lora(64, alpha=64.0, dropout=0.5)
    tree = jp.attach(wide, adapter, ["w"], key=KEY)
    tree = jp.attach(tree, adapter, ["w"], key=KEY, name="french")
    identity = {"a": jnp.eye(64), "b": jnp.eye(64)}
    node = tree["w"]
    side = lambda sign: {
        n: s * x for (n, x), s in zip(identity.items(), (1, sign), strict=True)
    }
    leaves = side(1) | {f"french:{n}": x for n, x in side(-1).items()}
    tree = {"w": node.replace(trainable=leaves)}
    on = jp.with_dropout(tree, jax.random.key(3))
    x = jnp.ones((8, 64))
    use = jp.adapt(lambda params, x: x @ params["w"])
    # With one mask the two would be each other's negative, and nothing would be left.
    left = use(on, x) - x
    assert 0.3 < float(jnp.mean(left != 0)) < 0.7
    assert distance(use(tree, x), x) < 1e-6


@pytest.mark.parametrize(
    "first, other, why",
    [
        (jp.lora(2), jp.dora(2), "'french', 'dora', scales"),
        (jp.bora(2), jp.lora(2), "'default', 'bora', scales"),
        (jp.lora(2), jp.pissa(2, residual="folded"), "'french', 'pissa', has folded"),
        (jp.ia3(), jp.lora(2), "'default', 'ia3', scales"),
        (jp.full(), jp.lora(2), "'default', 'full', trains the leaf"),
        (jp.molora(2, experts=2), jp.mosld(2, experts=2), "all have experts"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_who_cannot_share_a_kernel(first, other, why):
    tree = jp.attach(PARAMS, first, ["query/kernel"], key=KEY)
    with pytest.raises(ValueError, match=f"site 'query/kernel'.*{why}"):
        jp.attach(tree, other, ["query/kernel"], key=KEY, name="french")


def test_one_of_a_name():
    tree = attach(attach(PARAMS, jp.lora(2)), jp.lora(2), "french")
    for name in ("default", "french"):
        with pytest.raises(ValueError, match="already carries 'lora'.*name of its own"):
            attach(tree, jp.lora(2), name)
    with pytest.raises(ValueError, match="no adapter 'german'.*'default', 'french'"):
        jp.extract(tree, "german")
    with pytest.raises(ValueError, match="`name` must be made of letters.*'a:b'"):
        attach(PARAMS, jp.lora(2), "a:b")
    with pytest.raises(ValueError, match="already carries 'lora'"):
        jp.graft(tree, jp.extract(tree, "french"), name="french")


def test_what_is_told_of_each_is_its_own():
    first, second = jp.kasa(2, alpha=4), jp.kasa(3, alpha=12)
    twice = lambda: attach(attach(PARAMS, first), second, "french", "que.*")
    for tree in (twice(), jax.eval_shape(twice)):
        rows = [r for r in jp.describe(tree).rows if r["path"] == "query/kernel"]
        assert [row["alphas"] for row in rows] == [(4.0,), (12.0,)]
        assert [row["pattern"] for row in rows] == ["query", "que.*"]
    facts = [row for row in jp.describe(twice()).report if "layer" not in row]
    assert {row["name"]: row["dropped"] for row in facts} == {"default": 2, "french": 3}
    with pytest.raises(ValueError, match=r"attached as 'que\.\*'"):
        attach(twice(), second, "french", ["query"])


def test_a_mixture_beside_a_lora():
    mixed, plain = one(jp.molora(2, experts=2, balance_coef=0.3), 1), one(jp.lora(2), 2)
    tree = both(mixed, plain)
    forward = jp.adapt(net, taps="own")
    y, seen = forward(tree, X)
    assert seen.keys() == forward(mixed, X)[1].keys()
    gone = jax.tree.map(jnp.zeros_like, plain)
    off = both(mixed, jax.tree.map(lambda z, x: z, gone, plain))
    assert distance(forward(off, X)[0], forward(mixed, X)[0]) < 1e-6
    assert distance(y, forward(mixed, X)[0]) > 1e-2
    assert float(jp.penalty(tree, seen)) > 0.1
    assert not jp.mergeable(tree)
    who = r"'default \(molora\) and french \(lora\)' depends on the input"
    with pytest.raises(ValueError, match=who):
        jp.merge(tree)


def test_it_is_an_ordinary_tree():
    tree = both(one(jp.lora(2), 1), one(jp.kasa(2), 2))
    for again in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        assert same_leaves(again, tree)
    same = jax.jit(lambda tree: tree)
    assert same_leaves(same(tree), tree)
    assert same(jp.with_numbers(tree, alpha=3.0)) and same._cache_size() == 1
    scales = same(jp.with_numbers(tree, alpha=3.0))["query"]["kernel"].frozen
    assert scales["scale"] == scales["french:scale"] == 1.5


def test_the_sum_is_exported_and_served(tmp_path):
    names = [ModuleName("query", "query", "linear")]
    tree = both(one(jp.lora(2), 1), one(jp.lora(3), 2))
    tree = {"query": tree["query"]}
    interop.save_peft(tree, tmp_path, names=names)
    again = interop.load_peft(tmp_path, {"query": PARAMS["query"]}, names=names)
    assert distance(jp.merge(again), jp.merge(tree)) < 1e-5
    single = jp.weighted([tree], [1.0], into=jp.lora())
    assert single["query"]["kernel"].site.ranks == (5,)
    assert distance(jp.merge(single), jp.merge(tree)) < 1e-5
    room = serving.slots({"query": PARAMS["query"]}, ["query"], capacity=2, rank=8)
    room = serving.load(room, "both", tree)
    use = jp.adapt(lambda params, x: x @ params["query"]["kernel"])
    index = serving.rows(room, ["both", "__base__"])
    y = use(serving.with_rows(room.tree, index), X)
    assert distance(y[0], use(tree, X)[0]) < 1e-5
