"""Pooled hidden states: of our models, of others, and kept in files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_toolbox import GPT2, SIZES

import jaxpeft as jp
from jaxpeft import dimension, models

CLOSE = 2e-5  # measured 1e-6
IDS = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 3, 3]])
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2])
RIGHT = {"input_ids": IDS, "attention_mask": MASK}
LEFT = {
    "input_ids": np.array([IDS[0], [3, 4, 11, 12, 13, 14]]),
    "attention_mask": np.array([MASK[0], [0, 0, 1, 1, 1, 1]]),
}


def tiny(kind, scan_layers=False):
    sizes = SIZES if kind == "llama" else GPT2
    model = models.from_config(
        {"model_type": kind, **sizes}, head="causal_lm", scan_layers=scan_layers
    )
    return model, models.init(model, jax.random.key(0))


def far(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_does_not_matter(kind):
    """On either side, whatever it holds; state by state from the model's own."""
    model, params = tiny(kind)
    garbage = RIGHT | {"input_ids": np.where(MASK == 1, IDS, 60)}
    _, whole = model.clone(head=None).apply(
        {"params": params}, IDS[1:, :4], hidden_states=True
    )
    by_hand = {"mean": whole.mean(2), "last": whole[:, :, -1], "first": whole[:, :, 0]}
    for how, expected in by_hand.items():
        run = models.pooled_states(model, how=how, final="post_norm")
        right = run(params, RIGHT)
        assert right.shape == (3, 2, 16)
        assert right.dtype == jnp.float32
        assert far(right[:, 1:], expected) < CLOSE
        assert far(right, run(params, LEFT)) < CLOSE
        assert far(right, run(params, garbage)) < CLOSE
        unmasked = RIGHT | {"attention_mask": np.ones_like(MASK)}
        assert how == "first" or far(right, run(params, unmasked)) > 1e-2  # control
    alone = run(params, {name: x[1:] for name, x in RIGHT.items()})
    assert far(right[:, 1:], alone) < CLOSE


@pytest.mark.parametrize("how", ["mean", "last", "first"])
def test_states_of_padding_may_be_no_numbers(how):
    mask = np.array([[1, 1, 1, 0], [0, 0, 1, 1]])
    states = jnp.arange(24.0).reshape(2, 4, 3)
    hidden, *others = (
        dimension.pool(jnp.where(mask[:, :, None], states, bad), mask, how)
        for bad in (0.0, np.nan, np.inf)
    )
    assert np.all(np.isfinite(hidden))
    for other in others:
        np.testing.assert_array_equal(other, hidden)


def test_before_and_after_the_final_norm():
    model, params = tiny("llama")
    before, after = (
        models.pooled_states(model, how="last", final=final)(params, RIGHT)
        for final in ("pre_norm", "post_norm")
    )
    assert far(before[:-1], after[:-1]) == 0
    size = np.sqrt(np.mean(np.square(before[-1]), -1, keepdims=True))
    normed = before[-1] / size * params["norm"]["scale"][None]
    assert far(normed, after[-1]) < 1e-4
    assert far(before[-1], after[-1]) > 1e-1


