"""Stages and domains: what moves, what keeps its bytes, and which order is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapt_toolbox import distance, numbers, perturb

import jaxpeft as jp
from jaxpeft import mixtures

D, L = 6, 2
TWO = ("law", "code")
AXES = {"w": "layer in out"}


pytestmark = pytest.mark.usefixtures("quick_compiles")


def net(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


X, Y = numbers(2, 4, D, seed=7), numbers(2, 4, D, seed=8)


@functools.cache
def fresh(name, domains=TWO):
    adapter = getattr(jp, name)(domains, rank=2, rank_universal=3)
    run = lambda p, k: jp.attach(p, adapter, ["w"], key=k, axes=AXES)
    params = {"w": numbers(L, D, D, seed=1, scale=0.3)}
    return jax.jit(run)(params, jax.random.key(0))


@functools.cache
def grown(name):
    """All leaves away from where they start, as if every stage had run."""
    return perturb(fresh(name), scale=0.4)


def train(adapted, steps, decay=0.1):
    trainable, frozen = jp.partition(adapted)
    optimizer = optax.adamw(1e-2, weight_decay=decay)

    def loss(t, f):
        return jnp.mean((jp.adapt(net)(jp.combine(t, f), X) - Y) ** 2)

    @jax.jit
    def run(t, f):
        def step(carry, _):
            t, state = carry
            value, g = jax.value_and_grad(loss)(t, f)
            updates, state = optimizer.update(g, state, t)
            return (optax.apply_updates(t, updates), state), value

        state = optimizer.init(t)
        assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(t)) + 1
        (t, _), values = jax.lax.scan(step, (t, state), None, steps)
        return t, values

    with jax.numpy_dtype_promotion("standard"):
        trainable, values = run(trainable, frozen)
    assert values[-1] < values[0]
    return jp.combine(trainable, frozen)


def prints(adapted):
    """The bytes of every leaf, by the leaf's own name."""
    leaves = jp.tree.flat(adapted)
    return {n.removeprefix("w/"): np.asarray(x).tobytes() for n, x in leaves.items()}


def moved(before, after):
    a, b = prints(before), prints(after)
    assert a.keys() == b.keys()
    return {n for n in a if a[n] != b[n]}


@pytest.mark.parametrize("name", ["modula_flan", "modula_res"])
def test_each_stage_moves_its_own_leaves_alone(name):
    """AdamW with weight decay for 200 steps; everything else keeps its bytes."""
    tree = fresh(name)
    routed = ("law", "code") + (("universal",) if name == "modula_flan" else ())
    pairs = lambda *names: {f"{k}.{n}" for n in names for k in "ab"}
    stages = {
        "universal": pairs("universal"),
        "domain:law": pairs("law"),
        "domain:code": pairs("code"),
        "router": {f"router.{n}" for n in routed},
    }
    for stage, expected in stages.items():
        begun = mixtures.stage(tree, stage)
        assert moved(tree, begun) == set()
        tree = train(begun, 200 if stage == "domain:code" else 20)
        assert moved(begun, tree) == expected, stage
    # A domain trained alone, elsewhere, has the same leaves: order does not matter.
    first = mixtures.stage(fresh(name), "universal")
    universal = train(first, 20)
    code = train(mixtures.stage(universal, "domain:code"), 200)
    assert all(prints(code)[n] == prints(tree)[n] for n in pairs("code"))


def test_the_wrong_order_is_refused():
    res, flan = fresh("modula_res"), fresh("modula_flan")
    with pytest.raises(ValueError, match=r"no gradient.*\['w'\].*train stage 'univ"):
        mixtures.stage(res, "domain:law")
    half = mixtures.stage(grown("modula_res"), "domain:law")
    b = half["w"].frozen["b.universal"]
    one_layer = {"b.universal": b.at[1].set(0.0)}
    half = {"w": half["w"].replace(frozen=half["w"].frozen | one_layer)}
    with pytest.raises(ValueError, match="one layer at least"):
        mixtures.stage(half, "domain:code")
    with pytest.raises(ValueError, match=r"route to \['law', 'code'\].*never trained"):
        mixtures.stage(flan, "router")
    lone = mixtures.remove_domain(grown("modula_res"), "code")
    with pytest.raises(ValueError, match="two experts to choose from, and there is 1"):
        mixtures.stage(lone, "router")
    with pytest.raises(ValueError, match=r"universal, router, domain:law.*'domain:x'"):
        mixtures.stage(flan, "domain:x")
    node = grown("modula_flan")["w"]
    zero = {"b.universal": jnp.zeros_like(node.trainable["b.universal"])}
    node = node.replace(trainable=node.trainable | zero)
    with pytest.warns(UserWarning, match="universal expert was never trained"):
        mixtures.stage({"w": node}, "router")
    with pytest.raises(ValueError, match="traced; begin a stage outside of jit"):
        jax.eval_shape(lambda t: mixtures.stage(t, "router"), flan)
    with pytest.raises(ValueError, match="no site with domains"):
        mixtures.stage(jp.attach({"w": X[0]}, jp.lora(1), ["w"], key=K), "router")


