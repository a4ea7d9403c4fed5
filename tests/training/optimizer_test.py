"""AdamW: schedules, groups of rates, and what is decayed."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_toolbox import METHODS, make

import jaxpeft as jp
from jaxpeft import training
from jaxpeft.tree import Adapter, Factors, Term, Where, flat, method


@pytest.fixture(scope="module")
def trainable():
    """KaSA at a kernel and at a stack, LoRA at a table, a head trained whole."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {
        "query": {"kernel": jax.random.normal(next(keys), (6, 8))},
        "layers": {"up": {"kernel": jax.random.normal(next(keys), (3, 6, 8))}},
        "embed": {"embedding": jax.random.normal(next(keys), (12, 6))},
        "classifier": {
            "kernel": jax.random.normal(next(keys), (8, 2)),
            "bias": jnp.zeros(2),
        },
    }
    axes = {"up": "layer in out"}
    adapted = jp.attach(
        params, jp.kasa(rank=2), ["query", "up"], key=next(keys), axes=axes
    )
    adapted = jp.attach(adapted, jp.lora(rank=2), ["embed"], key=next(keys))
    adapted = jp.attach(adapted, jp.full(), ["classifier"], key=next(keys))
    return jp.partition(adapted)[0]


def first_update(optimizer, trainable, gradient=1.0):
    grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), trainable)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.transform.init(trainable)
        updates, _ = jax.jit(optimizer.transform.update)(grads, state, trainable)
    return {n: np.asarray(x) for n, x in flat(updates).items()}


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_follow_their_formulas(kind):
    rate = training.schedule(kind, 2.0, total_steps=10, warmup_steps=4, final_ratio=0.1)
    assert [float(rate(t)) for t in range(4)] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    u = np.arange(7) / 6
    fall = {
        "constant": 1 + 0 * u,
        "linear": 1 - u,
        "cosine": 0.5 + np.cos(np.pi * u) / 2,
    }
    expected = 2 * (0.1 + 0.9 * fall[kind])
    rates = [float(rate(jnp.int32(t))) for t in range(4, 11)]
    assert rates == pytest.approx(list(expected), rel=1e-5)
    assert float(rate(100)) == pytest.approx(expected[-1], rel=1e-5)


def test_no_group_and_no_decay_is_optax_adamw(trainable):
    ours = training.adamw(
        trainable, total_steps=10, learning_rate=0.1, schedule="constant"
    )
    theirs = training.Optimizer(optax.adam(0.1), {})
    expected = first_update(theirs, trainable, 0.3)
    for name, update in first_update(ours, trainable, 0.3).items():
        np.testing.assert_allclose(update, expected[name], rtol=1e-6, err_msg=name)
    assert list(ours.schedules) == ["adapter"]


def test_only_matrices_are_decayed(trainable):
    optimizer = training.adamw(
        trainable,
        total_steps=10,
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
    )
    updates = first_update(optimizer, trainable, gradient=0.0)
    values = flat(trainable)
    for name in ("query/kernel/a", "layers/up/kernel/a", "classifier/kernel/value"):
        np.testing.assert_allclose(updates[name], -0.05 * values[name], rtol=1e-6)
    # b starts at 0, where decay does not show.
    ones = jax.tree.map(jnp.ones_like, trainable)
    updates = first_update(optimizer, ones, gradient=0.0)
    still = sorted(n for n, x in updates.items() if np.all(x == 0))
    assert still == [
        "classifier/bias/value",
        "layers/up/kernel/sigma",
        "query/kernel/sigma",
    ]


