"""What has no rule: the error names site, primitive and line; the way out works."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import (
    CLOSE,
    FAR,
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

D, F = 12, 20


@jax.custom_vjp
def own_matmul(x, w):
    return x @ w


own_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g)
)


@jax.custom_jvp
def own_product(x, w):
    return x @ w


own_product.defjvp(
    lambda primals, tangents: (
        primals[0] @ primals[1],
        tangents[0] @ primals[1] + primals[0] @ tangents[1],
    )
)


def custom_vjp(p, x):
    return own_matmul(x, p["w"])


def custom_jvp(p, x):
    return own_product(x, p["w"])


def concatenation(p, x):
    stack = jnp.concatenate([p["w"][None], p["w"][None]])
    return x @ stack[1]


def weight_norm(p, x):
    norm = jnp.sqrt(jnp.sum(p["w"] * p["w"], 0, keepdims=True))
    return x @ (p["w"] / norm)


def square_penalty(p, x):
    return x @ p["w"] + jnp.sum(p["w"] ** 2)


def elementwise(p, x):
    return x @ jnp.tanh(p["w"])


def mixing_reshape(p, x):
    return x.reshape(5, 2, 6)[:, 0] @ p["w"].reshape(6, 40)


def wrong_axis(p, x):
    return jnp.einsum("td,df->t", x, p["w"])


def scan_over_in(p, x):
    step = lambda s, row: (s + row[1] * row[0], None)
    return lax.scan(step, 0.0 * x[0, 0] * jnp.ones(F), (x[0], p["w"]))[0]


def changed_in_the_carry(p, x):
    step = lambda c, _: ((jnp.flip(c[0]), c[1] + c[1] @ c[0][:, :D]), None)
    return lax.scan(step, (p["w"], x), None, 2)[0][1]


def two_weights_meet(p, x):
    return x @ (p["w"] @ p["w"].T)


def the_weight_itself(p, x):
    return {"y": x @ p["w"], "w": p["w"].T}


# function: (primitives, parts of the line); "|" between what is as good
CASES = {
    custom_vjp: ("custom_vjp_call", "own_matmul(x"),
    custom_jvp: ("custom_jvp_call", "own_product(x"),
    concatenation: ("concatenate", "jnp.concatenate"),
    weight_norm: ("square|mul|integer_pow", "jnp.sum"),
    square_penalty: ("square|integer_pow", "jnp.sum"),
    elementwise: ("tanh", "jnp.tanh"),
    mixing_reshape: ("reshape", "p["),
    wrong_axis: ("reduce_sum|dot_general", "jnp.einsum"),
    scan_over_in: ("mul|scan", "lax.scan|step ="),
    changed_in_the_carry: ("scan", "lax.scan"),
    two_weights_meet: ("dot_general", "p["),
}


@pytest.fixture
def params():
    return {"w": numbers(D, F, seed=1, scale=0.3)}


@pytest.fixture
def x():
    return numbers(5, D)


@pytest.mark.parametrize("fn", CASES, ids=lambda f: f.__name__)
def test_error_names_site_primitive_and_line(fn, params, x, keys):
    adapted = prepare(params, pair(), ["w"], keys)
    primitive, code = CASES[fn]
    with pytest.raises(jp.UnsupportedError) as caught:
        jp.adapt(fn)(adapted, x)
    message = str(caught.value)
    assert "site 'w'" in message
    assert any(f"`{name}`" in message for name in primitive.split("|")), message
    lines, first = inspect.getsourcelines(fn)
    places = [
        f"adapt_errors_test.py:{first + i}"
        for i, line in enumerate(lines)
        if any(part in line for part in code.split("|"))
    ]
    assert places and any(place in message for place in places), (message, places)
    assert "exclude" in message and 'unsupported="materialise"' in message
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("fn", CASES, ids=lambda f: f.__name__)
def test_materialise_warns_and_equals_merge(fn, params, x, keys):
    adapted = prepare(params, everything(), ["w"], keys)
    call = jp.adapt(fn, unsupported="materialise")
    with pytest.warns(UserWarning, match=r"site 'w' reaches .*adapt_errors_test\.py:"):
        got, got_grads, _ = run_with_gradients(call, adapted, [x])
    merged = lambda tree, x: fn(jp.merge(tree), x)
    expected, expected_grads, _ = run_with_gradients(merged, adapted, [x])
    assert distance(got, expected) < CLOSE
    assert distance(got_grads, expected_grads) < CLOSE
    assert distance(fn(params, x), expected) > FAR  # control


def test_no_warning_where_every_use_has_a_rule(params, x, keys):
    adapted = prepare(params, pair(), ["w"], keys)
    call = jp.adapt(lambda p, x: x @ p["w"], unsupported="materialise")
    call(adapted, x)  # warnings are errors


def test_materialise_only_where_it_must(params, x, keys):
    """The regular use of the same weight keeps its two thin matmuls."""
    adapted = prepare(params, pair(), ["w"], keys)
    call = jp.adapt(square_penalty, unsupported="materialise")
    with pytest.warns(UserWarning, match="site 'w'"):
        text = str(jax.make_jaxpr(call)(adapted, x))
    assert "f32[5,3]" in text  # x @ a


def test_a_method_that_reads_the_input_cannot_be_materialised(params, x, keys):
    """And is not told to: the advice is what works."""
    adapted = prepare(params, gated(), ["w"], keys)
    for fn in (elementwise, lambda p, x: p["w"][jnp.asarray([1, 2])]):
        for way in ("error", "materialise"):
            with pytest.raises(jp.UnsupportedError, match="depends on the input") as e:
                jp.adapt(fn, unsupported=way)(adapted, x)
            message = str(e.value)
            assert "site 'w'" in message and "exclude" in message
            assert 'unsupported="materialise"' not in message


def test_what_has_only_an_effect_is_not_dropped(params, x, keys, capfd):
    """A print of a weight has no result that anyone could miss."""
    adapted = prepare(params, pair(), ["w"], keys)

    def fn(p, x):
        jax.debug.print("printed {}", p["w"])
        return x @ p["w"]

    with pytest.raises(jp.UnsupportedError, match="site 'w' reaches `debug"):
        jp.adapt(fn)(adapted, x)
    with pytest.warns(UserWarning, match="site 'w'"):
        jax.block_until_ready(jp.adapt(fn, unsupported="materialise")(adapted, x))
    jax.effects_barrier()
    assert "printed" in capfd.readouterr().out


def test_a_kernel_that_comes_back_is_its_node(params, x, keys):
    """``mutable=True`` and NNX hand the parameters back."""
    adapted = prepare(params, pair(), ["w"], keys)
    _, back = jp.adapt(lambda p, x: (x @ p["w"], p))(adapted, x)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)
    for one, other in zip(*map(jax.tree.leaves, (back, adapted)), strict=True):
        assert np.array_equal(one, other)


def test_a_changed_weight_as_a_result(params, x, keys):
    """There is no array to hand out; merged it can be."""
    adapted = prepare(params, pair(), ["w"], keys)
    with pytest.raises(jp.UnsupportedError, match="site 'w'.*returns the kernel"):
        jp.adapt(the_weight_itself)(adapted, x)
    with pytest.warns(UserWarning, match="site 'w'"):
        got = jp.adapt(the_weight_itself, unsupported="materialise")(adapted, x)
    assert distance(got, the_weight_itself(jp.merge(adapted), x)) < CLOSE


def test_inside_a_scan_the_line_is_the_models(params, x, keys):
    stack = {"w": numbers(2, D, D, seed=1, scale=0.3)}
    adapted = prepare(stack, pair(), ["w"], keys, axes={"w": "layer in out"})

    def fn(p, x):
        def layer(x, w):
            return x @ (w / jnp.linalg.norm(w)), None

        return lax.scan(layer, x, p["w"])[0]

    line = inspect.getsourcelines(fn)[1] + 2
    match = rf"site 'w' reaches .*adapt_errors_test\.py:{line}"
    with pytest.raises(jp.UnsupportedError, match=match):
        jp.adapt(fn)(adapted, x)
    with pytest.warns(UserWarning, match=match):
        got = jp.adapt(fn, unsupported="materialise")(adapted, x)
    assert distance(got, fn(jp.merge(adapted), x)) < CLOSE


def test_a_scan_over_an_in_axis_names_the_roles(x, keys):
    """Forgotten layer axis: the roles say in, the loop says layer."""
    stack = {"w": numbers(D, D, D, seed=1, scale=0.3)}
    adapted = prepare(stack, pair(), ["w"], keys, axes={"w": "in in out"})
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    with pytest.raises(jp.UnsupportedError, match="layer in out"):
        jp.adapt(fn)(adapted, x)


def test_the_models_own_errors_come_through(params, keys):
    adapted = prepare(params, pair(), ["w"], keys)
    with pytest.raises(TypeError, match="dot_general|matmul"):
        jp.adapt(lambda p, x: x @ p["w"])(adapted, jnp.ones((5, D + 1)))


@pytest.mark.parametrize("word", ["ignore", "", None], ids=str)
def test_unsupported_is_one_of_two_words(word):
    with pytest.raises((ValueError, TypeError), match="unsupported"):
        jp.adapt(lambda p: p, unsupported=word)


def test_adapt_takes_a_function(params):
    with pytest.raises(TypeError, match="fn"):
        jp.adapt(params)