K = jax.random.key(3)


def test_a_universal_expert_trained_again_leaves_domains_stale():
    tree = grown("modula_res")
    with pytest.raises(
        ValueError, match=r"\['law', 'code'\] were trained.*allow_stale"
    ):
        mixtures.stage(tree, "universal")
    tree = mixtures.stage(tree, "universal", allow_stale=True)
    with pytest.raises(ValueError, match=r"\['law', 'code'\].*domain:law"):
        mixtures.stage(tree, "router")
    tree = mixtures.stage(tree, "domain:law")
    with pytest.raises(ValueError, match=r"\['code'\] were trained behind"):
        mixtures.stage(tree, "router")
    mixtures.stage(tree, "router", allow_stale=True)
    mixtures.stage(mixtures.stage(tree, "domain:code"), "router")
    mixtures.stage(grown("modula_flan"), "universal")  # nothing stands behind it


def test_the_unguarded_gradient_is_exactly_zero():
    node = grown("modula_res")["w"]
    zero = {"b.universal": jnp.zeros_like(node.trainable["b.universal"])}
    tree = {"w": node.replace(trainable=node.trainable | zero)}
    trainable, frozen = jp.partition(tree)
    f = lambda t: jnp.sum(jp.adapt(net)(jp.combine(t, frozen), X) ** 2)
    g = jax.jit(jax.grad(f))(trainable)["w"].trainable
    dead = {n for n, x in g.items() if not np.any(x)}
    assert dead >= {f"{k}.{d}" for k in ("a", "b", "router") for d in TWO} | {
        "a.universal"
    }
    assert np.any(g["b.universal"])


# --- domains ---


@pytest.mark.parametrize("name", ["modula_flan", "modula_res"])
def test_a_domain_comes_and_goes(name):
    before = mixtures.stage(grown(name), "router")
    forward = jp.adapt(net)
    added = mixtures.add_domain(before, "new", key=K)
    own = {f"{kind}.new" for kind in ("a", "b", "router")}
    assert prints(added).keys() - prints(before).keys() == own
    assert prints(before).items() <= prints(added).items()
    assert np.array_equal(forward(added, X), forward(before, X))  # not routed yet
    fixed = [mixtures.fix_gates(t, {"law": 1.0}) for t in (before, added)]
    assert np.array_equal(*(forward(t, X) for t in fixed))
    trained = train(mixtures.stage(added, "domain:new"), 3)
    assert moved(added, trained) == {"a.new", "b.new"}
    # At once with all others it is routed to from the start: it would not learn else.
    assert not dict(mixtures.stage(added, "all")["w"].adapter.options)["inactive"]
    routed = mixtures.stage(trained, "router")
    assert distance(forward(routed, X), forward(before, X)) > 1e-4
    gone = mixtures.remove_domain(routed, "new")
    assert prints(gone) == prints(before)
    assert gone["w"].adapter is before["w"].adapter
    # The same key and name draw the same leaves, whatever else there is.
    alone = mixtures.add_domain(mixtures.remove_domain(before, "law"), "new", key=K)
    assert all(prints(alone)[n] == prints(added)[n] for n in own)
    again = mixtures.stage(
        trained, "router", router_init="reset", key=jax.random.key(9)
    )
    assert moved(routed, again) == set(again["w"].trainable)
    renamed = mixtures.rename_domain(routed, "law", "tax")
    assert jp.tree.structure_of(renamed["w"]).experts == (
        "universal",
        "tax",
        "code",
        "new",
    )
    assert np.array_equal(forward(renamed, X), forward(routed, X))
    back = mixtures.rename_domain(renamed, "tax", "law")
    assert prints(back) == prints(routed) and back["w"].adapter is routed["w"].adapter


