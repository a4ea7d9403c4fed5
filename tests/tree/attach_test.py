"""``attach``: what it finds, what it makes, and what it objects to."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapt_toolbox import everything, fill, numbers, output_scale, pair

import jaxpeft as jp

D, F, L = 12, 20, 3


def label(value) -> str:
    """A test's name; the same in every process, so without addresses."""
    return re.sub(r" at 0x\w+", "", str(value))


def linear(d_in=D, d_out=F, bias=True):
    shapes = {"kernel": (d_in, d_out)} | ({"bias": (d_out,)} if bias else {})
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}


@pytest.fixture
def params():
    """Two layers like BERT's, an embedding, a head."""
    layer = lambda: {
        "attention": {
            "query": linear(),
            "key": linear(),
            "output": {"dense": linear(F, D)},
        },
        "norm": {"scale": jax.ShapeDtypeStruct((D,), jnp.float32)},
    }
    tree = {
        "embed": {"embedding": jax.ShapeDtypeStruct((30, D), jnp.float32)},
        "encoder": {"layer_0": layer(), "layer_1": layer()},
        "lm_head": linear(D, 30, bias=False),
    }
    return fill(tree)


@pytest.fixture
def stack():
    return {"up": {"kernel": numbers(L, D, F)}, "bias": {"bias": numbers(L, F)}}


def sites(tree):
    return [row["path"] for row in jp.describe(tree).rows]


QUERIES = [f"encoder/layer_{i}/attention/query/kernel" for i in (0, 1)]
KEYS = [f"encoder/layer_{i}/attention/key/kernel" for i in (0, 1)]
OUTPUTS = [f"encoder/layer_{i}/attention/output/dense/kernel" for i in (0, 1)]
LAYER_0 = [KEYS[0], OUTPUTS[0], QUERIES[0]]


@pytest.mark.parametrize(
    "targets, found",
    [
        (["query"], QUERIES),
        (["attention/query"], QUERIES),
        (["query/kernel"], QUERIES),
        (["query", "key"], KEYS + QUERIES),
        (("layer_0/attention/query",), QUERIES[:1]),
        (["dense"], OUTPUTS),
        (QUERIES[:1], QUERIES[:1]),
        (["embed"], ["embed/embedding"]),
        (["lm_head"], ["lm_head/kernel"]),
        (r".*/query", QUERIES),
        (r"encoder/layer_0/.*", LAYER_0),
        (r".*/(query|key)", KEYS + QUERIES),
        ("all-linear", KEYS + OUTPUTS + QUERIES),
        (lambda path, leaf: leaf.shape == (F, D), OUTPUTS),
        (lambda path, leaf: "layer_1" in path and "key" in path, KEYS[1:]),
    ],
    ids=label,
)
def test_targets(targets, found, params, keys):
    adapted = jp.attach(params, pair(), targets, key=next(keys))
    assert sorted(sites(adapted)) == sorted(found)


def test_a_list_entry_is_a_suffix_at_a_slash(keys):
    params = {"my_query": linear(), "query": linear(), "query_norm": linear()}
    adapted = jp.attach(fill(params), pair(), ["query"], key=next(keys))
    assert sites(adapted) == ["query/kernel"]


def test_a_string_must_match_the_whole_module_path(params, keys):
    with pytest.raises(ValueError, match=r"`targets` 'query'.*regular expression"):
        jp.attach(params, pair(), "query", key=next(keys))


@pytest.mark.parametrize(
    "exclude, found",
    [
        (["layer_1"], QUERIES[:1]),
        (["layer_1/attention/query"], QUERIES[:1]),
        (r".*layer_0.*", QUERIES[1:]),
        (lambda path, leaf: "layer_0" in path, QUERIES[1:]),
    ],
    ids=label,
)
def test_exclude(exclude, found, params, keys):
    adapted = jp.attach(params, pair(), ["query"], key=next(keys), exclude=exclude)
    assert sites(adapted) == found


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"targets": ["qeury"]}, r"`targets` entry 'qeury' matched none.*'query'"),
        ({"targets": ["query", "valeu"]}, r"`targets` entry 'valeu'"),
        ({"targets": ["uery"]}, r"'uery' matched none.*'query'"),
        ({"targets": "encoder/.*/qeury"}, "matched none"),
        ({"targets": []}, "`targets`"),
        ({"targets": "("}, "`targets`.*not a valid regular expression"),
        ({"targets": lambda path, leaf: False}, "`targets`.*matched none"),
        ({"exclude": ["laeyr_1"]}, r"`exclude` entry 'laeyr_1' matched none"),
        ({"exclude": ["query"]}, r"`exclude`.*leaves nothing"),
        ({"rank_pattern": {"kye": 2}}, r"`rank_pattern` entry 'kye' matched none"),
        ({"rank_pattern": {"key": 2}}, r"`rank_pattern` entry 'key' matched none"),
        ({"alpha_pattern": {"kye": 2.0}}, r"`alpha_pattern` entry 'kye'"),
        ({"rank_pattern": [1, 2]}, r"`rank_pattern` is a list.*not stacked"),
        ({"rank_pattern": {"query": [1, 2]}}, r"2 values.*has 1 layer\b"),
        ({"rank_pattern": {"query": 0}}, r"rank of site .*query.*at least 1"),
        ({"rank_pattern": {"query": 2.0}}, r"rank of site .*query.*integer"),
        ({"rank_pattern": {"query": True}}, r"rank of site .*query.*integer"),
        ({"axes": {"qeury": "in out"}}, r"`axes` entry 'qeury' matched none"),
        ({"axes": {"query": "in"}}, r"'in' for '.*query/kernel'.*one word per axis"),
        ({"axes": {"query": "layer out"}}, r"at least one 'in'"),
    ],
    ids=label,
)
def test_what_is_not_there_is_an_error(kwargs, message, params, keys):
    targets = kwargs.pop("targets", ["query"])
    with pytest.raises(ValueError, match=message):
        jp.attach(params, pair(), targets, key=next(keys), **kwargs)


