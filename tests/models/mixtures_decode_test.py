"""Mixtures in a decoder with a cache: every token is routed by itself."""

import jax
import numpy as np
import pytest
from adapt_toolbox import perturb
from decoder_toolbox import content, texts

import jaxpeft as jp
from jaxpeft import mixtures, models

TARGETS = ["q_proj", "down_proj"]
MORE = 3


@pytest.fixture(scope="module")
def llama():
    model = models.from_config(content("llama"), head="causal_lm", scan_layers=True)
    params = models.init(model, jax.random.key(0))
    # Wider than at a real start, so that the likeliest token is far from the next.
    return model, jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


def routed(llama, adapter):
    """A mixture away from its start, under its router."""
    model, params = llama
    run = lambda params, key: jp.attach(params, adapter, TARGETS, key=key, axes=axes)
    axes = model.axes
    adapted = perturb(jax.jit(run)(params, jax.random.key(1)), scale=1.0)
    has_stages = "stage" in dict(adapter.options)
    return mixtures.stage(adapted, "router") if has_stages else adapted


@pytest.mark.parametrize(
    "adapter",
    [jp.mosld(2, experts=3), jp.modula_res(("law", "code"), rank=2, rank_universal=3)],
    ids=["mosld", "modula_res"],
)
def test_decoding_piece_by_piece_is_the_whole(llama, adapter):
    model, params = llama
    adapted = routed(llama, adapter)
    ids, mask = texts("left", tokens=8)
    real = mask.astype(bool)
    forward = jp.adapt(model.apply)
    run = jax.jit(lambda tree, ids, mask: forward({"params": tree}, ids, mask))
    whole = np.asarray(run(adapted, ids, mask))
    base = np.asarray(run(params, ids, mask))
    limit = 2e-5 * max(1, np.abs(whole).max())
    assert np.abs(whole - base)[real].max() > 1e3 * limit  # control

    @jax.jit
    def step(tree, cache, ids, mask):
        return forward({"params": tree}, ids, mask, cache=cache)

    cache, pieces = models.init_cache(model, len(ids), 12), []
    for start, stop in ((0, 6), (6, 7), (7, 8)):
        part = slice(start, stop)
        logits, cache = step(adapted, cache, ids[:, part], mask[:, part])
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(got[real], whole[real], atol=limit)

    # What is written after a text is the whole's likeliest next token, each time.
    prompts = [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]
    prompts = [prompt[: len(prompt) - MORE] or prompt[:1] for prompt in prompts]
    written = models.generate(model, adapted, prompts, max_new_tokens=MORE)
    again, keep = np.zeros_like(ids), np.zeros_like(mask)
    for row, prompt in enumerate(prompts):
        text = [*prompt, *written[row]][:8]
        again[row, -len(text) :], keep[row, -len(text) :] = text, 1
    likeliest = np.asarray(run(adapted, again, keep)).argmax(-1)
    for row in range(len(ids)):
        assert likeliest[row, -MORE - 1 : -1].tolist() == written[row]
    plain = models.generate(model, params, prompts, max_new_tokens=MORE)
    assert plain != written
