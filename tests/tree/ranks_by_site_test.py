"""An allocation: plain data, and what ``attach`` makes of it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.allocate import Allocation, KernelShape, SiteRank, kernel_shapes
from jaxpeft.tree._kept import only_adds

PARAMS = {
    "layer_0": {"q": {"kernel": jnp.ones((6, 4))}, "v": {"kernel": jnp.ones((6, 5))}},
    "layer_1": {"q": {"kernel": jnp.ones((6, 4))}, "v": {"kernel": jnp.ones((6, 5))}},
}
STACKED = {"layers": {"q": {"kernel": jnp.ones((3, 6, 4))}}}
AXES = {"q": "layer in out"}


def apart(*ranks):
    names = [f"layer_{i}/{name}/kernel" for i in range(2) for name in "qv"]
    return Allocation.of(
        {n: SiteRank(r, 2.0 * r) for n, r in zip(names, ranks, strict=True)}
    )


def test_attach_takes_it():
    allocation = apart(1, 2, 0, 3)
    adapted = jp.attach(PARAMS, jp.lora(), allocation, key=jax.random.key(0))
    ranks = {n: x.shape for n, x in jp.tree.flat(adapted).items() if n.endswith("/a")}
    assert ranks == {
        "layer_0/q/kernel/a": (6, 1),
        "layer_0/v/kernel/a": (6, 2),
        "layer_1/v/kernel/a": (6, 3),
    }
    scales = [adapted["layer_0"][n]["kernel"].frozen["scale"] for n in "qv"]
    assert [float(scale) for scale in scales] == [2.0, 2.0]
    whole = jp.attach({"params": PARAMS}, jp.lora(), allocation, key=jax.random.key(0))
    assert jp.count(whole) == jp.count(adapted)
    shapes = kernel_shapes(PARAMS, ["q", "v"])
    assert allocation.count(shapes) == jp.count(adapted)[0] == 1 * 10 + 5 * 11


def test_stacks():
    allocation = Allocation.of(
        {"layers/q/kernel": SiteRank((1, 3, 2), (1.0, 3.0, 2.0))}
    )
    adapted = jp.attach(
        STACKED, jp.lora(), allocation, key=jax.random.key(0), axes=AXES
    )
    node = adapted["layers"]["q"]["kernel"]
    assert node.site.ranks == (1, 3, 2)
    assert node.trainable["a"].shape == (3, 6, 3)
    assert np.all(node.trainable["a"][0, :, 1:] == 0)
    shapes = kernel_shapes(STACKED, ["q"], axes=AXES)
    assert shapes == {"layers/q/kernel": KernelShape(3, 6, 4)}
    assert allocation.count(shapes) == jp.count(adapted)[0] == 60


METHODS = [
    name
    for name, make in sorted(vars(jp.adapters).items())
    if inspect.isfunction(make) and only_adds(make())
]
HOLES = Allocation.of({"layers/q/kernel": SiteRank((2, 0, 1), (2.0, 0.0, 1.0))})


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_of_rank_0_is_its_kernel(name):
    """Beside layers that are adapted; nothing of it ever moves, nor counts."""
    kernel = jax.random.normal(jax.random.key(1), (3, 6, 4))
    params, adapter = {"layers": {"q": {"kernel": kernel}}}, getattr(jp.adapters, name)
    adapted = jp.attach(params, adapter(), HOLES, key=jax.random.key(0), axes=AXES)
    trainable, frozen = jp.partition(adapted)
    real = jnp.array([1.0, 0.0, 1.0])  # layer 2's padding is tested elsewhere
    of = lambda x: real.reshape(3, *[1] * (x.ndim - 1))
    start = trainable = jax.tree.map(lambda x: x + 0.37 * of(x), trainable)
    f = jp.adapt(lambda p, x: jnp.einsum("bi,lio->lbo", x, p["layers"]["q"]["kernel"]))
    x = jax.random.normal(jax.random.key(2), (5, 6))

    base = jax.jit(f)(params, x)

    @jax.jit
    def step(trainable):
        def loss(trainable):
            tree = jp.combine(trainable, frozen)
            out = f(tree, x)
            return jnp.sum(out**2) + jp.penalty(tree), out

        grads, out = jax.grad(loss, has_aux=True)(trainable)
        grow = lambda x, g: x - 0.1 * jnp.sign(g)  # any gradient but 0 would show
        return jax.tree.map(grow, trainable, grads), out

    for _ in range(2):
        trainable, out = step(trainable)
        assert np.all(np.isfinite(out))
        # Of two programs: the last bit of a matmul is the compiler's.
        np.testing.assert_allclose(out[1], base[1], rtol=1e-5, atol=1e-5)
    for leaf, old in zip(
        jax.tree.leaves(trainable), jax.tree.leaves(start), strict=True
    ):
        assert np.all(leaf[1] == 0)
        assert np.any(leaf != old)  # control: the others learn
    assert np.max(np.abs(out[0] - base[0])) > 1e-3
    whole = jp.combine(trainable, frozen)
    assert np.array_equal(jp.merge(whole)["layers"]["q"]["kernel"][1], kernel[1])
    assert np.array_equal(jp.detach(adapted)["layers"]["q"]["kernel"], kernel)
    alone = {"a": {"kernel": kernel[0]}, "b": {"kernel": kernel[2]}}
    ranks = {"a/kernel": SiteRank(2, 2.0), "b/kernel": SiteRank(1, 1.0)}
    ranks = Allocation.of(ranks)
    by_layer = jp.attach(alone, adapter(), ranks, key=jax.random.key(0))
    assert jp.count(adapted)[0] == jp.count(by_layer)[0]
    assert np.isclose(jp.penalty(adapted), jp.penalty(by_layer), rtol=0.5)
    jp.describe(whole)
    shapes = jax.eval_shape(
        lambda p: jp.attach(p, adapter(), HOLES, key=jax.random.key(0), axes=AXES),
        params,
    )
    sizes = lambda tree: {n: x.shape for n, x in jp.tree.flat(tree).items()}
    assert sizes(shapes) == sizes(adapted)


def test_methods_that_scale_need_a_rank():
    for adapter in (jp.dora(), jp.bora(), jp.molora()):
        with pytest.raises(ValueError, match="more than add .*r_min=1"):
            jp.attach(STACKED, adapter, HOLES, key=jax.random.key(0), axes=AXES)
    with pytest.raises(ValueError, match="an integer of at least 1, got 0"):
        jp.attach(
            *(PARAMS, jp.lora(), ["q"]), rank_pattern={"q": 0}, key=jax.random.key(0)
        )


def test_chosen_components():
    """Principal components of which some are trained, as if attached one by one."""
    kernel = jax.random.normal(jax.random.key(1), (3, 6, 4))
    params = {"layers": {"q": {"kernel": kernel}}}
    some = Allocation.of(
        {"layers/q/kernel": SiteRank((2, 0, 1), (2.0, 0.0, 1.0), ((0, 2), (), (3,)))}
    )
    put = lambda adapter, tree=params: jp.attach(
        *(tree, adapter, some), key=jax.random.key(0), axes=AXES
    )["layers"]["q"]["kernel"]
    node = put(jp.pc())
    assert node.site.ranks == (2, 0, 1) and jp.tree.alphas_of(node) is None
    for layer, each in ((0, [0, 2]), (2, [3])):
        u, s, v = np.linalg.svd(kernel[layer])
        expected = (u[:, : len(s)] * s)[:, each] @ v[each]
        a, b = (node.trainable[n][layer] for n in "ab")
        np.testing.assert_allclose(a @ b, expected, atol=1e-5)
        assert np.array_equal(a, node.frozen["a0"][layer])
    assert np.all(node.trainable["a"][1] == 0) and np.all(
        node.trainable["b"][2, 1] == 0
    )
    for scaling in (jp.lora, jp.rslora):  # of any method; the scale is of this rank
        node = put(scaling())
        one = Allocation.of(
            {"layers/q/kernel": some["layers/q/kernel"]._replace(components=None)}
        )
        plain = jp.attach(params, scaling(), one, key=jax.random.key(0), axes=AXES)
        plain = plain["layers"]["q"]["kernel"]
        assert np.allclose(node.frozen["scale"], plain.frozen["scale"])
        np.testing.assert_allclose(jp.tree.alphas_of(node), jp.tree.alphas_of(plain))
    shapes = jax.eval_shape(lambda p: put(jp.pc(), p), params)
    assert shapes.trainable["a"].shape == (3, 6, 2)
    with pytest.raises(ValueError, match="mixes components"):
        put(jp.lora_xs())
    with pytest.raises(ValueError, match="'pc' has no alpha: its scale is 1"):
        jp.attach(PARAMS, jp.pc(), apart(1, 1, 1, 1), key=jax.random.key(0))
    for components in ((1, 0), (0,), (0, 0), (-1, 0)):
        with pytest.raises(ValueError, match="`components` must be as many"):
            Allocation.of({"q": SiteRank(2, 2.0, components)})


def test_plain_data():
    allocation = apart(1, 2, 0, 3)
    stacked = Allocation.of(
        {"a/kernel": SiteRank((1, 0), (2.0, 0.0), ((0,), ()))}, {"method": "by hand"}
    )
    for each in (allocation, stacked):
        again = Allocation.from_json(each.to_json())
        assert again == each
        assert hash(again) == hash(each)
        assert again.facts == each.facts
    assert allocation != apart(1, 2, 0, 4)
    assert list(allocation) == [path for path, _ in allocation.sites]
    assert allocation["layer_0/v/kernel"] == SiteRank(2, 4.0)


def test_a_table():
    facts = {"layers": [{"layer": 0, "dim": 2.0}, {"layer": 1, "dim": 10.25}]}
    printed = str(Allocation(apart(1, 2, 0, 13).sites, facts))
    assert printed.split("\n") == [
        *("layer  q   v", "    0  1   2", "    1  0  13", ""),
        *("layer     dim", "    0   2.000", "    1  10.250"),
    ]


def test_refusals():
    key = jax.random.key(0)
    with pytest.raises(
        ValueError, match="'layer_9/q/kernel', which is not in the tree"
    ):
        dead = Allocation.of({"layer_9/q/kernel": SiteRank(1, 1.0)})
        jp.attach(PARAMS, jp.lora(), dead, key=key)
    with pytest.raises(
        ValueError, match="leave `rank_pattern` and `alpha_pattern` out"
    ):
        jp.attach(PARAMS, jp.lora(), apart(1, 1, 1, 1), rank_pattern={"q": 1}, key=key)
    with pytest.raises(ValueError, match="every site rank 0"):
        jp.attach(PARAMS, jp.lora(), apart(0, 0, 0, 0), key=key)
    with pytest.raises(
        ValueError, match="site 'layer_0/q/kernel', .*`rank` must be at"
    ):
        jp.attach(PARAMS, jp.pissa(), apart(5, 1, 1, 1), key=key)
    with pytest.raises(ValueError, match="this adapter has no rank"):
        jp.attach(PARAMS, jp.ia3(), apart(1, 1, 1, 1), key=key)
    with pytest.raises(ValueError, match="`alpha` must be positive and finite"):
        Allocation.of({"q": SiteRank(1, 0.0)})
    with pytest.raises(ValueError, match="`rank` must be an integer from 0 up"):
        Allocation.of({"q": SiteRank(-1, 1.0)})
    with pytest.raises(ValueError, match="one entry a layer"):
        Allocation.of({"q": SiteRank((1, 2), (1.0,))})
