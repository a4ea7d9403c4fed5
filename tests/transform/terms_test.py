"""Sums of terms: which become one product, and that none is forgotten."""

import jax
import jax.numpy as jnp
import pytest
from adapt_toolbox import distance, gate, numbers, pieces
from jax.tree_util import Partial

import jaxpeft as jp
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
    "kinds, bound",
    [
        ("", None),
        ("p", 1),
        ("ppp", 1),
        ("gpp", 2),
        ("pgp", 2),
        ("dpgpd", 2),
    ],
)
def test_every_term_is_added_and_plain_ones_are_one_product(kinds, bound):
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
    made = bind(adapted["w"])
    assert (len(made.terms) if bound else bound) == bound  # no terms: a plain array


def test_terms_under_dropout_stay_apart():
    """Those that drop, and those that do not, read another input."""
    adapted = attached("dpgpd", dropout=0.5)
    on = jp.with_dropout(adapted, jax.random.key(5))
    assert [t.drop for t in bind(on["w"]).terms] == [0.5, 0.0, 0.0, 0.5]
    assert [t.drop for t in bind(adapted["w"]).terms] == [0.0, 0.0]
    t = adapted["w"].trainable
    still = sum(X @ t[f"a{i}"] @ t[f"b{i}"] for i in (1, 3))
    still = still + gate(X @ t["w2"], X @ t["a2"]) @ t["b2"] + use(PARAMS, X)
    without = {n: jnp.zeros_like(x) if n in ("b0", "b4") else x for n, x in t.items()}
    quiet = {"w": on["w"].replace(trainable=without)}
    assert distance(jp.adapt(use)(quiet, X), still) < 1e-6
    assert distance(jp.adapt(use)(on, X), jp.adapt(use)(adapted, X)) > 1e-2


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