def test_scanned_and_adapted():
    model, params = tiny("llama")
    stacked, _ = tiny("llama", scan_layers=True)
    layers = [params["layers"][f"layer_{i}"] for i in range(2)]
    both = {"layer": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    expected = models.pooled_states(model)(params, RIGHT)
    run = models.pooled_states(stacked)
    assert far(run(params | {"layers": both}, RIGHT), expected) < CLOSE
    adapted = jp.attach(params, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    trainable, frozen = jp.partition(adapted)
    adapted = jp.combine(jax.tree.map(lambda x: x + 0.1, trainable), frozen)
    states = models.pooled_states(model)
    moved = states(adapted, RIGHT)
    assert far(moved, states(jp.merge(adapted), RIGHT)) < CLOSE
    assert far(moved, expected) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_and_what_follows_them(kind):
    """The last token's states, and logits of some tokens, whatever padding holds."""
    model, params = tiny(kind)
    run = models.prompt_states(model)
    asked = np.array([[7, 3, 9], [1, 2, 7]], np.int32)
    states, logits = run(params, RIGHT, asked)
    pooled = models.pooled_states(model, how="last", final="post_norm")(params, RIGHT)
    assert far(states, pooled) == 0
    garbage = RIGHT | {"input_ids": np.where(MASK == 1, IDS, 60)}
    for row, length in enumerate((6, 4)):
        whole = model.apply({"params": params}, IDS[row : row + 1, :length])
        assert far(logits[row], whole[0, -1, asked[row]]) < CLOSE
    for other in (LEFT, garbage):
        found = run(params, other, asked)
        assert far(found[0], states) < CLOSE and far(found[1], logits) < CLOSE
    assert far(logits, run(params, RIGHT, asked[::-1])[1]) > 1e-2  # control
    before = models.prompt_states(model, final="pre_norm")(params, RIGHT, asked)
    assert far(before[0][-1], states[-1]) > 1e-1  # what is read out stays normed
    assert far(before[1], logits) == 0


def test_refusals():
    model, params = tiny("llama")
    with pytest.raises(ValueError, match="head='causal_lm'; got Decoder with"):
        models.prompt_states(model.clone(head=None))
    with pytest.raises(ValueError, match="`final` must be one of"):
        models.pooled_states(model, final="normed")
    with pytest.raises(ValueError, match="packed texts"):
        models.pooled_states(model)(params, RIGHT | {"segment_ids": MASK})
    with pytest.raises(ValueError, match="`how` must be one of"):
        models.pooled_states(model, how="max")(params, RIGHT)


def test_any_model_through_capture():
    """What the kernels of a foreign model read, pooled where it arises."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jnp.stack([jax.random.normal(k, (4, 4)) for k in keys])}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)

    @jax.jit
    def step(x):
        reduce = lambda x: dimension.pool(x, MASK, "last")
        return jp.capture(fn, ["w"], reduce)(params, x)[1]["w"]

    inner = jnp.tanh(x @ params["w"][0])
    expected = jnp.stack([x, inner])[:, jnp.arange(2), jnp.array([5, 3])]
    assert far(step(x), expected) < CLOSE


def test_collected_in_files(tmp_path):
    """Stopped and resumed, with rows that only fill up: the same files."""
    model, params = tiny("llama")
    ids = np.random.default_rng(0).integers(3, 60, (10, 6))
    states = functools.partial(models.pooled_states(model), params)
    step = lambda batch: states(batch)
    batches = [
        {"input_ids": ids[i : i + 4], "attention_mask": np.ones((4, 6), int)}
        | {"valid": np.arange(i, i + 4) < 9}
        for i in (0, 4)
    ]
    batches.append(batches[0] | {"input_ids": ids[[8, 9, 9, 9]]})
    batches[2]["valid"] = np.arange(8, 12) < 9
    valid = lambda batch: batch["valid"]
    options = {"rows": 9, "valid": valid, "note": {"seed": 0}, "progress": False}
    whole = dimension.collect(step, batches, tmp_path / "a", **options)
    assert len(whole) == 3
    x = np.stack(list(whole))
    assert x.shape == (3, 9, 16)
    one = {"input_ids": ids[:9], "attention_mask": np.ones((9, 6), int)}
    assert far(x, states(one)) < CLOSE
    assert [e.n_used for e in dimension.id_profile(whole)] == [9] * 3

    def failing(batch):
        if batch is batches[1]:
            raise RuntimeError("out of memory")
        return step(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        dimension.collect(failing, batches, tmp_path / "b", **options)
    with pytest.raises(FileNotFoundError, match="no complete states"):
        dimension.LayerFiles(tmp_path / "b")
    seen = []
    resumed = dimension.collect(
        lambda batch: (seen.append(batch), step(batch))[1],
        batches,
        tmp_path / "b",
        **options,
    )
    assert len(seen) == 2
    assert np.array_equal(np.stack(list(resumed)), x)
    again = dimension.collect(step, [], tmp_path / "b", **options)
    assert np.array_equal(again[2], x[2])
    with pytest.raises(ValueError, match="holds states of another run"):
        dimension.collect(step, batches, tmp_path / "b", rows=9, note={"seed": 1})
    with pytest.raises(ValueError, match="more than the 5 `rows`"):
        dimension.collect(step, batches, tmp_path / "c", rows=5)
    with pytest.raises(ValueError, match="hold 12 texts, and `rows` is 13"):
        dimension.collect(step, batches, tmp_path / "d", rows=13, progress=False)
    nan = lambda batch: step(batch).at[1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"batch 0 are not finite at layers \[1\]"):
        dimension.collect(nan, batches, tmp_path / "e", **options)


def test_rows_at_their_places_and_what_is_beside_them(tmp_path):
    """Batches in another order than the files; resumed in the middle."""
    rows = [np.array([4, 1]), np.array([0, 3]), np.array([2, 2])]
    step = lambda at: (np.stack([at, 10 * at])[..., None], {"names": at.astype("<U1")})
    options = {
        "rows": 5,
        "places": lambda at: at,
        "valid": lambda at: np.array([True, at[0] != at[1]]),
        "progress": False,
    }
    with pytest.raises(KeyError):
        dimension.collect(
            lambda at: step(at) if at[0] else {}["stopped"], rows, tmp_path, **options
        )
    files = dimension.collect(step, rows, tmp_path, **options)
    assert files[1].ravel().tolist() == [0, 10, 20, 30, 40]
    assert files.beside("names").tolist() == list("01234")
