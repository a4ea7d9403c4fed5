"""An allocation: plain data, and what ``attach`` makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.core import Allocation, KernelShape, SiteRank, kernel_shapes

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
    ranks = {n: x.shape for n, x in jp.core.flat(adapted).items() if n.endswith("/a")}
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
    with pytest.raises(ValueError, match=r"gives its layers \[1\] rank 0"):
        none = Allocation.of({"layers/q/kernel": SiteRank((1, 0, 2), (1.0, 0.0, 2.0))})
        jp.attach(STACKED, jp.lora(), none, axes=AXES, key=key)
    with pytest.raises(ValueError, match="every site rank 0"):
        jp.attach(PARAMS, jp.lora(), apart(0, 0, 0, 0), key=key)
    with pytest.raises(
        ValueError, match="site 'layer_0/q/kernel', .*`rank` must be at"
    ):
        jp.attach(PARAMS, jp.pissa(), apart(5, 1, 1, 1), key=key)
    with pytest.raises(ValueError, match="chooses components of 'layer_0/q/kernel'"):
        some = Allocation.of({"layer_0/q/kernel": SiteRank(1, 1.0, (3,))})
        jp.attach(PARAMS, jp.lora(), some, key=key)
    with pytest.raises(ValueError, match="this adapter has no rank"):
        jp.attach(PARAMS, jp.ia3(), apart(1, 1, 1, 1), key=key)
    with pytest.raises(ValueError, match="`alpha` must be positive and finite"):
        Allocation.of({"q": SiteRank(1, 0.0)})
    with pytest.raises(ValueError, match="`rank` must be an integer from 0 up"):
        Allocation.of({"q": SiteRank(-1, 1.0)})
    with pytest.raises(ValueError, match="one entry a layer"):
        Allocation.of({"q": SiteRank((1, 2), (1.0,))})
