"""Prefill and decoding with a cache are the full forward, a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_toolbox import content, texts

from jaxpeft import models


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    [("llama", False), ("gemma2", True), ("gpt2", False)],
)
def test_pieces_equal_the_whole(case, scan_layers):
    model = models.from_config(content(case), head="causal_lm", scan_layers=scan_layers)
    params = models.init(model, jax.random.key(0))
    ids, mask = texts("left", tokens=12)
    real = mask.astype(bool)
    whole = jax.jit(model.apply)({"params": params}, ids, mask)

    @jax.jit
    def step(cache, ids, mask):
        return model.apply({"params": params}, ids, mask, cache=cache)

    cache = models.init_cache(model, 3, 20)
    pieces = []
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        part = slice(start, stop)
        logits, cache = step(cache, ids[:, part], mask[:, part])
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)
    limit = 2e-5 * max(1, np.abs(whole).max())
    np.testing.assert_allclose(got[real], whole[real], atol=limit)
    assert cache["index"] == 12
    np.testing.assert_array_equal(cache["mask"][:, :12], real)
    assert not cache["mask"][:, 12:].any()
    if case != "gpt2":  # its positions are learned
        return
    # Rows that start at 0 behind their padding are the texts without padding.
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits, _ = model.apply(
        {"params": params},
        ids,
        mask,
        positions=positions,
        cache=models.init_cache(model, 3, 20),
    )
    alone = model.apply({"params": params}, ids[1:2, 6:])
    assert real[1].sum() == 6
    np.testing.assert_allclose(logits[1:2, 6:], alone, atol=2e-5)


def test_the_cache_is_a_tree_of_shapes_that_stay():
    model = models.from_config(content("qwen3"), head="causal_lm")
    params = models.abstract(model)
    cache = jax.eval_shape(lambda: models.init_cache(model, 3, 9, jnp.bfloat16))
    assert cache["layers"]["layer_1"]["key"].shape == (3, 9, 2, 6)
    assert cache["layers"]["layer_1"]["key"].dtype == jnp.bfloat16
    ids = jax.ShapeDtypeStruct((3, 4), jnp.int32)
    run = lambda params, ids, cache: model.apply(
        {"params": params}, ids, cache=cache, hidden_states=True
    )
    (logits, states), after = jax.eval_shape(run, params, ids, cache)
    assert logits.shape == (3, 4, 64) and states.shape == (3, 3, 4, 16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )
    stacked = models.init_cache(model.clone(scan_layers=True), 3, 9)
    assert stacked["layers"]["layer"]["value"].shape == (2, 3, 9, 2, 6)


def test_tokens_that_do_not_fit_show():
    model = models.from_config(content("llama"), head="causal_lm")
    params = models.init(model, jax.random.key(0))
    step = jax.jit(lambda cache, ids: model.apply({"params": params}, ids, cache=cache))
    ids = np.full((2, 3), 5, np.int32)
    logits, cache = step(models.init_cache(model, 2, 5), ids)
    assert np.isfinite(logits).all()
    logits, _ = step(cache, ids)
    assert np.isnan(logits).all()


def test_refusals():
    model = models.from_config(content("llama"), head="causal_lm")
    params = models.init(model, jax.random.key(0))
    ids = np.full((2, 3), 5, np.int32)
    with pytest.raises(ValueError, match="`length` is 41.*at most the 40 tokens"):
        models.init_cache(model, 2, 41)
    longer = models.from_config(content("phi3-longrope-long"), head="causal_lm")
    assert models.init_cache(longer, 2, 10)["mask"].shape == (2, 10)
    with pytest.raises(ValueError, match="`length` is 11.*10 tokens up to which its"):
        models.init_cache(longer, 2, 11)
    with pytest.raises(ValueError, match="`model` is a 'bert', which has no cache"):
        models.init_cache(models.from_config({"model_type": "bert"}), 2, 8)
    for rows, slots in ((2, 2), (3, 8)):
        cache = models.init_cache(model, rows, slots)
        with pytest.raises(ValueError, match=rf"\[2, 3\].*{rows} rows of {slots} slot"):
            model.apply({"params": params}, ids, cache=cache)
    with pytest.raises(ValueError, match="`segment_ids` and `cache` do not go"):
        model.apply({"params": params}, ids, cache=cache, segment_ids=ids)