def test_patterns_for_a_method_without_rank_or_alpha(params, keys):
    for name in ("rank", "alpha"):
        with pytest.raises(ValueError, match=f"`{name}_pattern`.*has no {name}"):
            jp.attach(
                params,
                output_scale(),
                ["query"],
                key=next(keys),
                **{f"{name}_pattern": {"query": 2}},
            )


def test_wrong_kinds_of_arguments(params, keys):
    with pytest.raises(TypeError, match="adapter"):
        jp.attach(params, jp.lora, ["query"], key=next(keys))
    with pytest.raises(TypeError, match="key"):
        jp.attach(params, pair(), ["query"], key=jax.random.PRNGKey(0))


def test_a_site_is_adapted_once(params, keys):
    adapted = jp.attach(params, pair(), ["query"], key=next(keys))
    with pytest.raises(ValueError, match=r"query/kernel' already carries 'pair'"):
        jp.attach(adapted, everything(), ["query", "key"], key=next(keys))
    more = jp.attach(adapted, everything(), ["key"], key=next(keys))
    assert sorted(sites(more)) == sorted(KEYS + QUERIES)
    methods = {row["path"]: row["method"] for row in jp.describe(more).rows}
    assert {methods[p] for p in QUERIES} == {"pair"}
    assert {methods[p] for p in KEYS} == {"everything"}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.bool_])
def test_a_kernel_must_be_floating(dtype, params, keys):
    params["embed"]["embedding"] = jnp.zeros((30, D), dtype)
    with pytest.raises(ValueError, match=r"embed/embedding'.*floating"):
        jp.attach(params, pair(), ["embed", "query"], key=next(keys))
    adapted = jp.attach(params, pair(), "all-linear", key=next(keys))  # skips it
    assert adapted["embed"]["embedding"].dtype == dtype


def test_a_stack_needs_roles(stack, keys):
    message = r"up/kernel' has shape \(3, 12, 20\).*axes=.*model.axes.*infer_axes"
    with pytest.raises(ValueError, match=message):
        jp.attach(stack, pair(), ["up"], key=next(keys))


def test_a_module_name_does_not_name_its_bias(keys):
    """Biases of DenseGeneral or of a stack have two axes and more."""
    params = {"q": {"kernel": numbers(2, D, 4, 5), "bias": numbers(2, 4, 5)}}
    axes = {"q": "layer in out out"}
    adapted = jp.attach(params, pair(), ["q"], key=next(keys), axes=axes)
    assert sites(adapted) == ["q/kernel"]


def test_each_layer_and_each_site_draws_its_own(stack, params, keys):
    axes = {"up": "layer in out"}
    a = jp.attach(stack, pair(), ["up"], key=next(keys), axes=axes)["up"]["kernel"]
    assert a.trainable["a"].shape == (L, D, 3)
    for i in range(L - 1):
        assert jnp.all(a.trainable["a"][i] != a.trainable["a"][i + 1])
    adapted = jp.attach(params, pair(), ["query"], key=next(keys))
    one, two = (adapted["encoder"][f"layer_{i}"]["attention"]["query"] for i in (0, 1))
    assert jnp.all(one["kernel"].trainable["a"] != two["kernel"].trainable["a"])


def test_a_sites_draw_depends_on_its_own_path_alone(params, keys):
    key = next(keys)
    alone = jp.attach(params, pair(), QUERIES[:1], key=jax.random.clone(key))
    among = jp.attach(params, pair(), ["query", "key"], key=jax.random.clone(key))
    a, b = (
        t["encoder"]["layer_0"]["attention"]["query"]["kernel"].trainable["a"]
        for t in (alone, among)
    )
    assert jnp.array_equal(a, b)


