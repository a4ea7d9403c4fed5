"""The contract suite goes on: files, unequal ranks, dropout, dtypes, bad input."""

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
    AXES,
    KERNELS,
    RANK,
    D,
    F,
    accepts,
    at_init,
    attached,
    in_float64,
    loss,
    make,
    make_params,
    moved,
    net,
    node_in,
    nodes,
    options_of,
    same_bits,
    value_and_grad,
)
from jaxpeft.transform import adapt
from jaxpeft.tree import (
    attach,
    combine,
    detach,
    is_node,
    merge,
    mergeable,
    partition,
    with_dropout,
)

with optional("Contract tests"):
    import pytest


# --- in files, in stacks of unequal rank, with dropout ---


def test_save_and_load_give_the_same_bits(name, params, x, tmp_path):
    adapted = moved(name)
    interop.save_adapter(adapted, tmp_path / "adapter")
    again = interop.load_adapter(tmp_path / "adapter", params)
    same_bits(again, adapted)
    call = adapt(net)
    assert np.array_equal(call(again, x), call(adapted, x))
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
    call = adapt(net)
    off = call(adapted, x)
    if mergeable(adapted):
        merged = jax.jit(lambda tree: net(merge(tree), x))(adapted)
        assert distance(off, merged) < CLOSE
    on = call(with_dropout(adapted, jax.random.clone(key)), x)
    assert distance(on, off) > FAR
    same = call(with_dropout(adapted, key), x)
    assert np.array_equal(on, same)


# --- dtypes ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_dtypes_are_kept(dtype, name, x):
    low = make_params(dtype)
    init = lambda p, k: attach(p, make(name), KERNELS, key=k, axes=AXES)
    shapes = partition(jax.eval_shape(init, low, jax.random.key(3)))[0]
    assert {t.dtype for t in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    # Its leaves over a base that is rounded now: nothing is drawn and compiled anew.
    rounded = lambda x, w: x.replace(base=w) if is_node(x) else w
    adapted = jax.tree.map(rounded, moved(name), low, is_leaf=is_node)
    trainable, frozen = partition(adapted)
    x = x.astype(dtype)

    @jax.jit
    def run(trainable, frozen, x):
        tree = combine(trainable, frozen)
        merged = merge(tree) if mergeable(tree) else None
        gradient = jax.grad(loss)(trainable, frozen, x)
        return adapt(net)(tree, x), merged, merged and net(merged, x), gradient

    got, merged, expected, gradient = run(trainable, frozen, x)
    assert got.dtype == jax.eval_shape(net, low, x).dtype == dtype
    assert bool(jnp.all(jnp.isfinite(got)))
    if mergeable(adapted):
        assert {w.dtype for w in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    else:
        expected = in_float64(adapted, x)
    # Eight bits of precision through six matmuls: 5e-2 of the largest output.
    expected = expected.astype(jnp.float32)
    assert distance(got.astype(jnp.float32), expected) < 5e-2
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    same_bits(detach(adapted), low)


def test_float64_is_exact(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        draw = lambda w: jnp.asarray(rng.normal(size=w.shape) / 4, jnp.float64)
        params = jax.tree.map(draw, make_params())
        x = jnp.asarray(rng.normal(size=(8, D)))
        # A difference of values knows of no constants: all norms are differentiated.
        held = [o for o in options_of(name) if o.startswith("stop_gradient")]
        adapter = make(name, **dict.fromkeys(held, False))
        adapted = attached(params, name, jax.random.key(3), adapter=adapter)
        adapted = perturb(adapted, scale=0.1)
        trainable, frozen = partition(adapted)
        assert {t.dtype for t in jax.tree.leaves(trainable)} == {jnp.dtype("float64")}

        @jax.jit
        def run(tree, x):
            return adapt(net)(tree, x), net(merge(tree), x) if mergeable(tree) else None

        got, merged = run(adapted, x)
        assert got.dtype == jnp.float64
        if mergeable(adapted):
            assert distance(got, merged) < 1e-12
        # The gradient against a central difference along one direction.
        way = jax.tree.map(lambda t: rng.normal(size=t.shape), trainable)
        move = lambda h: jax.tree.map(lambda t, d: t + h * d, trainable, way)
        _, slope = value_and_grad(trainable, frozen, x)
        ends = [value_and_grad(move(h), frozen, x)[0] for h in (1e-5, -1e-5)]
        pairs = zip(jax.tree.leaves(slope), jax.tree.leaves(way), strict=True)
        along = sum(np.sum(np.asarray(g) * d) for g, d in pairs)
        slope = (ends[0] - ends[1]) / 2e-5  # good to some 1e-8: values have 1e-16 off
        np.testing.assert_allclose(along, slope, rtol=1e-6, atol=1e-7)


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
