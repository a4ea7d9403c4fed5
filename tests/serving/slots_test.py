"""Slots: a row of a mixed batch is what its own adapter gives it alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import distance, numbers
from slots_toolbox import (
    AXES,
    LAYERS,
    TARGETS,
    D,
    F,
    adapters,
    base,
    chosen,
    filled,
    net,
    trained,
)

import jaxpeft as jp
from benchmarks.hlo import made_of_shape
from jaxpeft import serving
from jaxpeft.transform.rules._rows import row_changes
from jaxpeft.tree import Rows

NAMES = ["large", "__base__", "layers", "small", "large", "root", "__base__"]
X = numbers(len(NAMES), 4, D, seed=9)
forward = jp.adapt(net)


@pytest.fixture(scope="module")
def trees():
    return adapters()


@pytest.fixture(scope="module")
def slots(trees):
    return filled("gather", **trees)


@pytest.mark.parametrize("how", ["gather", "ragged"])
def test_rows_are_what_their_adapters_give_alone(how, trees):
    slots = filled(how, **trees)
    y = forward(chosen(slots, NAMES), X)
    plain = forward(base(), X)
    for i, name in enumerate(NAMES):
        if name == "__base__":
            assert np.array_equal(y[i], plain[i])  # bit for bit
            continue
        alone = forward(trees[name], X)[i]
        assert distance(y[i], alone) < 1e-6
        assert distance(plain[i], alone) > 1e-2
    # One token a row, without a length axis.
    one = forward(chosen(slots, NAMES), X[:, 0])
    assert distance(one[0], forward(trees["large"], X[:, 0])[0]) < 1e-6


def test_copies_of_the_rows_pairs_are_what_the_slots_hold(slots, trees):
    """Once for many calls: the slots are read then, and not again."""
    loaded, index = [], serving.rows(slots, NAMES)
    make = lambda index: serving.with_rows(slots.tree, index, copies=True)
    call = jax.jit(forward)
    tree = make(index)
    assert tree["up"]["kernel"].frozen["a"].shape == (LAYERS, len(NAMES), D, 4)
    assert np.array_equal(call(tree, X), jax.jit(forward)(chosen(slots, NAMES), X))
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: loaded.append(name) if name == event else None
    )
    turned = call(make(index[::-1].copy()), X)
    assert not loaded  # another batch of as many rows
    assert distance(turned[1], forward(trees["root"], X)[1]) < 1e-6
    # As they were when they were taken; and no base for the copies of another batch.
    serving.drop(slots, "large")
    assert np.array_equal(call(tree, X[:])[1], forward(base(), X)[1])
    wrong = jax.jit(lambda i: forward(make(i), X))(jnp.array([0, 0, 7, -1, 0, 1, 0]))
    bad = np.isnan(np.asarray(wrong)).all((1, 2))
    assert bad.tolist() == [False, False, True, True, False, False, False]
    assert not np.isnan(np.asarray(wrong)[~bad]).any()
    with pytest.raises(ValueError, match="copies for the rows of one batch; give slo"):
        serving.with_rows(tree, index)


@pytest.mark.parametrize("how", ["gather", "ragged"])
@pytest.mark.parametrize("copies", [False, True])
def test_what_is_looked_up(how, copies):
    """A table's rows plus each row's own pair of it; slot 0 bit for bit."""
    table = {"words": {"embedding": numbers(8, D, seed=5)}}
    ids = jnp.array([[1, 2, 7], [3, 4, 1], [0, 1, 2]])
    look = jax.jit(jp.adapt(lambda p, ids: p["words"]["embedding"][ids]))
    slots, trees = serving.slots(table, ["words"], capacity=3, rank=4, how=how), {}
    for i, name in enumerate(["one", "two"]):
        tree = jp.attach(table, jp.lora(2 + i, 7), ["words"], key=jax.random.key(i))
        trainable, frozen = jp.partition(tree)
        moved = jax.tree.map(lambda x: x + 0.3, trainable)
        trees[name] = jp.combine(moved, frozen)
        slots = serving.load(slots, name, trees[name])
    index = serving.rows(slots, ["two", "__base__", "one"])
    tree = serving.with_rows(slots.tree, index, copies=copies)
    rows = look(tree, ids)
    assert distance(rows[0], look(trees["two"], ids)[0]) < 1e-6
    assert distance(rows[2], look(trees["one"], ids)[2]) < 1e-6
    assert np.array_equal(rows[1], look(table, ids)[1])
    assert distance(rows[0], look(table, ids)[0]) > 0.1
    # Another shape is another program, whose sums may round in another order.
    assert distance(look(tree, ids[:, 0]), rows[:, 0]) < 1e-6
    with pytest.raises(ValueError, match="which adapter 3 rows take, but the input"):
        look(tree, ids[:2])


def test_slots_of_a_lower_dtype(trees):
    """Half the room; adapters are rounded as they are loaded, products are not."""
    room = serving.slots(
        base(), TARGETS, capacity=2, rank=4, axes=AXES, dtype=jnp.bfloat16
    )
    room = serving.load(room, "large", trees["large"])
    leaves = room.tree["out"]["kernel"].frozen
    assert {leaves[n].dtype.name for n in "ab"} == {"bfloat16"}
    assert leaves["scale"].dtype == jnp.float32
    trainable, frozen = jp.partition(trees["large"])
    low = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
    rounded = jp.combine(jax.tree.map(low, trainable), frozen)
    y = forward(chosen(room, ["large", "__base__"]), X[:2])
    assert distance(y[0], forward(rounded, X[:2])[0]) < 1e-6
    assert distance(y[0], forward(trees["large"], X[:2])[0]) > 1e-4
    assert np.array_equal(y[1], forward(base(), X[:2])[1])


@pytest.mark.parametrize("how", ["gather", "ragged", "taken"])
def test_low_inputs_and_pairs_have_float32_products(how):
    d, index = 64, jnp.array([1, 0, 1], jnp.int32)
    numbers_of = lambda i, *shape: numbers(*shape, seed=i).astype(jnp.bfloat16)
    count = 3 if how == "taken" else 2
    a, b = numbers_of(1, count, d, 4), numbers_of(2, count, 4, 5)
    x, scale = numbers_of(3, 3, 2, d), jnp.full(count, 0.5)
    got = row_changes(a, b, Rows(index, scale, how), x, None)
    own = np.arange(3) if how == "taken" else np.array(index)
    x, a, b = (np.asarray(v, np.float64) for v in (x, a[own], b[own]))
    assert got.dtype == jnp.float32
    assert distance(got, np.asarray(0.5 * x @ a @ b, np.float32)) < 1e-5


def test_no_kernel_of_a_row_is_formed(slots):
    compiled = jax.jit(forward).lower(chosen(slots, NAMES), X).compile()
    text = compiled.as_text()
    rows = len(NAMES)
    assert not made_of_shape(text, [(rows, D, F), (rows, D, 2, 3), (rows, D, 5)])
    assert made_of_shape(text, [(rows, D, 4)])  # the rows' pairs are


def test_loading_and_dropping_compiles_nothing(trees, slots):
    """A hundred loads of four ranks, three scales and unequal sites."""
    index = np.zeros(len(NAMES), np.int32)
    call = jax.jit(lambda tree, index, x: forward(serving.with_rows(tree, index), x))
    slots = serving.drop(slots, "small")
    before = call(slots.tree, index, X)
    loaded = []
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: loaded.append(name) if name == event else None
    )
    jax.jit(lambda x: x * 3)(1.0)
    assert loaded.pop() == event and not loaded  # it hears
    for i in range(100):
        name = list(trees)[i % 4]
        slots = serving.drop(slots, name) if name in slots.names else slots
        slots = serving.load(slots, name, trees[name])
        if i % 10 == 0:
            rows = serving.rows(slots, [name] * len(NAMES))
            y = call(slots.tree, rows, X)
            assert distance(y, before) > 1e-2
    assert not loaded
    want = forward(trees["root"], X)
    index = serving.rows(slots, ["root"] * len(NAMES))
    assert distance(call(slots.tree, index, X), want) < 1e-6


def test_a_dropped_slot_is_empty_and_taken_again(trees, slots):
    less = serving.drop(slots, "large")
    assert less.names == ("__base__", "small", None, "root", "layers", None)
    assert "large" in slots.names  # those given stay
    y = forward(serving.with_rows(less.tree, serving.rows(slots, NAMES)), X)
    assert distance(y[0], forward(base(), X)[0]) == 0
    again = serving.load(less, "other", trees["small"])
    assert again.names[2] == "other"
    got = forward(chosen(again, ["other"] * len(NAMES)), X)
    assert distance(got, forward(trees["small"], X)) < 1e-6


def test_initial_factors_go_in_as_the_change_of_the_kernel():
    for method in (jp.pissa(2, residual="folded"), jp.kasa(2)):
        tree = trained(method, seed=5)
        got = forward(chosen(filled(one=tree), ["one"] * len(NAMES)), X)
        assert distance(got, forward(tree, X)) < 2e-6, method
    off = jp.extract(trained(jp.lora(3)))
    got = filled(one=jp.graft(base(), off))
    want = forward(jp.graft(base(), off), X)
    assert distance(forward(chosen(got, ["one"] * len(NAMES)), X), want) < 1e-6


def test_leaves_follow_their_kernels_on_a_mesh(trees):
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    put = lambda x, *spec: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    params = base()
    params["up"]["kernel"] = put(params["up"]["kernel"], None, None, "model")
    params["down"]["kernel"] = put(params["down"]["kernel"], None, "model", None)
    for path in ("heads", "out"):
        params[path]["kernel"] = put(params[path]["kernel"])
    slots = serving.slots(params, TARGETS, capacity=2, rank=4, axes=AXES)
    slots = serving.load(slots, "large", trees["large"])
    up = slots.tree["up"]["kernel"].frozen
    assert up["b"].shape == (LAYERS, 3, 4, F)
    assert up["b"].addressable_shards[0].data.shape == (LAYERS, 3, 4, F // 2)
    assert up["a"].sharding.is_fully_replicated
    names = ["large", "__base__", "large", "__base__"]
    y = forward(chosen(slots, names), put(X[:4], "data"))
    assert distance(y[::2], forward(trees["large"], X[:4])[::2]) < 1e-6
    assert distance(y[1::2], forward(base(), X[:4])[1::2]) < 1e-6


def test_numbers_that_are_no_slot(slots):
    index = np.array([2, 0, 7, -1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"`index` has \[-1, 7\], but slots go .* 5"):
        serving.with_rows(slots.tree, index)
    with pytest.raises(ValueError, match=r"`index` has \[7\], but slots go"):
        serving.with_rows(slots.tree, [2, 0, 7])
    for how in ("gather", "ragged"):
        same = filled(how, large=trained(jp.lora(4), seed=2))
        run = jax.jit(lambda i, t=same.tree: forward(serving.with_rows(t, i), X))
        y = run(jnp.where(jnp.asarray(index) == 2, 1, jnp.asarray(index)))
        wrong = np.isnan(np.asarray(y)).all((1, 2))
        assert wrong.tolist() == [False, False, True, True, False, False, False]
        assert not np.isnan(np.asarray(y)[~wrong]).any()


def test_refusals_name_the_way_out(trees, slots):
    def refused(match, name="new", tree=None, room=slots):
        with pytest.raises(ValueError, match=match):
            serving.load(room, name, trees["small"] if tree is None else tree)

    refused(
        r"`name` 'root' is taken; drop it first: serving.drop\(slots, 'root'\)", "root"
    )
    refused("the base has that name", "__base__")
    refused("`name` must be a text", "")
    full = serving.load(slots, "fifth", trees["small"])
    refused(r"all 5 slots are taken, by '__base__', 'small'.*capacity=", room=full)
    refused(
        r"change has rank 5, .* room for 4; .*rank=5\), .*weighted",
        tree=trained(jp.lora(5)),
    )
    refused(r"change has rank 6,", tree=trained(jp.pissa(3)))
    few = serving.slots(base(), ["out"], rank=4)
    refused(r"'heads/kernel' has no slots; .*targets=\[\.\.\., 'heads'\]", room=few)
    refused(
        "scales the kernel, .*leave the site out.*jaxpeft.merge",
        tree=trained(jp.dora(2)),
    )
    refused("trains the leaf itself", tree=trained(jp.full(), ["out"]))
    mixture = trained(jp.molora(2, experts=2), ["out"])
    refused(
        r"depends on the input, so its change is no matrix.*fix_gates\(.*'1': 1.0",
        tree=mixture,
    )
    refused("a tree without adapters", tree=base())
    other = {"out": {"kernel": numbers(D, 7)}}
    other = jp.attach(other, jp.lora(2), ["out"], key=jax.random.key(0))
    refused(
        r"has shape \(6, 7\) and axes 'in out'; the slots' kernel has \(6, 5\)",
        tree=other,
    )

    with pytest.raises(
        ValueError, match=r"no adapter 'rot'; nearest: \['root'\]. Loaded are"
    ):
        serving.rows(slots, ["rot"])
    with pytest.raises(ValueError, match="no adapter 'rot'"):
        serving.drop(slots, "rot")
    with pytest.raises(ValueError, match="cannot be dropped"):
        serving.drop(slots, "__base__")
    with pytest.raises(ValueError, match="one name for each row"):
        serving.rows(slots, "root")
    with pytest.raises(ValueError, match="one whole number for each row, got float"):
        serving.with_rows(slots.tree, np.zeros(3))
    with pytest.raises(ValueError, match="`tree` has no slots"):
        serving.with_rows(base(), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="nothing says which of them each row takes"):
        forward(slots.tree, X)
    with pytest.raises(
        ValueError, match=r"`index` says which adapter 3 rows take, .*\[7, 4, 6\]"
    ):
        forward(chosen(slots, NAMES[:3]), X)
    for changes, match in (
        ({"capacity": 0}, "`capacity` must be a whole number"),
        ({"rank": True}, "`rank` must be a whole number"),
        ({"how": "loop"}, "`how` must be None or one of gather, ragged"),
        ({"dtype": "int8"}, "`dtype` must be a floating one, .*got int8"),
    ):
        with pytest.raises(ValueError, match=match):
            serving.slots(base(), ["out"], **changes)
    with pytest.raises(ValueError, match="carry adapters already"):
        serving.slots(trees["small"], ["out"])
    with pytest.raises(ValueError, match="depends on the input, so no kernel"):
        jp.merge(chosen(slots, NAMES))
    assert not jp.mergeable(slots.tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, jp.detach(slots.tree), base()))


def test_kernels_that_meet_no_rows_are_named(slots):
    x = X[0, 0]
    cases = {
        "no row": lambda p: x @ p["out"]["kernel"],
        "is used transposed": lambda p: (
            X @ x[None, :5].repeat(6, 0) @ p["out"]["kernel"].T
        ),
        "one id is looked up alone": lambda p: jnp.take(
            p["out"]["kernel"], jnp.array(2), axis=0
        ),
    }
    for why, f in cases.items():
        with pytest.raises(jp.UnsupportedError, match=f"'out/kernel'.*{why}"):
            jp.adapt(f)(chosen(slots, NAMES))
