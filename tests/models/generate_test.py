"""Generation: transformers' greedy tokens, adapted trees, draws and stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_toolbox import content

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.models._generate import keep_likely

PROMPTS = [[5, 9, 33, 2, 17], [7], [60, 3, 8]]


@pytest.fixture(scope="module")
def llama():
    model = models.from_config(content("llama"), head="causal_lm", scan_layers=True)
    params = models.init(model, jax.random.key(0))
    # Wider than at a real start, so that the likeliest token is far from the next.
    return model, jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)


@pytest.mark.interop
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(family, tmp_path):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**content(family))
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path, head="causal_lm")
    got = models.generate(model, params, PROMPTS, max_new_tokens=9)
    for prompt, row in zip(PROMPTS, got, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert out[0, len(prompt) :].tolist() == row


def test_adapted_trees_say_what_their_merge_says(llama):
    """Low-rank, scaled and frozen: the adapter acts in prefill and in every step."""
    model, params = llama
    base = models.generate(model, params, PROMPTS, max_new_tokens=6)
    for adapter in (jp.lora(2), jp.bora(2)):
        adapted = jp.attach(
            params,
            adapter,
            ["q_proj", "down_proj"],
            key=jax.random.key(1),
            axes=model.axes,
        )
        assert models.generate(model, adapted, PROMPTS, max_new_tokens=6) == base
        trainable, frozen = jp.partition(adapted)
        keys = iter(jax.random.split(jax.random.key(2), 99))
        move = lambda x: x + jax.random.normal(next(keys), x.shape)  # noqa: B023
        adapted = jp.combine(jax.tree.map(move, trainable), frozen)
        got = models.generate(model, adapted, PROMPTS, max_new_tokens=6)
        merged = jp.merge(adapted)
        assert got == models.generate(model, merged, PROMPTS, max_new_tokens=6)
        assert got != base


def test_stops_and_lengths(llama):
    model, params = llama
    whole = models.generate(model, params, PROMPTS, max_new_tokens=12)
    assert [len(row) for row in whole] == [12, 12, 12]
    short = models.generate(model, params, PROMPTS, max_new_tokens=4)
    assert short == [row[:4] for row in whole]
    end = whole[0][5]
    stopped = models.generate(model, params, PROMPTS, max_new_tokens=12, stop=[end, 63])
    for row, cut in zip(whole, stopped, strict=True):
        at = min((i for i, t in enumerate(row) if t in (end, 63)), default=12)
        assert cut == row[:at]
    assert len(stopped[0]) <= 5
    alone = [models.generate(model, params, [p], max_new_tokens=4)[0] for p in PROMPTS]
    assert alone == short


def test_draws_follow_the_model(llama):
    model, params = llama
    draw = lambda seed, **options: models.generate(
        model,
        params,
        [[5, 9]] * 64,
        max_new_tokens=1,
        key=jax.random.key(seed),
        **options,
    )
    first = draw(0, temperature=2.0)
    assert first == draw(0, temperature=2.0) != draw(1, temperature=2.0)
    logits = model.apply({"params": params}, jnp.array([[5, 9]]))[0, -1]
    shares = np.asarray(jax.nn.softmax(logits / 2))
    seen = np.bincount([t for row in first for t in row], minlength=64) / 64
    assert np.abs(seen - shares).max() < 0.2  # 64 draws: 3 deviations are 0.19
    likeliest = np.argsort(-shares)
    two = draw(0, temperature=2.0, top_k=2)
    assert {t for row in two for t in row} == set(likeliest[:2].tolist())
    greedy = draw(0, temperature=2.0, top_p=1e-6)
    assert {t for row in greedy for t in row} == {int(likeliest[0])}


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 2e-38, 1e-20, 1e-3])
def test_a_small_temperature_takes_the_likeliest(llama, temperature):
    """Where it is 0 in float32, where a logit over it is infinite, and above."""
    model, params = llama
    key = jax.random.key(0)
    go = lambda **more: models.generate(
        model, params, PROMPTS, max_new_tokens=6, stop=(), **more
    )
    assert go(temperature=temperature, key=key) == go()
    assert go(temperature=3.0, key=key) != go()  # control


def test_a_high_temperature_is_even(llama):
    model, params = llama
    largest = float(np.finfo(np.float32).max)
    rows = models.generate(
        model,
        params,
        [[5, 9]] * 256,
        max_new_tokens=1,
        stop=(),
        temperature=largest,
        key=jax.random.key(0),
    )
    assert len({token for row in rows for token in row}) > 50  # of 64; 63 on average


def test_the_fewest_tokens_that_reach_top_p():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    kept = lambda **cut: np.isfinite(keep_likely(logits, **cut))[0].tolist()
    assert kept(top_k=4, top_p=1.0) == [True] * 4
    assert kept(top_k=4, top_p=0.7) == [False, True, False, True]
    assert kept(top_k=4, top_p=0.76) == [False, True, True, True]
    assert kept(top_k=1, top_p=0.9) == [False, True, False, False]
    # Of the three that are left, 0.5 and 0.25 have 5/6 of what is left.
    assert kept(top_k=3, top_p=0.8) == [False, True, False, True]
    for top_p in np.float32([1e-45, 0.0]):  # what 1e-60 is in float32
        assert kept(top_k=4, top_p=top_p) == [False, True, False, False]


def test_bad_arguments(llama):
    model, params = llama
    go = lambda **change: models.generate(
        model,
        params,
        change.pop("prompts", PROMPTS),
        **{"max_new_tokens": 4} | change,
    )
    room = model.config.max_position_embeddings
    for change, message in (
        ({"prompts": [[]]}, "at least one token id each"),
        ({"prompts": [[64]]}, "outside of 0 to 63"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ({"max_new_tokens": room}, f"more than the {room} the model allows"),
        ({"temperature": 1.0}, "`key` is needed"),
        ({"top_k": 3}, "change nothing at temperature 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
        ({"temperature": float("nan")}, "`temperature` must be at least 0 and finite"),
        ({"temperature": float("inf")}, "`temperature` must be at least 0 and finite"),
        ({"temperature": 1e39}, "finite in float32, got 1e"),
        ({"temperature": 1.0, "top_p": float("nan")}, r"`top_p` must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            go(**change)
    with pytest.raises(ValueError, match="with a language-model head"):
        models.generate(model.clone(head=None), params, PROMPTS, max_new_tokens=1)