def test_leaves_over_a_low_precision_kernel_are_float32(params, keys):
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    adapted = jp.attach(low, everything(), ["query"], key=next(keys))
    trainable, frozen = jp.partition(adapted)
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(jp.merge(adapted))} == {
        jnp.dtype(jnp.bfloat16)
    }


def test_rank_and_alpha_patterns(params, keys):
    adapted = jp.attach(
        params,
        pair(rank=4, alpha=8.0),
        ["query", "key"],
        key=next(keys),
        rank_pattern={"layer_0/attention/query": 2, ".*layer_1.*": 5},
        alpha_pattern={"key": 10.0},
    )
    rows = {r["path"]: (r["ranks"], r["alphas"]) for r in jp.describe(adapted).rows}
    assert rows == {
        QUERIES[0]: ((2,), (8.0,)),
        QUERIES[1]: ((5,), (8.0,)),
        KEYS[0]: ((4,), (10.0,)),
        KEYS[1]: ((5,), (10.0,)),
    }
    flat = jp.tree.flat(adapted)
    assert flat[f"{QUERIES[0]}/a"].shape == (D, 2)
    assert flat[f"{KEYS[1]}/b"].shape == (5, F)
    scales = {p: float(flat[f"{p}/scale"]) for p in rows}
    expected = {QUERIES[0]: 4.0, QUERIES[1]: 1.6, KEYS[0]: 2.5, KEYS[1]: 2.0}
    assert scales == pytest.approx(expected)


def test_the_first_pattern_that_matches_wins(params, keys):
    adapted = jp.attach(
        params,
        pair(),
        ["query"],
        key=next(keys),
        rank_pattern={"layer_0/attention/query": 2, "query": 5},
    )
    assert [r["ranks"] for r in jp.describe(adapted).rows] == [(2,), (5,)]


def test_one_rank_for_each_layer_of_a_stack(stack, keys):
    adapted = jp.attach(
        stack,
        pair(),
        ["up"],
        key=next(keys),
        rank_pattern=[1, 4, 2],
        alpha_pattern={"up": [1.0, 2.0, 3.0]},
        axes={"up": "layer in out"},
    )
    node = adapted["up"]["kernel"]
    assert node.site.ranks == (1, 4, 2) and jp.tree.alphas_of(node) == (1.0, 2.0, 3.0)
    assert node.trainable["a"].shape == (L, D, 4)
    np.testing.assert_allclose(node.frozen["scale"], [1.0, 0.5, 1.5])
    used = jnp.any(node.trainable["a"] != 0, 1)
    assert used.tolist() == [[True] + [False] * 3, [True] * 4, [True] * 2 + [False] * 2]
    assert jp.count(adapted)[0] == (1 + 4 + 2) * (D + F)


def test_attach_leaves_the_argument_alone(params, keys):
    before = jax.tree.map(lambda x: x, params)
    jp.attach(params, everything(), "all-linear", key=next(keys))
    assert jax.tree.structure(before) == jax.tree.structure(params)


def test_attach_under_jit_equals_eager(params, keys):
    key = next(keys)
    run = lambda p, key: jp.attach(p, everything(), ["query"], key=key)
    one = run(params, jax.random.clone(key))
    two = jax.jit(run)(params, jax.random.clone(key))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("adapter", [jp.lora(2), jp.vera(2), jp.pissa(2)])
def test_shapes_on_a_mesh_get_leaves_like_other_shapes(adapter, keys):
    where = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    made = []
    for sharding in (None, where):
        kernel = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)
        tree = jp.attach({"q": {"kernel": kernel}}, adapter, ["q"], key=next(keys))
        (node,) = jp.tree.nodes(tree)
        made.append({**node.frozen, **node.trainable})
    assert made[0] == made[1]


def test_equal_calls_make_equal_structures(params, keys):
    one, two = (
        jp.attach(params, jp.lora(rank=2), ["query"], key=next(keys)) for _ in range(2)
    )
    assert jax.tree.structure(one) == jax.tree.structure(two)
    other = jp.attach(params, jp.lora(rank=3), ["query"], key=next(keys))
    assert jax.tree.structure(one) != jax.tree.structure(other)


def test_a_rank_that_a_kernel_has_no_use_for_is_said(keys):
    params = {"q": {"kernel": jnp.ones((6, 4))}, "k": {"kernel": jnp.ones((6, 9))}}
    with pytest.warns(UserWarning, match=r"'q/kernel'.*rank 5 is above 4.*\[6, 4\]"):
        jp.attach(params, jp.lora(rank=5), ["q", "k"], key=next(keys))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.attach(params, jp.lora(rank=4), ["q", "k"], key=next(keys))
