"""Quantised kernels as leaves: their moves, errors, and what trees do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.numerics import codes_of
from jaxpeft.tree import flat

FOLDS = jp.pissa(4, residual="folded")
GROUPED = [("int8", 64), ("int4", 32), ("nf4", 64), ("nf4", 8)]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def params():
    kernel = lambda seed, *shape: {"kernel": normal(*shape, seed=seed)}
    return {
        "embed": {"embedding": normal(12, 64, seed=1)},
        "query": kernel(2, 64, 48) | {"bias": jnp.zeros(48)},
        "up": kernel(3, 128, 32),
        "router": kernel(4, 64, 3),
        "norm": {"scale": jnp.ones(64)},
    }


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("int8", 4e-3, 8e-3), ("int4", 0.09, 0.13), ("nf4", 0.07, 0.1)],
)
def test_the_error_is_what_theory_says(kind, low, high):
    kernel = normal(512, 96)
    found = jp.quantise(kernel, kind)
    off = jnp.linalg.norm(found.dequantise() - kernel) / jnp.linalg.norm(kernel)
    assert low < off < high
    assert found.nbytes / kernel.size <= (1.01 if kind == "int8" else 0.54)


def test_the_values_are_those_of_the_definition():
    """One group by hand, in NumPy's float64."""
    from jaxpeft.numerics._codes import NF4

    kernel = np.asarray(normal(64, 1), np.float64)
    found = jp.quantise(jnp.asarray(kernel, jnp.float32), "nf4")
    scale = float(jnp.bfloat16(np.abs(kernel).max()))
    nearest = np.abs(kernel / scale - np.array(NF4)).argmin(1)
    assert np.array_equal(found.codes[:, 0].astype(int), nearest)
    expected = np.array(NF4)[nearest] * scale
    np.testing.assert_allclose(found.dequantise()[:, 0], expected, rtol=1e-6)
    whole = jp.quantise(jnp.asarray(kernel, jnp.float32), "int8")
    step = np.abs(kernel).max() / 127
    codes = np.asarray(whole.codes, int)
    assert (
        np.abs(codes - kernel / step).max() < 0.5 + 1e-4 and np.abs(codes).max() == 127
    )


SHAPES = [(3, 128, 12), (3, 8, 2, 8, 12), (3, 4, 32, 12), (3, 8, 16, 3, 4)]
SHAPES += [(3, 64, 2, 12), (3, 8, 16, 1, 12), (24, 192)]


@pytest.mark.parametrize(("kind", "group"), GROUPED)
def test_what_moves_the_codes_moves_the_values(kind, group):
    x, order = normal(3, 8, 16, 12), (2, 0, 3, 1)
    factors = [
        normal(*(n if i == k else 1 for i, n in enumerate(x.shape))) for k in range(4)
    ]
    pick = lambda a, i: jnp.moveaxis(jnp.take(a, jnp.array([1, 0]), axis=i), i, 0)
    times = lambda a, b: a * b

    @jax.jit
    def moved(x):
        q = codes_of(x, kind, (1, 2), group)
        each = [q, *map(q.reshape, SHAPES), q.transpose(order)]
        each += [q.along(axis, pick) for axis in range(4)]
        each += [q.scaled(factor, times) for factor in factors]
        return [one.dequantise() for one in each]

    values, *found = moved(x)
    expected = [*map(values.reshape, SHAPES), values.transpose(order)]
    expected += [np.moveaxis(np.take(values, [1, 0], i), i, 0) for i in range(4)]
    expected += [values * factor for factor in factors]
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    # Control: groups that a reshape leaves whole keep their one scale.
    if group == 64:
        whole = codes_of(x, kind, (1, 2), group).reshape((3, 128, 12))
        assert whole.scale.shape[1] == (1 if kind == "int8" else 2)


def test_linear_kernels_are_chosen_and_others_stay(params):
    found = jp.quantise(params, "nf4")
    kinds = {p: x.dtype for p, x in flat(found).items() if p.endswith("codes")}
    assert list(kinds) == ["query/kernel/codes", "up/kernel/codes"]
    table = jp.quantise(params, "int8", ["embed", "router"])
    assert table["embed"]["embedding"].scale.shape == (12, 1)  # of rows
    assert table["router"]["kernel"].scale.shape == (1, 3)
    again = jax.eval_shape(lambda p: jp.quantise(p, "nf4"), params)
    assert jax.tree.structure(again) == jax.tree.structure(found)
    assert jp.count(jp.attach(found, jp.lora(2), ["query"], key=jax.random.key(0))) == (
        2 * (64 + 48),
        sum(x.size for x in jax.tree.leaves(params)) + 2 * (64 + 48),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(kind="fp4"), r"`kind` must be one of int8, int4, nf4, got 'fp4'"),
        (dict(group=1), r"`group` must be an integer from 2 on, got 1"),
        (dict(targets=["quary"]), r"`targets` entry 'quary' matched none"),
        (dict(group=96), r"groups of 96 do not divide its 128 along in"),
        (dict(targets=["query"], group=128), r"its 64 entries along in are fewer than"),
        (dict(targets=["norm"]), r"'norm' matched none"),
        (dict(axes="layer in out"), r"`axes` is 'layer in out', which says of no"),
    ],
)
def test_what_cannot_be_quantised_is_named(params, arguments, words):
    with pytest.raises(ValueError, match=words):
        jp.quantise(params, **arguments)