def test_names_that_are_taken_unknown_or_not_possible():
    tree = grown("modula_flan")
    with pytest.raises(ValueError, match="has a domain 'law' already"):
        mixtures.add_domain(tree, "law", key=K)
    with pytest.raises(ValueError, match="cannot be named 'universal'"):
        mixtures.add_domain(tree, "universal", key=K)
    with pytest.raises(ValueError, match=r"'x' is no domain.*\['law', 'code'\]"):
        mixtures.remove_domain(tree, "x")
    with pytest.raises(ValueError, match="letters, digits"):
        mixtures.rename_domain(tree, "law", "la w")


@pytest.mark.parametrize("name", ["modula_flan", "modula_res"])
def test_a_domain_goes_through_a_file(name, tmp_path):
    tree = mixtures.stage(grown(name), "router")
    file = mixtures.export_domain(tree, "code", tmp_path / "code.npz")
    with pytest.raises(FileExistsError, match="choose another name"):
        mixtures.export_domain(tree, "code", file)
    without = mixtures.remove_domain(tree, "code")
    again = mixtures.stage(mixtures.import_domain(without, file), "router")
    assert prints(again) == prints(tree)
    assert again["w"].adapter is tree["w"].adapter
    named = mixtures.import_domain(tree, file, name="copy")
    leaves = named["w"].frozen | named["w"].trainable
    assert np.array_equal(leaves["b.copy"], leaves["b.code"])
    with pytest.raises(ValueError, match="has a domain 'code' already"):
        mixtures.import_domain(tree, file)
    node = without["w"]
    other = {"w": node.replace(base=node.base + 1)}
    with pytest.raises(ValueError, match="another base kernel; check_base=False"):
        mixtures.import_domain(other, file)
    mixtures.import_domain(other, file, check_base=False)
    changed = node.frozen | {"b.universal": node.frozen["b.universal"] * 2}
    other = {"w": node.replace(frozen=changed)}
    if name == "modula_res":
        with pytest.raises(ValueError, match="another universal expert"):
            mixtures.import_domain(other, file, check_base=False)
    else:
        mixtures.import_domain(other, file)
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="no file of export_domain"):
        mixtures.import_domain(tree, tmp_path / "bad.npz")


def test_a_damaged_domain(tmp_path):
    tree = mixtures.stage(grown("modula_res"), "router")
    without = mixtures.remove_domain(tree, "code")
    file = mixtures.export_domain(tree, "code", tmp_path / "code.npz")
    whole = bytearray(file.read_bytes())
    leaf = np.asarray((tree["w"].frozen | tree["w"].trainable)["b.code"]).tobytes()
    whole[whole.index(leaf) + 5] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="no file of export_domain: .*CRC"):
        mixtures.import_domain(without, file)
    node = tree["w"]
    bad = lambda part: {n: x * np.nan if n == "b.code" else x for n, x in part.items()}
    node = node.replace(frozen=bad(node.frozen), trainable=bad(node.trainable))
    file = mixtures.export_domain({"w": node}, "code", tmp_path / "nan.npz")
    with pytest.raises(ValueError, match=r"not finite: \['w/b'\]"):
        mixtures.import_domain(without, file)


def test_a_folded_universal_expert_is_the_same_function():
    tree = mixtures.stage(grown("modula_res"), "router")
    with pytest.raises(ValueError, match="stage 'all' trains the universal"):
        mixtures.fold_universal(grown("modula_res"))
    folded = mixtures.fold_universal(tree)
    assert distance(folded["w"].base, tree["w"].base) > 1e-2
    forward = jp.adapt(net)
    assert distance(forward(folded, X), forward(tree, X)) < 1e-5
    assert distance(jp.detach(folded), jp.detach(tree)) < 1e-6
    own = jax.eval_shape(jp.tree._lift.lifted_factors, folded["w"])
    assert own.terms[0].b.shape[1] == 2 * 2  # the domains' alone
    with pytest.raises(ValueError, match="is folded already"):
        mixtures.fold_universal(folded)
    with pytest.raises(ValueError, match="export from the tree before"):
        mixtures.export_domain(folded, "law", "nowhere.npz")


def test_sizes_of_stages():
    res = mixtures.stage_sizes(fresh("modula_res"))
    universal, domain = L * 3 * 2 * D, L * 2 * 2 * D
    assert res == {
        "all": universal + 2 * domain + L * 2 * D,
        "universal": universal,
        "router": L * 2 * D,
        "domain:law": domain,
        "domain:code": domain,
    }
