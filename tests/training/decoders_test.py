"""Decoders on a mesh: the tensor axis cuts them, and the numbers stay."""

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import models, training

SIZES = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    ("sizes", "tokens"), [((2, 2, 2), 11), ((2, 1, 2, 2), 12)], ids=str
)
def test_a_mesh_changes_no_number(sizes, tokens):
    """Scanned, windows alternating, padded, with a head and adapters."""
    model = models.from_config(
        SIZES, head="classification", num_labels=3, scan_layers=True
    )
    params = models.init(model, jax.random.key(0))
    adapted = jp.attach(
        params, jp.lora(rank=2), "all-linear", key=jax.random.key(1), axes=model.axes
    )
    trainable, frozen = jp.partition(adapted)
    adapted = jp.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    ids = np.random.default_rng(0).integers(3, 64, (8, tokens)).astype(np.int32)
    mask = (np.arange(tokens)[None] < np.arange(4, 12)[:, None]).astype(np.int32)
    wanted = jax.jit(jp.adapt(model.apply))({"params": adapted}, ids, mask)
    mesh = training.make_mesh(*sizes)
    specs = training.param_specs(params, mesh, axes=model.axes)
    placed = training.place(adapted, mesh, specs)
    forward = training.model_forward(model, mesh=mesh)
    batch = {"input_ids": ids, "attention_mask": mask}
    got = jax.jit(lambda tree: forward(tree, batch, None)[0])(placed)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    layer = specs["layers"]["layer"]
    assert tuple(layer["self_attn"]["q_proj"]["kernel"]) == (None, "fsdp", "tensor")
    assert tuple(layer["mlp"]["down_proj"]["kernel"]) == (None, "tensor", "fsdp")


def test_what_is_fused_is_not_cut():
    mesh = training.make_mesh(data=2, fsdp=2, tensor=2)
    model = models.from_config({"model_type": "gpt2", "n_layer": 1})
    specs = training.param_specs(models.abstract(model), mesh)["h"]["layer_0"]
    found = {name: tuple(part["kernel"]) for name, part in specs["mlp"].items()}
    assert found == {"c_fc": ("fsdp", "tensor"), "c_proj": ("tensor", "fsdp")}
    assert "tensor" not in specs["attn"]["c_attn"]["kernel"]


def test_what_cannot_have_its_tokens_cut_is_refused():
    """By name, and before anything is compiled."""
    mesh = training.make_mesh(sequence=4)
    encoder = models.from_config({"model_type": "bert"}, head="classification")
    with pytest.raises(ValueError, match="sequence=4, but the tokens of a Bert cannot"):
        training.objective(encoder, mesh=mesh)
    model = models.from_config(SIZES, head="causal_lm")
    with pytest.raises(ValueError, match="not cut rows of 6 and 9 .* such as 8, or"):
        training.check_tokens(model, mesh, 6, 8, 9)
    forward, _ = training.objective(model, mesh=mesh)
    params, ids = models.abstract(model), np.ones((2, 6), np.int32)
    batch = {"input_ids": ids, "targets": ids, "target_weights": ids}
    with pytest.raises(ValueError, match="does not cut rows of 6 tokens; pad them"):
        jax.eval_shape(lambda params: forward(params, batch, None), params)
    cache = models.init_cache(model, 2, 8)
    run = lambda model, **given: jax.eval_shape(
        lambda p: model.apply({"params": p}, np.ones((2, 8), np.int32), **given), params
    )
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="`cache` and a mesh with sequence=4"):
            run(model, cache=cache)
        with pytest.raises(ValueError, match="'cudnn', which takes whole rows"):
            run(model.clone(attention="cudnn"))
        with pytest.raises(ValueError, match="128 tokens for each of sequence=4, not"):
            run(model.clone(attention="splash"))