def test_quantising_twice_is_refused(params):
    once = jp.quantise(params, "nf4", ["query"])
    with pytest.raises(ValueError, match="'query/kernel' is quantised already, as nf4"):
        jp.quantise(once, "int8", ["query"])
    with pytest.raises(ValueError, match="'kernel' has shape .*axes="):
        jp.quantise(normal(2, 64, 8), "int8")
    alone = jp.quantise(normal(2, 64, 8), "int8", axes="layer in out")
    assert alone.scale.shape == (2, 1, 8) and alone.roles == ("batch", "in", "out")


def test_it_is_no_array(params):
    once = jp.quantise(params, "nf4", ["query"])
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match="jaxpeft.adapt"):
            convert(once["query"]["kernel"])
    with pytest.raises(TypeError, match="dequantise"):
        once["query"]["kernel"].astype(jnp.int8)


def test_merge_gives_floats_and_never_integers(params):
    base = jp.quantise(params, "nf4")
    adapted = jp.attach(base, jp.lora(4), ["query"], key=jax.random.key(0))
    node = adapted["query"]["kernel"]
    b = 0.3 * normal(4, 48, seed=7)
    adapted["query"]["kernel"] = node.replace(trainable=node.trainable | {"b": b})
    a, scale = node.trainable["a"], node.frozen["scale"]
    expected = node.base.dequantise() + scale * (a @ b)
    merged = jp.merge(adapted)
    np.testing.assert_allclose(merged["query"]["kernel"], expected, atol=1e-5)
    assert np.array_equal(merged["up"]["kernel"], base["up"]["kernel"].dequantise())
    half = jp.merge(adapted, jnp.bfloat16)
    assert half["query"]["kernel"].dtype == half["up"]["kernel"].dtype == jnp.bfloat16
    assert np.array_equal(
        half["query"]["kernel"], merged["query"]["kernel"].astype("bfloat16")
    )
    assert half["norm"]["scale"].dtype == jnp.float32
    with pytest.warns(
        UserWarning, match=r"`requantise`: .* \d+% is lost .* 'query/kernel'"
    ):
        again = jp.merge(adapted, requantise=True)
    assert again["query"]["kernel"].kind == "nf4"
    assert np.array_equal(again["up"]["kernel"].codes, base["up"]["kernel"].codes)
    off = jnp.linalg.norm(again["query"]["kernel"].dequantise() - expected)
    assert off < 0.12 * jnp.linalg.norm(expected)
    with pytest.raises(ValueError, match="`dtype` must be a floating dtype, got int8"):
        jp.merge(adapted, jnp.int8)
    with pytest.raises(ValueError, match="exclude each other"):
        jp.merge(adapted, jnp.float32, requantise=True)


def test_integers_without_a_scale_are_no_base(params):
    """Rounding `W + a b` to them would lose the adapter, and said nothing."""
    adapted = jp.attach(params, jp.lora(2), ["query"], key=jax.random.key(0))
    whole = lambda w: jnp.round(8 * w).astype(jnp.int8)
    node = adapted["query"]["kernel"]
    adapted["query"]["kernel"] = node.replace(base=whole(node.base))
    with pytest.raises(
        ValueError, match="'query/kernel' has a kernel of int8 without a"
    ):
        jp.merge(adapted)
    ints = params | {"query": {"kernel": whole(node.base), "bias": jnp.zeros(48)}}
    adapter = jp.extract(
        jp.attach(params, jp.lora(2), ["query"], key=jax.random.key(0))
    )
    with pytest.raises(ValueError, match="'query/kernel' is int8"):
        jp.graft(ints, adapter)


def test_a_method_that_folds_may_come_first(params):
    """The start is taken from the floats, and the residual is what is quantised."""
    adapted = jp.attach(params, FOLDS, ["query"], key=jax.random.key(0))
    late = jp.quantise(adapted, "nf4", ["query"])
    left = adapted["query"]["kernel"].base
    assert np.array_equal(
        late["query"]["kernel"].base.codes, jp.quantise(left, "nf4").codes
    )
    with pytest.warns(UserWarning, match="folding into a nf4 kernel rounds.*quantise"):
        jp.attach(jp.quantise(params, "nf4"), FOLDS, ["query"], key=jax.random.key(0))
