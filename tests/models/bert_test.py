"""Properties of the encoder that need no other library."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpeft import models


def shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def stack_layers(params, layers):
    """The scanned tree of an unrolled one, by hand."""
    flat = flatten_dict(params, sep="/")
    out = {k: v for k, v in flat.items() if "layer_" not in k}
    for path in [k for k in flat if "layer_0/" in k]:
        every = [flat[path.replace("layer_0", f"layer_{i}")] for i in range(layers)]
        out[path.replace("layer_0", "layer")] = jnp.stack(every)
    return unflatten_dict(out, sep="/")


def encoder_shapes(prefix, lead=()):
    table = {
        "attention/query": ((16, 16), (16,)),
        "attention/key": ((16, 16), (16,)),
        "attention/value": ((16, 16), (16,)),
        "attention/output/dense": ((16, 16), (16,)),
        "intermediate/dense": ((16, 24), (24,)),
        "output/dense": ((24, 16), (16,)),
    }
    out = {}
    for path, (kernel, bias) in table.items():
        out[f"{prefix}/{path}/kernel"] = lead + kernel
        out[f"{prefix}/{path}/bias"] = lead + bias
    for path in ("attention/output/LayerNorm", "output/LayerNorm"):
        out[f"{prefix}/{path}/scale"] = (*lead, 16)
        out[f"{prefix}/{path}/bias"] = (*lead, 16)
    return out


EMBEDDINGS = {
    "embeddings/word_embeddings/embedding": (64, 16),
    "embeddings/position_embeddings/embedding": (20, 16),
    "embeddings/token_type_embeddings/embedding": (2, 16),
    "embeddings/LayerNorm/scale": (16,),
    "embeddings/LayerNorm/bias": (16,),
}
UNROLLED = encoder_shapes("encoder/layer_0") | encoder_shapes("encoder/layer_1")
SCANNED = encoder_shapes("encoder/layer", (2,))
BERT_HEAD = {
    "pooler/dense/kernel": (16, 16),
    "pooler/dense/bias": (16,),
    "classifier/kernel": (16, 3),
    "classifier/bias": (3,),
}
ROBERTA_HEAD = {
    "classifier/dense/kernel": (16, 16),
    "classifier/dense/bias": (16,),
    "classifier/out_proj/kernel": (16, 1),
    "classifier/out_proj/bias": (1,),
}


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("bert", {}, EMBEDDINGS | UNROLLED),
        ("roberta", {"scan_layers": True}, EMBEDDINGS | SCANNED),
        (
            "bert",
            {"head": "classification", "num_labels": 3, "remat": "full"},
            EMBEDDINGS | UNROLLED | BERT_HEAD,
        ),
        (
            "roberta",
            {"head": "regression", "scan_layers": True, "remat": "dots"},
            EMBEDDINGS | SCANNED | ROBERTA_HEAD,
        ),
    ],
)
def test_the_parameter_tree(tiny, model_type, options, expected):
    model = models.from_config(tiny(model_type), **options)
    assert shapes(models.abstract(model)) == expected


def test_golden_counts_cost_no_memory():
    """Published sizes of the base models, with a head of two classes."""
    for model_type, sizes, count in (
        ("bert", {}, 109_483_778),
        (
            "roberta",
            {"max_position_embeddings": 514, "type_vocab_size": 1},
            124_647_170,
        ),
        (
            "bert",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
            335_143_938,
        ),
    ):
        model = models.from_config(
            {"model_type": model_type, **sizes}, head="classification", scan_layers=True
        )
        leaves = jax.tree.leaves(models.abstract(model))
        assert sum(leaf.size for leaf in leaves) == count
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def loss_of(model, ids, mask, types):
    def loss(params):
        logits, states = model.apply(
            {"params": params}, ids, mask, types, hidden_states=True
        )
        return jnp.square(logits).sum() + jnp.sin(states).sum(), states

    return loss


def test_scanned_equals_unrolled(tiny, batch, keys):
    config = tiny("bert")
    inputs = batch(config)
    options = {"head": "classification"}
    plain = models.from_config(config, **options)
    scanned = models.from_config(config, scan_layers=True, **options)
    params = models.init(plain, next(keys))
    step = jax.value_and_grad(loss_of(plain, *inputs), has_aux=True)
    (want, states), grads = jax.jit(step)(params)
    step = jax.value_and_grad(loss_of(scanned, *inputs), has_aux=True)
    (got, states_), grads_ = jax.jit(step)(stack_layers(params, 2))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(states_, states, atol=1e-5)
    assert_trees_close(grads_, stack_layers(grads, 2))
    query = grads_["encoder"]["layer"]["attention"]["query"]["kernel"]
    assert np.abs(query[0] - query[1]).max() > 1e-2  # the layers are not one


def assert_trees_close(got, wanted):
    def close(path, ours, theirs):
        np.testing.assert_allclose(
            ours, theirs, atol=1e-4, rtol=1e-4, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, got, wanted)


def count_dots(jaxpr):
    return len(re.findall(r"dot_general\[", str(jaxpr)))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_memory_not_numbers(tiny, batch, keys, scan_layers):
    layers = 2 if scan_layers else 1
    config = tiny("bert", num_hidden_layers=layers)
    inputs = batch(config)
    plain = models.from_config(config, head="classification", scan_layers=scan_layers)
    params = models.init(plain, next(keys))
    steps = {
        remat: jax.value_and_grad(
            loss_of(plain.clone(remat=remat), *inputs), has_aux=True
        )
        for remat in (None, "dots", "names", "dots_no_batch", "full")
    }
    dots = {
        remat: count_dots(jax.make_jaxpr(step)(params)) for remat, step in steps.items()
    }
    assert dots["dots"] == dots[None]  # every product is kept
    # scores and mixed values are computed again; not so the projections
    assert dots["names"] == dots["dots_no_batch"] == dots[None] + 2
    # all but the last projection, whose result no gradient needs
    assert dots["full"] >= dots[None] + 7
    wanted = jax.jit(steps[None])(params)[1]
    for remat in ("names", "full"):
        assert_trees_close(jax.jit(steps[remat])(params)[1], wanted)


@pytest.mark.parametrize(
    ("model_type", "scan_layers"), [("bert", False), ("roberta", True)]
)
def test_bfloat16(tiny, batch, keys, model_type, scan_layers):
    config = tiny(model_type, initializer_range=0.1)
    ids, mask, types = batch(config)
    options = {"head": "classification", "scan_layers": scan_layers}
    exact = models.from_config(config, **options)
    params = models.init(exact, next(keys))
    wanted = exact.apply({"params": params}, ids, mask, types)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        model = models.from_config(
            config, dtype=jnp.bfloat16, param_dtype=param_dtype, **options
        )
        cast = jax.tree.map(lambda x, to=param_dtype: x.astype(to), params)
        logits, states = model.apply(
            {"params": cast}, ids, mask, types, hidden_states=True
        )
        assert states.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(logits, wanted, atol=0.03)  # measured 0.01
        jaxpr = str(jax.make_jaxpr(model.apply)({"params": cast}, ids, mask, types))
        for operation in ("rsqrt", "exp", "div"):  # norms and softmax stay wide
            assert re.search(rf":f32\[[\d,]*\] = {operation} ", jaxpr), operation
            assert not re.search(rf":bf16\[[\d,]*\] = {operation} ", jaxpr), operation
    model = models.from_config(config, param_dtype="bfloat16", **options)
    drawn = models.init(model, next(keys))
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16  # follows the parameters


def test_padding_changes_nothing(tiny, batch, keys):
    """Real tokens: zero influence of what stands in the padding or how long it is."""
    for model_type in ("bert", "roberta"):
        config = tiny(model_type, num_hidden_layers=1)
        ids, mask, types = batch(config)
        model = models.from_config(config)
        params = models.init(model, next(keys))
        base = model.apply({"params": params}, ids, mask, types)
        noise = np.where(mask, types, 1 - types)
        other = model.apply({"params": params}, ids, mask, noise)
        real = mask.astype(bool)
        assert np.all(np.asarray(other)[real] == np.asarray(base)[real])
        assert np.any(np.asarray(other)[~real] != np.asarray(base)[~real])
        pad = config.get("pad_token_id", int(model_type == "roberta"))
        wide = np.pad(ids, [(0, 0), (0, 4)], constant_values=pad)
        longer = model.apply(
            {"params": params}, wide, np.pad(mask, [(0, 0), (0, 4)]), None
        )
        short = model.apply({"params": params}, ids, mask, None)
        np.testing.assert_allclose(
            np.asarray(longer)[:, :-4][real], np.asarray(short)[real], atol=1e-5
        )


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_dropout(tiny, batch, keys, scan_layers):
    config = tiny("roberta")
    ids, mask, _ = batch(config)
    model = models.from_config(config, head="classification", scan_layers=scan_layers)
    params = models.init(model, next(keys))

    def run(model, key):
        return model.apply(
            {"params": params}, ids, mask, deterministic=False, rngs={"dropout": key}
        )

    key = next(keys)
    same = jax.random.clone(key)
    first = run(model, key)
    assert np.all(first == run(model, same))
    assert np.abs(first - run(model, next(keys))).max() > 1e-3
    off = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0,
    }
    calm = models.from_config(
        {**config, **off}, head="classification", scan_layers=scan_layers
    )
    np.testing.assert_array_equal(
        run(calm, next(keys)), model.apply({"params": params}, ids, mask)
    )
    for name in off if not scan_layers else ():  # each of the three acts
        one = calm.clone(config=dataclasses.replace(calm.config, **{name: 0.5}))
        assert np.abs(run(one, next(keys)) - run(calm, next(keys))).max() > 1e-3, name


def test_layers_drop_differently(tiny, keys):
    """In a scan, too, every layer draws its own mask."""
    config = tiny("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)
    model = models.from_config(config, scan_layers=True)
    params = models.init(model, next(keys))
    # Only the last dropout of a layer acts: its projection returns the bias, 1.
    layer = jax.tree.map(jnp.zeros_like, params["encoder"]["layer"])
    layer["output"]["dense"]["bias"] += 1.0
    layer["output"]["LayerNorm"]["scale"] += 1.0
    params["encoder"]["layer"] = layer
    ids = np.full((2, 8), 7, np.int32)
    _, states = model.apply(
        {"params": params},
        ids,
        deterministic=False,
        rngs={"dropout": next(keys)},
        hidden_states=True,
    )
    first, second = (np.asarray(state) > 0 for state in states[1:])
    assert 0.3 < np.mean(first) < 0.7 and np.any(first != second)


def test_it_traces_with_plain_arrays(tiny, batch, keys):
    config = tiny("bert")
    model = models.from_config(config, head="classification", scan_layers=True)
    params = models.init(model, next(keys))
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, *batch(config))
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [(3, 2)]
    kernels = [p for p, s in shapes(params).items() if len(s) == 3]
    assert len(kernels) == 6
    (pattern, roles), *rest = model.axes.items()
    assert not rest and roles == "layer in out"
    assert all(re.fullmatch(pattern, path) for path in kernels)
    assert models.from_config(config).axes == {}


def test_ids_outside_the_vocabulary_show(tiny, keys):
    model = models.from_config(tiny("bert"))
    params = models.init(model, next(keys))
    out = model.apply({"params": params}, np.array([[64, 3]], np.int32))
    assert np.isnan(out).any()


def test_too_long_a_text(tiny):
    for model_type, room in (("bert", 20), ("roberta", 18)):
        model = models.from_config(tiny(model_type))
        params = models.abstract(model)

        def run(tokens, model=model, params=params):
            ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
            return jax.eval_shape(model.apply, {"params": params}, ids)

        assert run(room).shape == (1, room, 16)
        with pytest.raises(ValueError, match=f"has room for {room}. Truncate"):
            run(room + 1)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "bertt"}, {}, "'bertt', which is not implemented; known"),
        ({}, {}, "model_type None, which is not implemented"),
        (
            {"position_embedding_type": "relative_key"},
            {},
            "'position_embedding_type' is 'relative_key'.*only 'absolute' is",
        ),
        ({"is_decoder": True}, {}, "'is_decoder' is True"),
        ({"add_cross_attention": True}, {}, "'add_cross_attention' is True"),
        ({"pruned_heads": {"1": [0]}}, {}, "'pruned_heads' is"),
        ({"quantization_config": {"bits": 4}}, {}, "'quantization_config' is"),
        ({"auto_map": {"AutoModel": "x.Y"}}, {}, "'auto_map' is"),
        ({"hidden_act": "mish"}, {}, "'hidden_act' is 'mish'; known are"),
        ({"hidden_size": 18}, {}, "'hidden_size' 18 is no multiple of"),
        ({"model_type": "roberta", "pad_token_id": None}, {}, "'pad_token_id' is None"),
        ({}, {"head": "token"}, "`head` is 'token'; known are"),
        ({}, {"remat": "some"}, "`remat` is 'some'; known are .*'names'"),
        ({}, {"num_labels": 3}, "`num_labels` is 3 but `head` is None"),
        ({}, {"head": "regression", "num_labels": 3}, "3; regression has 1"),
        ({}, {"head": "classification", "num_labels": 0}, "write at least 1"),
        ({}, {"dtype": "int8"}, "`dtype` is int8; write a floating dtype"),
        ({}, {"param_dtype": jnp.int32}, "`param_dtype` is int32"),
    ],
)
def test_refusals(tiny, config, options, message):
    content = {"model_type": None} if message.startswith("model_type") else tiny("bert")
    with pytest.raises(ValueError, match=message):
        models.from_config({**content, **config}, **options)


def test_raw_keys_are_refused(tiny):
    model = models.from_config(tiny("bert"))
    with pytest.raises(ValueError, match=r"write jax.random.key\(seed\)"):
        models.init(model, jnp.zeros(2, jnp.uint32))


def test_config_objects_and_labels(tiny):
    import transformers

    config = transformers.BertConfig(**tiny("bert"), num_labels=7)
    assert models.from_config(config, head="classification").num_labels == 7
    four = {"id2label": {str(i): str(i) for i in range(4)}}
    content = tiny("bert", **four)
    assert models.from_config(content, head="classification").num_labels == 4
    assert models.from_config(content, head="regression").num_labels == 1


def test_mean_pool_of_nothing_is_zero():
    hidden = jnp.ones((2, 3, 4), jnp.bfloat16)
    pooled = models.mean_pool(hidden, np.array([[1, 1, 0], [0, 0, 0]]))
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, [[1] * 4, [0] * 4])


def test_nothing_is_logged_without_reason(tiny, caplog, keys):
    with caplog.at_level(logging.INFO):
        models.init(models.from_config(tiny("bert")), next(keys))
    assert not [r for r in caplog.records if r.name.startswith("jaxpeft")]
