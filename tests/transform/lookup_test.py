"""Rows of tables and kernels out of stacks, by every index that a model may write."""

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import (
    CLOSE,
    check,
    distance,
    everything,
    gated,
    numbers,
    pair,
    prepare,
    run_with_gradients,
)
from jax import lax

import jaxpeft as jp

V, D, E, F = 13, 7, 3, 5
IDS = jnp.asarray([[1, 12, 3], [0, 1, 1]])


def by_row(index):
    """``index(table, id)`` under one ``vmap`` for each axis of the ids."""

    def fn(p, ids):
        one = lambda i: index(p["w"], i)
        for _ in range(ids.ndim):
            one = jax.vmap(one)
        return jnp.tanh(one(ids))

    return fn


LOOKUPS = {
    "table[ids]": lambda p, i: jnp.tanh(p["w"][i]),
    "take": lambda p, i: jnp.tanh(jnp.take(p["w"], i, axis=0)),
    "fill": lambda p, i: jnp.tanh(p["w"].at[i].get(mode="fill", fill_value=0)),
    "vmap, vmap": by_row(lambda w, i: w[i]),
    "vmap, vmap of take": by_row(lambda w, i: jnp.take(w, i, axis=0)),
    "vmap, vmap of fill": by_row(lambda w, i: w.at[i].get(mode="fill", fill_value=0)),
    "vmap, vmap of dynamic_index": by_row(
        lambda w, i: lax.dynamic_index_in_dim(w, i, 0, False)
    ),
    "vmap, vmap of dynamic_slice": by_row(
        lambda w, i: lax.dynamic_slice(w, (i, 0), (1, D))
    ),
    "vmap of table[ids]": lambda p, i: jax.vmap(lambda i: jnp.tanh(p["w"][i]))(i),
    "vmap that puts rows behind": lambda p, i: jnp.tanh(
        jax.vmap(jax.vmap(lambda i: p["w"][i]), 1, 2)(i)
    ),
    "jit, remat, vmap": lambda p, i: jax.checkpoint(
        jax.vmap(jax.jit(lambda i: jnp.tanh(p["w"][i])))
    )(i[0]),
    "and positions are added": lambda p, i: (
        jax.vmap(jax.vmap(lambda i: p["w"][i]))(i) + p["positions"]
    ),
    "columns": lambda p, i: jnp.tanh(p["w"].T[:, i]),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_table(name, keys):
    params = {"w": numbers(V, D, seed=1), "positions": numbers(3, D)[None]}
    check(LOOKUPS[name], params, IDS, sites={"w": "in out"}, keys=keys)


@pytest.mark.parametrize("method", [jp.lora(rank=2), jp.dora(rank=2), jp.kasa(rank=2)])
def test_methods_of_papers(method, keys):
    fn = LOOKUPS["vmap, vmap"]
    params = {"w": numbers(V, D, seed=1)}
    check(fn, params, IDS, sites={"w": "in out"}, keys=keys, adapter=method)


STACKS = {
    "an expert for each row": (
        lambda p, x, i: jax.vmap(lambda x, i: x @ p["w"][i])(x, i),
        "layer in out",
    ),
    "by take": (
        lambda p, x, i: jnp.einsum("bd,bdf->bf", x, jnp.take(p["w"], i, axis=0)),
        "layer in out",
    ),
    "several experts for each row": (
        lambda p, x, i: jax.vmap(
            lambda x, i: jnp.sum(jax.vmap(lambda i: jnp.tanh(x @ p["w"][i]))(i), 0)
        )(x, jnp.stack([i, (i + 1) % E], 1)),
        "layer in out",
    ),
    "in the middle": (
        lambda p, x, i: jax.vmap(lambda x, i: x @ p["w"].transpose(1, 0, 2)[:, i])(
            x, i
        ),
        "layer in out",
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_kernels_out_of_a_stack(name, keys):
    fn, roles = STACKS[name]
    params, x = {"w": numbers(E, D, F, seed=1)}, numbers(4, D)
    adapted = prepare(params, everything(), ["w"], keys, axes={"w": roles})
    ids = jnp.asarray([0, 2, 2, 1])
    assert jp.infer_axes(fn, params, x, ids) == {"w": roles}
    same(fn, adapted, x, ids)


def test_an_expert_for_each_row_of_none(keys):
    fn = STACKS["an expert for each row"][0]
    axes = {"w": "expert in out"}
    adapted = prepare({"w": numbers(E, D, F)}, everything(), ["w"], keys, axes=axes)
    x, ids = jnp.zeros((0, D)), jnp.zeros((0,), jnp.int32)
    y, grads, _ = run_with_gradients(jp.adapt(fn), adapted, [x, ids])
    assert y.shape == (0, F)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


def test_dropout_in_kernels_out_of_a_stack(keys):
    """Its keys are picked, too; a mean over masks is the merged function."""
    fn = jp.adapt(STACKS["an expert for each row"][0])
    x, ids = numbers(4, D), jnp.asarray([0, 2, 2, 1])
    axes, method = {"w": "expert in out"}, pair(dropout=0.5)
    adapted = prepare({"w": numbers(E, D, F)}, method, ["w"], keys, axes=axes)
    draw = lambda key: fn(jp.with_dropout(adapted, key), x, ids)
    draws = jax.vmap(draw)(jax.random.split(next(keys), 4000))
    still = fn(adapted, x, ids)
    # 4,000 draws: a standard error of 0.02 of the largest entry.
    assert distance(jnp.mean(draws, 0), still) < 0.05
    assert distance(draws[0], still) > 0.1


def test_a_mixture_out_of_a_stack(keys):
    """An expert axis that is picked from leaves the gates alone."""
    w, x, ids = numbers(E, D, F, seed=1), numbers(4, D), jnp.asarray([0, 2, 2, 1])
    adapted = prepare({"w": w}, gated(), ["w"], keys, axes={"w": "expert in out"})
    got = jp.adapt(STACKS["an expert for each row"][0])(adapted, x, ids)
    each = jp.adapt(lambda p, x: jnp.einsum("bd,edf->ebf", x, p["w"]))(adapted, x)
    assert distance(got, each[ids, jnp.arange(4)]) < CLOSE


MAPPED = {
    "a table for each row": lambda p, i: jax.vmap(lambda w, i: jnp.sin(w[i]))(
        p["w"], i
    ),
    "and an id": lambda p, i: jax.vmap(lambda w, i: jnp.sin(w[i]))(p["w"], i[:, 0]),
    "by take": lambda p, i: jax.vmap(lambda w, i: jnp.take(w, i, axis=0))(p["w"], i),
    "rows inside": lambda p, i: jax.vmap(
        lambda i: jax.vmap(lambda w, i: jnp.sin(w[i]))(p["w"], i)
    )(jnp.stack([i, i + 1])),
}


@pytest.mark.parametrize("name", MAPPED)
def test_tables_mapped_with_their_indices(name, keys):
    params = {"w": numbers(2, V, D, seed=1)}
    check(MAPPED[name], params, IDS % 11, sites={"w": "batch in out"}, keys=keys)


def same(fn, adapted, *inputs, **kwargs):
    """Values and gradients of the adapted function are those on merged parameters."""
    got, grads, _ = run_with_gradients(jp.adapt(fn, **kwargs), adapted, inputs)
    merged = lambda tree, *inputs: fn(jp.merge(tree), *inputs)
    expected, expected_grads, _ = run_with_gradients(merged, adapted, inputs)
    base = jax.tree.leaves(fn(jp.detach(adapted), *inputs))
    assert distance(got, expected) < CLOSE
    assert distance(grads, expected_grads) < CLOSE
    assert distance(base, jax.tree.leaves(expected)) > 1e-2, "the adapter did nothing"


@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_ids_that_are_not_there_are_filled_in(fill, keys):
    """The fill value itself, and no gradient from there."""
    adapted = prepare({"w": numbers(V, D, seed=1)}, everything(), ["w"], keys)
    ids = jnp.asarray([[1, V, 3], [V + 5, 1, 1]])
    fn = lambda p, i: jnp.tanh(p["w"].at[i].get(mode="fill", fill_value=fill))
    same(fn, adapted, ids)
    out = jp.adapt(lambda p, i: p["w"].at[i].get(mode="fill", fill_value=fill))
    assert jnp.all(out(adapted, ids)[0, 1] == fill)


def test_nan_where_take_finds_no_row(keys):
    """``jnp.take`` fills with NaN; rows that are used have their gradients all the
    same."""
    adapted = prepare({"w": numbers(V, D, seed=1)}, everything(), ["w"], keys)
    ids = jnp.asarray([1, V, 3])
    fn = lambda p, i: jnp.take(p["w"], i, axis=0)
    assert jnp.isnan(jp.adapt(fn)(adapted, ids)).any(1).tolist() == [False, True, False]
    shown = lambda p, i: jnp.where((i < V)[:, None], fn(p, i), 0.0)
    same(shown, adapted, ids)


def test_kernels_that_are_not_there_cannot_be_filled_in(keys):
    axes = {"w": "expert in out"}
    adapted = prepare({"w": numbers(E, D, F)}, pair(), ["w"], keys, axes=axes)
    fn = lambda p, i: jnp.ones(D) @ p["w"].at[i].get(mode="fill", fill_value=7.0)
    with pytest.raises(jp.UnsupportedError, match=r"`gather`.*7\.0 is filled in"):
        jp.adapt(fn)(adapted, jnp.asarray([0]))


# A row (or a column) is as thin as the factors: in what follows it is an array.
ONE_ROW = {
    "row": lambda p, i: jnp.tanh(p["w"][3] + p["positions"]),
    "row by a traced id": lambda p, i: jnp.tanh(p["w"][i[0, 1]] + p["positions"]),
    "scaled and squared": lambda p, i: (2.0 * p["w"][5] * p["positions"]) ** 2,
    "column": lambda p, i: jnp.sin(p["w"][:, 2]),
    "row, kept": lambda p, i: jnp.sin(p["w"][2:3]),
    "rows side by side": lambda p, i: jnp.concatenate([p["w"][1], p["positions"]]) ** 2,
    "in a loop": lambda p, i: lax.scan(
        lambda s, i: (s + jnp.sin(s + p["w"][i]), None), p["positions"], i[0]
    )[0],
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_is_an_array(name, keys):
    params = {"w": numbers(V, D, seed=1), "positions": numbers(D)}
    same(ONE_ROW[name], prepare(params, everything(), ["w"], keys), IDS)


def test_one_row_of_a_method_that_reads_its_input_is_refused(keys):
    adapted = prepare({"w": numbers(V, D), "positions": 0.0}, gated(), ["w"], keys)
    with pytest.raises(jp.UnsupportedError, match="depends on the input"):
        jp.adapt(ONE_ROW["row"])(adapted, IDS)


NO_RULE = {
    "single entries": lambda p, i: p["w"][i, i % D],
    "several rows at once": lambda p, i: jax.vmap(
        lambda i: jnp.sin(lax.dynamic_slice(p["w"], (i, 0), (2, D)))
    )(i[0]),
}


@pytest.mark.parametrize("name", NO_RULE)
def test_what_takes_more_than_rows(name, keys):
    adapted = prepare({"w": numbers(V, D, seed=1)}, everything(), ["w"], keys)
    with pytest.raises(jp.UnsupportedError, match="`gather`.*whole slices"):
        jp.adapt(NO_RULE[name])(adapted, IDS)
    with pytest.warns(UserWarning, match="merged kernel is formed"):
        same(NO_RULE[name], adapted, IDS, unsupported="materialise")


def test_an_empty_look_up_under_vmap(keys):
    adapted = prepare({"w": numbers(V, D)}, everything(), ["w"], keys)
    for ids in (jnp.zeros((0, 3), jnp.int32), jnp.zeros((3, 0), jnp.int32)):
        y, grads, _ = run_with_gradients(
            jp.adapt(LOOKUPS["vmap, vmap"]), adapted, [ids]
        )
        assert y.shape == (*ids.shape, D)
        assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))
