"""Properties of decoders that need no other library."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_toolbox import content, texts
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.models import _parts


def flat(tree):
    return flatten_dict(tree, sep="/")


def shapes(tree):
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def stack_layers(params, layers):
    """The scanned tree of an unrolled one, by hand."""
    out = {k: v for k, v in flat(params).items() if "layer_" not in k}
    for path in [k for k in flat(params) if "layer_0/" in k]:
        every = [
            flat(params)[path.replace("layer_0", f"layer_{i}")] for i in range(layers)
        ]
        out[path.replace("layer_0", "layer")] = jnp.stack(every)
    return unflatten_dict(out, sep="/")


def assert_trees_close(got, wanted, **tolerance):
    for path, leaf in flat(wanted).items():
        np.testing.assert_allclose(
            flat(got)[path], leaf, err_msg=path, **(tolerance or {"atol": 1e-4})
        )


@pytest.fixture(scope="module")
def made():
    """make(case) -> a model and parameters of any size, unrolled; made once."""
    known = {}

    def make(case, head="causal_lm"):
        if (case, head) not in known:
            model = models.from_config(content(case), head=head)
            rng = np.random.default_rng(7)  # models.init would compile
            known[case, head] = (
                model,
                jax.tree_util.tree_map_with_path(
                    lambda path, x: jnp.asarray(
                        rng.normal("scale" in str(path[-1]), 0.3, x.shape), x.dtype
                    ),
                    models.abstract(model),
                ),
            )
        return known[case, head]

    return make


LAYER = {
    "self_attn/q_proj/kernel": (16, 16),
    "self_attn/k_proj/kernel": (16, 8),
    "self_attn/v_proj/kernel": (16, 8),
    "self_attn/o_proj/kernel": (16, 16),
    "mlp/gate_proj/kernel": (16, 24),
    "mlp/up_proj/kernel": (16, 24),
    "mlp/down_proj/kernel": (24, 16),
    "input_layernorm/scale": (16,),
    "post_attention_layernorm/scale": (16,),
}


def test_the_parameter_trees():
    model = models.from_config(content("llama"), head="causal_lm")
    body = {"embed_tokens/embedding": (64, 16), "norm/scale": (16,)}
    assert shapes(models.abstract(model)) == {
        **body,
        **{f"layers/layer_0/{path}": shape for path, shape in LAYER.items()},
        **{f"layers/layer_1/{path}": shape for path, shape in LAYER.items()},
        "lm_head/kernel": (16, 64),
    }
    scanned = model.clone(scan_layers=True, head="classification", num_labels=3)
    assert shapes(models.abstract(scanned)) == {
        **body,
        **{f"layers/layer/{path}": (2, *shape) for path, shape in LAYER.items()},
        "score/kernel": (16, 3),
    }
    stacks = [p for p, s in shapes(models.abstract(scanned)).items() if len(s) == 3]
    ((pattern, roles),) = scanned.axes.items()
    assert roles == "layer in out" and model.axes == {}
    assert len(stacks) == 7 and all(re.fullmatch(pattern, path) for path in stacks)
    phi3 = shapes(models.abstract(models.from_config(content("phi3"))))
    assert phi3["layers/layer_0/self_attn/qkv_proj/kernel"] == (16, 32)
    assert phi3["layers/layer_0/mlp/gate_up_proj/kernel"] == (16, 48)
    gpt2 = shapes(models.abstract(models.from_config(content("gpt2"))))
    assert gpt2["h/layer_1/attn/c_attn/kernel"] == (16, 48)
    assert gpt2["h/layer_1/mlp/c_proj/bias"] == (16,)


def test_golden_counts_cost_no_memory():
    """Published sizes: Llama 3.1 8B, SmolLM2-135M, GPT-2, Gemma 3 270M."""
    smol = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    llama = {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    }
    gemma = {
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "num_attention_heads": 4,
    }
    for model_type, sizes, count in (
        ("llama", llama, 8_030_261_248),
        ("llama", smol, 134_515_008),
        ("gpt2", {}, 124_439_808),
        ("gemma3_text", gemma, 268_098_176),
    ):
        model = models.from_config(
            {"model_type": model_type, **sizes}, head="causal_lm", scan_layers=True
        )
        leaves = jax.tree.leaves(models.abstract(model))
        assert sum(leaf.size for leaf in leaves) == count


def loss_of(model, **inputs):
    def loss(params):
        logits, states = model.apply({"params": params}, hidden_states=True, **inputs)
        return jnp.square(logits).sum() + jnp.sin(states).sum(), states

    return jax.value_and_grad(loss, has_aux=True)


def test_scanned_equals_unrolled(made):
    model, params = made("gemma3")
    ids, mask = texts()
    inputs = {"input_ids": ids, "attention_mask": mask}
    (want, states), grads = jax.jit(loss_of(model, **inputs))(params)
    layers = model.config.num_hidden_layers
    (got, states_), grads_ = jax.jit(loss_of(model.clone(scan_layers=True), **inputs))(
        stack_layers(params, layers)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(states_, states, atol=1e-4)
    assert_trees_close(grads_, stack_layers(grads, layers), rtol=1e-3, atol=1e-2)


def count_dots(jaxpr):
    return len(re.findall(r"dot_general\[", str(jaxpr)))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_memory_not_numbers(made, scan_layers):
    model, params = made("qwen3")
    ids, mask = texts()
    plain = model.clone(scan_layers=scan_layers)
    params = stack_layers(params, 2) if scan_layers else params
    steps = {
        remat: loss_of(plain.clone(remat=remat), input_ids=ids, attention_mask=mask)
        for remat in (None, "dots", "names", "dots_no_batch", "full")
    }
    dots = {
        remat: count_dots(jax.make_jaxpr(step)(params)) for remat, step in steps.items()
    }
    layers = 1 if scan_layers else 2
    assert dots["dots"] == dots[None]  # every product is kept
    # scores and mixed values are computed again; not so the projections
    assert dots["names"] == dots["dots_no_batch"] == dots[None] + 2 * layers
    # all but the last projection, whose result no gradient needs
    assert dots["full"] == dots[None] + 8 * layers
    if scan_layers:
        wanted = jax.jit(steps[None])(params)[1]
        got = jax.jit(steps["names"])(params)[1]
        assert_trees_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_names_keep_what_adapters_scale(made, monkeypatch):
    """Under remat by name no projection runs again for the gradient of its scale."""
    model, params = made("llama")
    ids, _ = texts()
    adapted = jp.attach(
        params, jp.dora(rank=2), ["o_proj", "down_proj"], key=jax.random.key(0)
    )
    trainable, frozen = jp.partition(adapted)

    def dots(**changes):
        forward = jp.adapt(model.clone(**changes).apply)

        def loss(trainable):
            return forward({"params": jp.combine(trainable, frozen)}, ids).sum()

        return count_dots(jax.make_jaxpr(jax.grad(loss))(trainable))

    kept = dots(remat="names")
    only = jax.checkpoint_policies.save_only_these_names("projection")
    monkeypatch.setitem(_parts.REMAT, "names", only)
    assert dots(remat="names") >= kept + 4  # both projections of both layers


@pytest.mark.parametrize(
    ("case", "param_dtype"), [("llama", "bfloat16"), ("gemma2", "float32")]
)
def test_bfloat16(case, param_dtype):
    exact = models.from_config(content(case, initializer_range=0.1), head="causal_lm")
    params = models.init(exact, jax.random.key(0))
    ids, mask = texts()
    wanted = jax.jit(exact.apply)({"params": params}, ids, mask)
    model = exact.clone(dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    cast = jax.tree.map(lambda x: x.astype(param_dtype), params)
    run = jax.jit(lambda tree: model.apply(tree, ids, mask, hidden_states=True))
    logits, states = run({"params": cast})
    assert logits.dtype == jnp.float32 and states.dtype == jnp.bfloat16
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(logits != rounded) > 0.9  # added up in float32, and left there
    error = np.abs(logits - wanted)[mask.astype(bool)].max()
    assert 0 < error < 0.05 * np.abs(wanted).max()  # measured: up to 0.02


@pytest.mark.parametrize("case", ["gemma3", "gpt2"])
def test_packed_texts_are_texts_alone(made, case):
    model, params = made(case)
    parts = np.random.default_rng(1).integers(3, 64, (3, 6)).astype(np.int32)
    alone = model.apply({"params": params}, parts).reshape(1, 18, 64)
    packed = parts.reshape(1, 18)
    segments, positions = np.repeat(np.arange(3), 6)[None], np.arange(18)[None] % 6
    inputs = {"positions": positions, "segment_ids": segments}

    def run(model, params, **inputs):
        return jax.jit(model.apply)({"params": params}, packed, **inputs)

    np.testing.assert_allclose(run(model, params, **inputs), alone, atol=2e-5)
    stacked = stack_layers(params, model.config.num_hidden_layers)
    scanned = run(model.clone(scan_layers=True), stacked, **inputs)
    np.testing.assert_allclose(scanned, alone, atol=2e-5)
    assert np.abs(run(model, params, positions=positions) - alone).max() > 0.01
    if case == "gpt2":
        assert np.abs(run(model, params, segment_ids=segments) - alone).max() > 0.01


def test_causality(made):
    """No gradient from what comes later, nor from outside of the windows."""
    model, params = made("llama")
    embed = params["embed_tokens"]["embedding"]
    ids = np.arange(3, 15, dtype=np.int32)[None]  # every token once

    def picked(table, model):
        tree = {**params, "embed_tokens": {"embedding": table}}
        body = model.clone(head=None).apply({"params": tree}, ids)
        return body[0, 8].sum()

    moves = jax.jit(jax.grad(picked), static_argnums=1)
    moved = np.abs(moves(embed, model)).sum(1)[3:15]
    assert np.all(moved[9:] == 0) and np.all(moved[1:9] > 0)
    one = dataclasses.replace(model.config, layer_types=("sliding_attention",) * 2)
    windowed = dataclasses.replace(one, sliding_window=3)
    model = model.clone(config=windowed)
    moved = np.abs(moves(embed, model)).sum(1)[3:15]
    assert np.all(moved[:4] == 0) and np.all(moved[4:9] > 0)  # two layers of three


def test_padding_is_not_seen(made):
    model, params = made("llama")
    for side in ("left", "right"):
        ids, mask = texts(side)
        other = np.where(mask, ids, 9).astype(np.int32)
        real = mask.astype(bool)
        one, two = (model.apply({"params": params}, x, mask) for x in (ids, other))
        np.testing.assert_array_equal(one[real], two[real])
        assert np.all(np.isfinite(one)) and np.any(one[~real] != two[~real])


def test_a_part_of_the_logits(made):
    model, params = made("gemma2")
    ids, mask = texts()
    body = model.clone(head=None)
    hidden = body.apply({"params": params}, ids, mask)
    part = model.apply({"params": params}, hidden[:, -1:], method="logits")
    whole = model.apply({"params": params}, ids, mask)
    np.testing.assert_array_equal(part, whole[:, -1:])
    assert np.abs(whole).max() <= 5  # the cap
    with pytest.raises(ValueError, match="`head` is None; only head='causal_lm'"):
        body.apply({"params": params}, hidden, method="logits")


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3", "gpt2"])
def test_adapters_attach_by_their_names(made, case):
    """On every family: what runs beside the kernels equals what is merged."""
    model, params = made(case)
    ids, mask = texts()
    names = {
        "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "gpt2": ["attn/c_attn", "attn/c_proj", "c_fc", "mlp/c_proj"],
    }.get(model.config.model_type, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    adapted = jp.attach(params, jp.lora(rank=2), names, key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    trainable = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(next(keys), x.shape), trainable
    )
    adapted = jp.combine(trainable, frozen)
    forward = jax.jit(lambda tree: jp.adapt(model.apply)({"params": tree}, ids, mask))
    plain = jax.jit(lambda tree: model.apply({"params": tree}, ids, mask))
    merged, base = plain(jp.merge(adapted)), plain(params)
    real = mask.astype(bool)
    limit = 2e-5 * max(1, np.abs(merged).max())
    np.testing.assert_allclose(forward(adapted)[real], merged[real], atol=limit)
    assert np.abs(merged - base)[real].max() > 0.05


def test_adapters_on_a_scanned_stack_and_a_tied_table(made):
    model, params = made("llama-tied-llama3-rope")
    ids, _ = texts()
    model, params = model.clone(scan_layers=True), stack_layers(params, 2)
    adapted = jp.attach(
        params,
        jp.lora(rank=2),
        ["q_proj", "down_proj", "embed_tokens"],
        key=jax.random.key(0),
        axes=model.axes,
    )
    trainable, frozen = jp.partition(adapted)
    adapted = jp.combine(jax.tree.map(lambda x: x + 0.2, trainable), frozen)
    got = jax.jit(lambda tree: jp.adapt(model.apply)({"params": tree}, ids))(adapted)
    wanted = model.apply({"params": jp.merge(adapted)}, ids)
    limit = 2e-5 * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, atol=limit)


def test_dropout(made):
    config = content("gpt2")
    ids, mask = texts()
    model, params = made("gpt2")

    def run(model, seed):
        return model.apply(
            {"params": params},
            ids,
            mask,
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
        )

    assert np.all(run(model, 0) == run(model, 0))
    assert np.abs(run(model, 0) - run(model, 1)).max() > 1e-3
    off = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    calm = models.from_config({**config, **off}, head="causal_lm")
    plain = model.apply({"params": params}, ids, mask)
    np.testing.assert_allclose(run(calm, 0), plain, atol=1e-6)
    for name in off:  # each of the three acts
        one = models.from_config({**config, **off, name: 0.5}, head="causal_lm")
        assert np.abs(run(one, 0) - plain).max() > 1e-3, name


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"type": "proportional", "factor": 2}},
            "rope_type 'proportional', which is not implemented; known are .*'yarn'",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic"}},
            "rope_type 'dynamic' with 'factor' None; write a number",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            r"'longrope' with 'short_factor' \[1.0\]; write a list of 2 numbers",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is"),
        ("llama", {"auto_map": {"AutoModel": "x"}}, "'auto_map' is"),
        ("llama", {"is_causal": False}, "'is_causal' is False"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish'; known are"),
        ("llama", {"num_key_value_heads": 3}, "4 is no multiple of 'num_key_value"),
        ("llama", {"hidden_size": 18}, "'hidden_size' 18 is no multiple of"),
        ("qwen3", {"layer_types": ["full_attention"]}, "each of the 2 layers"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "but no 'sliding_win"),
        ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_atte"),
        ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        (
            "mistral",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "'rope_parameters' differs by kind",
        ),
    ],
)
def test_configs_that_are_refused(case, changes, message):
    with pytest.raises(ValueError, match=message):
        models.from_config(content(case, **changes))


def test_early_names_of_longrope():
    config = content("phi3-longrope-long")
    wanted = models.from_config(config).config.rope
    for name in ("su", "yarn"):
        config["rope_scaling"] = {**config["rope_scaling"], "rope_type": name}
        assert models.from_config(config).config.rope == wanted


def test_arguments_that_are_refused(made):
    model, params = made("llama")
    with pytest.raises(ValueError, match="`head` is 'lm'; known are .*'causal_lm'"):
        models.from_config(content("llama"), head="lm")
    with pytest.raises(ValueError, match="`attention` is 'flash'; known are"):
        model.clone(attention="flash")
    capped, weights = made("gemma2")
    with pytest.raises(ValueError, match="'cudnn', which has no soft caps"):
        capped.clone(attention="cudnn").apply({"params": weights}, texts()[0])
    with pytest.raises(ValueError, match="`num_labels` is 2 but `head` is 'causal_lm'"):
        models.from_config(content("llama"), head="causal_lm", num_labels=2)
    long = np.full((1, 41), 5, np.int32)
    with pytest.raises(ValueError, match="41 tokens; the model allows 40. Truncate"):
        model.apply({"params": params}, long)
    given = model.apply({"params": params}, long, positions=np.arange(41)[None] % 40)
    assert given.shape == (1, 41, 64)
    assert np.isnan(model.apply({"params": params}, np.array([[64]], np.int32))).any()


def test_a_classifier_reads_the_last_token_of_the_mask():
    """Also where that is the token rows are padded with, a text's end; without a
    mask its id is all there is to go by, as in transformers."""
    config = content("llama", pad_token_id=2)
    model = models.from_config(config, head="classification", num_labels=3)
    params = models.init(model, jax.random.key(0))
    run = lambda *inputs: model.apply({"params": params}, *inputs)
    ids = np.array([[5, 9, 2, 2, 2], [7, 2, 8, 9, 4]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    found = run(ids, mask)
    alone = run(ids[:1, :3], mask[:1, :3])
    np.testing.assert_allclose(found[:1], alone, atol=1e-5)
    other = run(ids[:1, :2], mask[:1, :2])
    assert np.abs(other - found[:1]).max() > 1e-3
    np.testing.assert_allclose(run(ids)[:1], other, atol=1e-5)
