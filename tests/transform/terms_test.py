"""Sums of terms: they become one product, and none is forgotten."""

import re

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import distance, gate, numbers, pieces
from jax.tree_util import Partial

import jaxpeft as jp
from jaxpeft import hlo
from jaxpeft.tree import Adapter, Factors, Gate, Rows, Term, map_axes, method
from jaxpeft.tree._bound import bind

X = numbers(4, 6, seed=2)
PARAMS = {"w": numbers(6, 5, seed=1)}


@method
def several(kinds: str = "", dropout: float = 0.0) -> Adapter:
    """A term for each letter: "p" plain, "d" with dropout, "g" gated."""

    def init(key, kernel, rank, alpha):
        (d_in, d_out), leaves = kernel.shape, {}
        for i, one in enumerate(jax.random.split(key, len(kinds))):
            shapes = (d_in, 2 + i), (2 + i, d_out), (d_in, 2 + i)
            names = f"a{i}", f"b{i}", f"w{i}"
            leaves |= dict(zip(names, pieces(one, *shapes), strict=True))
        return {}, leaves

    def factors(kernel, frozen, t, call):
        terms = []
        for i, kind in enumerate(kinds):
            between = Gate(t[f"w{i}"], Partial(gate)) if kind == "g" else None
            drop = dropout if kind == "d" else 0.0
            terms.append(Term(t[f"a{i}"], t[f"b{i}"], drop=drop, gate=between))
        return Factors(tuple(terms))

    return Adapter(init, factors)


def attached(kinds, **options):
    return jp.attach(PARAMS, several(kinds, **options), ["w"], key=jax.random.key(3))


def use(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    "kinds, products",
    [  # one reads the input for all, one writes for all
        ("", 1),
        ("p", 3),
        ("ppp", 3),
        ("gpp", 3),
        ("pgp", 3),
        ("dpgpd", 3),
    ],
)
def test_every_term_is_added_and_all_are_one_product(kinds, products):
    adapted = attached(kinds)
    t, y = adapted["w"].trainable, use(PARAMS, X)
    for i, kind in enumerate(kinds):
        h = X @ t[f"a{i}"]
        h = gate(X @ t[f"w{i}"], h) if kind == "g" else h
        more = h @ t[f"b{i}"]
        assert distance(y + more, y) > 1e-2
        y = y + more
    assert distance(jp.adapt(use)(adapted, X), y) < 1e-6
    assert jp.mergeable(adapted) == ("g" not in kinds)
    if jp.mergeable(adapted):
        assert distance(use(jp.merge(adapted), X), y) < 1e-6
    text = str(jax.make_jaxpr(jp.adapt(use, target="cpu"))(adapted, X))
    assert text.count("dot_general") == products
    if not kinds:
        assert bind(adapted["w"]) is adapted["w"].base


def test_terms_under_dropout_stay_apart():
    """Those that drop, and those that do not, read another input."""
    adapted = attached("dpgpd", dropout=0.5)
    on = jp.with_dropout(adapted, jax.random.key(5))
    assert [t.drop for t in bind(on["w"]).terms] == [0.5, 0.0, 0.0, 0.0, 0.5]
    assert [t.drop for t in bind(adapted["w"]).terms] == [0.0] * 5
    t = adapted["w"].trainable
    still = sum(X @ t[f"a{i}"] @ t[f"b{i}"] for i in (1, 3))
    still = still + gate(X @ t["w2"], X @ t["a2"]) @ t["b2"] + use(PARAMS, X)
    without = {n: jnp.zeros_like(x) if n in ("b0", "b4") else x for n, x in t.items()}
    quiet = {"w": on["w"].replace(trainable=without)}
    assert distance(jp.adapt(use)(quiet, X), still) < 1e-6
    assert distance(jp.adapt(use)(on, X), jp.adapt(use)(adapted, X)) > 1e-2


def test_terms_are_joined_a_layer_at_a_time_and_what_is_frozen_has_no_gradient():
    """Joined stacks would lie beside the leaves of all layers, and their gradients."""
    layers = {"w": numbers(3, 6, 7, seed=4)}
    site = dict(targets=["w"], axes={"w": "layer in out"}, key=jax.random.key(1))
    adapted = jp.attach(layers, several("pp"), **site)

    def scanned(params, x):
        step = lambda x, w: (x + jnp.sum(jnp.tanh(x @ w)), None)
        return jnp.sum(jax.lax.scan(step, x, params["w"])[0])

    f = jp.adapt(scanned, target="cpu")
    assert "[3,6,5]" not in str(jax.make_jaxpr(f)(adapted, X)).partition("scan")[0]
    trainable = adapted["w"].trainable

    def gradient(*names):
        def loss(own):
            return f({"w": adapted["w"].replace(trainable=trainable | own)}, X)

        return jax.grad(loss), {name: trainable[name] for name in names}

    grad, own = gradient("a0", "b0")
    every, whole = gradient("a0", "b0", "a1", "b1")
    found, wanted = grad(own), every(whole)
    assert all(distance(found[name], wanted[name]) < 1e-6 for name in own)
    flops = lambda f, x: hlo.traced_flops(jax.make_jaxpr(f)(x))
    fewer = 3 * 2 * len(X) * 3 * 7  # of each layer the gradient of b1 [3, 7]
    assert flops(every, whole) - flops(grad, own) >= fewer


def test_terms_read_an_input_before_its_kernels_do():
    """So the kernels' own gradients of it are added up side by side."""
    params = {"w": PARAMS["w"], "v": numbers(6, 4, seed=5)}
    adapted = jp.attach(params, jp.lora(rank=2), ["w", "v"], key=jax.random.key(3))
    both = lambda p, x: (x @ p["w"], x @ p["v"])
    text = str(jax.make_jaxpr(jp.adapt(both, target="cpu"))(adapted, X))
    made = re.findall(r"f32\[4,(\d+)\] = dot_general", text)
    assert made[:2] == ["4", "5"] and sorted(made[2:]) == ["4", "4", "5"]


def test_axes_are_declared_once_on_the_fields():
    """And every array of a record is reached, with the axes of its field."""
    x = jnp.zeros(())
    gates = Gate(x, Partial(gate, x), Partial(gate, x), names=("one",))
    rows = Term(x, x, rows=Rows(x, x))
    factors = Factors((Term(x, x, gate=gates), rows), c=x, o=x, kernel=x)
    named = map_axes(lambda _, axes: axes, factors)
    assert named.terms[0].a == ("in", "rank") and named.terms[0].b == ("rank", "out")
    assert named.terms[0].gate.reads == ("in", "rank")
    assert named.terms[1].a == ("slot", "in", "rank")
    assert named.terms[1].b == ("slot", "rank", "out")
    assert (named.c, named.o, named.kernel) == (("in",), ("out",), ("in", "out"))
    seen = []
    map_axes(lambda leaf, axes: seen.append(leaf), factors)
    assert len(seen) == len(jax.tree.leaves(factors)) == 12
