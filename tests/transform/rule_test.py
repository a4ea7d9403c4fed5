"""Rules from outside of the package, for primitives that only their owner knows."""

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import check, everything, gated, numbers, pair, prepare
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jaxpeft as jp
from jaxpeft.transform import NoRule, contract, look_up, rule


def primitive(name, compute):
    """A primitive that is ``compute``, also for whoever differentiates it."""
    own = Primitive(name)
    own.def_impl(compute)

    def shape(*avals, **params):
        out = jax.eval_shape(lambda *xs: compute(*xs, **params), *avals)
        return jax.core.ShapedArray(out.shape, out.dtype)

    own.def_abstract_eval(shape)
    mlir.register_lowering(own, mlir.lower_fun(compute, multiple_results=False))

    def jvp(primals, tangents, **params):
        tangents = tuple(map(ad.instantiate_zeros, tangents))
        y = own.bind(*primals, **params)
        return y, jax.jvp(lambda *xs: compute(*xs, **params), primals, tangents)[1]

    ad.primitive_jvps[own] = jvp
    return own


# Kernel first and [out, in], as some libraries of kernels have it.
MATMUL = primitive("outside_matmul", lambda w, x, *, scale: scale * (x @ w.T))
FLIP = primitive("outside_flip", lambda w: jnp.flip(w, 0))
ROWS = primitive("outside_rows", lambda table, ids: table[jnp.abs(ids)])


@rule("outside_matmul")
def _matmul(eqn, w, x):
    run = lambda x, base: eqn.run(base, x) / eqn.params["scale"]
    y = contract(eqn, w, x, (((x.ndim - 1,), (1,)), ((), ())), run)
    return eqn.params["scale"] * y


@rule("outside_flip", moves=True)
def _flip(eqn, w):
    return w.along(0, lambda x, axis: jnp.flip(x, axis))


@rule("outside_rows")
def _rows(eqn, table, ids):
    take = lambda x, axis: jnp.take(x, jnp.abs(ids), axis).swapaxes(0, axis)
    return look_up(eqn, table, 0, take, ids.ndim)


CASES = {
    "matmul": (lambda p, x: MATMUL.bind(p["w"], x, scale=2.0), "out in"),
    "moved": (lambda p, x: x @ FLIP.bind(FLIP.bind(p["w"])[:, ::2].T), "out in"),
    "rows": (lambda p, x: jnp.sin(ROWS.bind(p["w"], jnp.asarray([3, -1]))), "in out"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_from_outside(name, keys):
    """Values, gradients, roles, and no array of the kernel's shape on the way."""
    fn, roles = CASES[name]
    x = numbers(5, 6 if name == "moved" else 12)
    w = numbers(20, 12, seed=1, scale=0.3)
    flips = ("reverse", "slice") if name == "moved" else ()
    check(fn, {"w": w}, x, sites={"w": roles}, keys=keys, allow=flips)


def test_what_only_moves_does_not_part_kernels_that_read_one_input(keys):
    """Two kernels share one down-projection behind moves that the library knows not."""
    params = {"q": numbers(20, 12), "k": numbers(16, 12, seed=1)}
    adapted = prepare(
        params, pair(), ["q", "k"], keys, axes=dict.fromkeys("qk", "out in")
    )
    fn = lambda p, x: (x @ FLIP.bind(p["q"]).T, x @ FLIP.bind(p["k"]).T)
    text = str(jax.make_jaxpr(jp.adapt(fn))(adapted, numbers(5, 12)))
    assert text.count("f32[5,6]") == 1 and text.count("dot_general") == 5


def test_a_rule_may_refuse(keys):
    own = primitive("outside_refusal", lambda w: w + 1.0)

    @rule("outside_refusal")
    def refuse(eqn, w):
        raise NoRule("one is added to it")

    adapted = prepare({"w": numbers(12, 20)}, everything(), ["w"], keys)
    fn = lambda p, x: x @ own.bind(p["w"])
    with pytest.raises(jp.UnsupportedError, match="`outside_refusal`.*one is added"):
        jp.adapt(fn)(adapted, numbers(5, 12))


def test_the_roles_are_checked_and_gates_refuse(keys):
    fn = CASES["matmul"][0]
    adapted = prepare({"w": numbers(20, 12)}, gated(), ["w"], keys)
    with pytest.raises(jp.UnsupportedError, match="used transposed"):
        jp.adapt(fn)(adapted, numbers(5, 12))


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match=r"'outside_rows'.*rule_test\._rows;.*second"):

        @rule("outside_new", "outside_rows")
        def second(eqn, w):
            return w

    assert "outside_new" not in jp.transform.rules.RULES  # none, or all of them
    rule("outside_rows")(_rows)  # the same function again, as in a notebook


def test_the_librarys_own_rules_are_not_replaced():
    with pytest.raises(ValueError, match=r"'dot_general' has a rule already, jaxpeft"):
        rule("dot_general")(_matmul)


def test_primitives_are_named():
    with pytest.raises(TypeError, match="primitives.*outside_rows"):
        rule(ROWS)