def test_lora_plus_moves_ups_and_vectors_faster(trainable):
    options = dict(total_steps=10, learning_rate=0.01, schedule="constant")
    plain = first_update(training.adamw(trainable, **options), trainable)
    optimizer = training.adamw(trainable, lora_plus_ratio=16.0, **options)
    fast = first_update(optimizer, trainable)
    ratio = {n: float(np.mean(fast[n] / plain[n])) for n in plain}
    assert ratio == pytest.approx(
        {
            "query/kernel/a": 1.0,
            "query/kernel/b": 16.0,
            "query/kernel/sigma": 16.0,
            "layers/up/kernel/a": 1.0,
            "layers/up/kernel/b": 16.0,
            "layers/up/kernel/sigma": 16.0,  # [3, 2]: two axes, and yet a vector
            "embed/embedding/a": 1e-4,  # HF PEFT's 1e-6
            "embed/embedding/b": 1e-4,
            "classifier/kernel/value": 1.0,
            "classifier/bias/value": 16.0,
        },
        rel=1e-4,
    )
    assert sorted(optimizer.schedules) == ["adapter", "adapter_fast", "embedding"]


def test_the_head_has_a_rate_of_its_own(trainable):
    optimizer = training.adamw(
        trainable,
        total_steps=10,
        learning_rate=0.01,
        head_learning_rate=0.5,
        embedding_learning_rate=0.2,
        warmup_ratio=0.35,
    )
    rates = {n: float(rate(0)) for n, rate in optimizer.schedules.items()}
    # 3.5 steps of warm-up are 4.
    expected = {"adapter": 0.01 / 5, "head": 0.5 / 5, "embedding": 0.2 / 5}
    assert rates == pytest.approx(expected)
    updates = first_update(optimizer, trainable)
    for name, update in updates.items():
        group = {"cl": "head", "em": "embedding"}.get(name[:2], "adapter")
        np.testing.assert_allclose(update, -expected[group], rtol=1e-4, err_msg=name)


