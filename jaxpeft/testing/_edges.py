"""The contract suite goes on: files, unequal ranks, dropout, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import interop
from jaxpeft.console import optional
from jaxpeft.testing._compare import CLOSE, FAR, distance, perturb
from jaxpeft.testing._fixtures import params as params
from jaxpeft.testing._fixtures import x as x
from jaxpeft.testing._net import (
    RANK,
    D,
    F,
    accepts,
    at_init,
    attached,
    make,
    moved,
    net,
    node_in,
    nodes,
    same_bits,
    value_and_grad,
)
from jaxpeft.transform import adapt
from jaxpeft.tree import attach, merge, mergeable, partition, with_dropout

with optional("Contract tests"):
    import pytest


# --- in files, in stacks of unequal rank, with dropout ---


def test_save_and_load_give_the_same_bits(name, params, x, tmp_path):
    adapted = moved(name)
    interop.save_adapter(adapted, tmp_path / "adapter")
    again = interop.load_adapter(tmp_path / "adapter", params)
    same_bits(again, adapted)
    assert np.array_equal(adapt(net)(again, x), adapt(net)(adapted, x))
    files = sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    leaves = [(node.frozen, node.trainable) for node in nodes(adapted)]
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))
    assert files < own + 20_000  # no base in it


def test_padding_of_unequal_ranks_never_learns(name, params, x):
    pattern = {"layers/up": [1, RANK]}
    if make(name).where.rank is None:
        with pytest.raises(ValueError, match="has no rank"):
            attached(params, name, jax.random.key(2), rank_pattern=pattern)
        return
    adapted = attached(params, name, jax.random.key(2), rank_pattern=pattern)
    node = node_in(adapted, "layers", "up")
    init = lambda rank: jax.eval_shape(
        functools.partial(node.adapter.init, rank=rank, alpha=1.0),
        jax.random.key(0),
        jnp.zeros((D, F)),
    )[1]
    masks = {}
    for leaf, value in node.trainable.items():
        mask = np.zeros(value.shape, bool)
        for i, rank in enumerate(node.site.ranks):
            mask[(i, *(slice(0, n) for n in init(rank)[leaf].shape))] = True
        masks[leaf] = mask
    assert not all(m.all() for m in masks.values())
    stirred = node_in(perturb(adapted), "layers", "up").trainable
    kept = {n: jnp.where(masks[n], stirred[n], 0.0) for n in masks}
    node = node.replace(trainable=kept)
    up = adapted["layers"]["up"] | {"kernel": node}
    stack = adapted["layers"] | {"up": up}
    trainable, frozen = partition(adapted | {"layers": stack})
    _, gradient = value_and_grad(trainable, frozen, x)
    for leaf, g in node_in(gradient, "layers", "up").trainable.items():
        g, mask = np.asarray(g), masks[leaf]
        assert np.all(g[~mask] == 0), f"{leaf}: padding learns"
        assert np.all(np.any(g != 0, axis=tuple(range(1, g.ndim)))), leaf


def test_dropout_is_on_only_under_a_key(name, params, x):
    key = jax.random.key(4)
    if not accepts(name, "dropout"):
        tree = with_dropout(moved(name), key)
        assert jax.tree.structure(tree) == jax.tree.structure(moved(name))
        return
    adapter = make(name, dropout=0.5)
    adapted = perturb(attached(params, name, jax.random.key(1), adapter=adapter))
    off = adapt(net)(adapted, x)
    if mergeable(adapted):
        assert distance(off, net(merge(adapted), x)) < CLOSE
    on = adapt(net)(with_dropout(adapted, jax.random.clone(key)), x)
    assert distance(on, off) > FAR
    same = adapt(net)(with_dropout(adapted, key), x)
    assert np.array_equal(on, same)


# --- bad input ---


def test_a_dead_pattern_names_what_is_near(name, params):
    with pytest.raises(ValueError, match=r"'dnese' matched none.*'dense'"):
        attach(params, make(name), ["dnese"], key=jax.random.key(0))


def test_a_second_adapter_on_a_site_is_refused(name):
    with pytest.raises(ValueError, match=f"dense/.*' already carries '{name}'"):
        attach(moved(name), make(name), ["dense"], key=jax.random.key(0))


def test_a_rank_that_is_not_possible_names_the_site(name, params):
    attach_ = lambda rank: attach(
        params,
        make(name),
        ["dense"],
        key=jax.random.key(0),
        rank_pattern={"dense": rank},
    )
    with pytest.raises(ValueError, match="dense|has no rank"):
        attach_(0)
    try:
        adapted = attach_(D)  # some methods forbid it
    except ValueError as e:
        assert "dense/" in str(e) or "has no rank" in str(e)
    else:
        assert node_in(adapted, "dense").site.ranks == (D,)


def test_integer_kernels_are_refused(name, params):
    leaf = node_in(at_init(name), "dense").site.path.rpartition("/")[2]
    params["dense"][leaf] = params["dense"][leaf].astype(jnp.int8)
    with pytest.raises(ValueError, match=f"dense/{leaf}.*floating"):
        attach(params, make(name), [f"dense/{leaf}"], key=jax.random.key(0))