def test_an_unknown_leaf_name_is_an_error_where_it_matters(keys):
    params = {"position": jax.random.normal(next(keys), (4, 4))}
    adapted = jp.attach(params, jp.full(), ["position"], key=next(keys))
    trainable, _ = jp.partition(adapted)
    options = dict(total_steps=10, learning_rate=0.1, schedule="constant")
    training.adamw(trainable, **options)  # no decay, one rate: no kind is needed
    for asked in ({"weight_decay": 0.1}, {"lora_plus_ratio": 4.0}):
        with pytest.raises(ValueError, match=r"leaf_kinds=\{'position': 'vector'\}"):
            training.adamw(trainable, **asked, **options)
    kinds = {"position": "vector"}
    optimizer = training.adamw(trainable, weight_decay=0.1, leaf_kinds=kinds, **options)
    assert np.all(first_update(optimizer, trainable, 0.0)["position/value"] == 0)
    with pytest.raises(ValueError, match="'fast' of 'position'"):
        training.adamw(
            trainable, weight_decay=0.1, leaf_kinds={"position": "fast"}, **options
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, r"`schedule` must be one of \['constant', 'cosine'"),
        ({"learning_rate": -1.0}, "`learning_rate` must be from 0 to .*got -1.0"),
        ({"total_steps": 0}, "`total_steps` must be at least 1"),
        ({"warmup_steps": 10}, "below the 10 steps"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "not both"),
        ({"warmup_ratio": 1.0}, r"must be in \[0, 1\)"),
        ({"lora_plus_ratio": 0.5}, "`lora_plus_ratio` must be at least 1"),
        ({"weight_decay": -0.1}, "`weight_decay` must be from 0 to .*got -0.1"),
        ({"final_ratio": 2.0}, "`final_ratio` must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(trainable, options, message):
    with pytest.raises(ValueError, match=message):
        training.adamw(
            trainable, **{"total_steps": 10, "learning_rate": 0.1, **options}
        )


NUMBERS = [
    name
    for name, parameter in inspect.signature(training.adamw).parameters.items()
    if parameter.annotation in (float, float | None)
]


def test_there_are_numbers():
    assert {"learning_rate", "b1", "eps", "weight_decay", "warmup_ratio"} <= {*NUMBERS}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-3, 1e39])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_update_can_use_are_refused_by_name(trainable, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must.*got {re.escape(str(value))}"):
        training.adamw(
            trainable, **{"total_steps": 10, "learning_rate": 0.1, name: value}
        )


def test_a_fast_rate_that_overflows_is_refused(trainable):
    """A relative: either number is a fine one by itself."""
    options = {"total_steps": 10, "learning_rate": 1e30}
    training.adamw(trainable, **options)
    with pytest.raises(ValueError, match="`learning_rate` times `lora_plus_ratio`"):
        training.adamw(trainable, lora_plus_ratio=1e10, **options)


def test_trees_that_are_not_trainable_are_refused(trainable):
    with pytest.raises(ValueError, match="has no leaves"):
        training.adamw({}, total_steps=10, learning_rate=0.1)
    with pytest.raises(ValueError, match="outside of an adapter"):
        training.adamw(
            {"w": jnp.ones(3)}, total_steps=10, learning_rate=0.1, weight_decay=0.1
        )


@pytest.mark.parametrize("adapter", [*map(make, METHODS)], ids=lambda a: a.name)
def test_every_method_has_groups_and_decay(adapter, keys):
    """A stack's vectors have two axes and are not decayed."""
    params = {"up": {"kernel": jnp.ones((2, 400, 300)), "bias": jnp.ones((2, 300))}}
    run = lambda p, k: jp.attach(p, adapter, ["up"], key=k, axes={"up": "layer in out"})
    trainable, _ = jp.partition(jax.eval_shape(run, params, next(keys)))
    kinds = training._optimizer._leaf_kinds(trainable, {})
    assert kinds
    for (path, name), kind in kinds.items():
        axes = len(flat(trainable)[f"{path}/{name}"].shape) - 1
        assert (axes == 1) == (kind == "vector"), (path, name, kind)
    labels = training.adamw(
        trainable, total_steps=9, learning_rate=1e-3, lora_plus_ratio=16.0
    ).schedules
    vectors = "adapter_fast" in labels
    assert vectors == bool({"up", "vector"} & set(kinds.values()))


# What the methods' papers call their leaves, and what these are.
NAMED = {
    "down": {"a", "core", "router"},
    "up": {"b"},
    "vector": {"sigma", "e", "m_in", "m_out", "lam_d", "lam_b", "l"},
}


@pytest.mark.parametrize("adapter", [*map(make, METHODS)], ids=lambda a: a.name)
def test_what_a_leaf_is_follows_from_its_axes(adapter, keys):
    params = {"up": {"kernel": jnp.ones((400, 300)), "bias": jnp.ones((300,))}}
    run = lambda p, k: jp.attach(p, adapter, ["up"], key=k)
    trainable, _ = jp.partition(jax.eval_shape(run, params, next(keys)))
    for (_, name), kind in training._optimizer._leaf_kinds(trainable, {}).items():
        whole = adapter.where.leaf != "kernel"
        assert whole or name.partition(".")[0] in NAMED[kind], (name, kind)


@method
def blocks(rank: int = 2, groups: int = 48) -> Adapter:
    """A method of one's own whose leaves have groups, and names of its own."""

    def init(key, kernel, rank, alpha):
        d_in, d_out = kernel.shape
        if d_in % groups:
            raise ValueError(f"`groups` must divide {d_in}")
        left = jax.random.normal(key, (groups, d_in // groups, rank))
        return {}, {"left": left, "right": jnp.zeros((rank, d_out))}

    def factors(kernel, frozen, t, call):
        a = t["left"].reshape(kernel.shape[0], -1)
        return Factors((Term(a, t["right"]),))

    return Adapter(init, factors, where=Where(rank=rank))


def test_a_method_from_elsewhere_has_decay_and_groups_of_rates(keys):
    params = {"up": {"kernel": jnp.ones((96, 30))}}
    adapted = jp.attach(params, blocks(), ["up"], key=next(keys))
    trainable, _ = jp.partition(adapted)
    kinds = training._optimizer._leaf_kinds(trainable, {})
    assert {name: kind for (_, name), kind in kinds.items()} == {
        "left": "down",
        "right": "up",
    }
    options = {"total_steps": 9, "learning_rate": 1e-3, "weight_decay": 0.1}
    training.adamw(trainable, lora_plus_ratio=4.0, **options)
