"""Splash attention, in Pallas' interpreter: the numbers of the plain path."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_toolbox import content
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxpeft import models, training
from jaxpeft.models import _attention, _splash

TOKENS = 384  # three blocks of 128


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernels on the CPU."""
    name = "make_splash_mha"
    make = functools.partial(getattr(splash_attention, name), interpret=True)
    monkeypatch.setattr(splash_attention, name, make)


def run(query, key, value, implementation, mask, segments, weights, **options):
    """The output where weights are, and the gradients of its weighted sum."""

    def loss(query, key, value):
        out = _attention.attend(
            query,
            key,
            value,
            mask,
            segments=segments,
            implementation=implementation,
            scale=0.7,
            **options,
        )
        return jnp.sum(out * weights), jnp.where(weights == 0, 0.0, out)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), grads = run(query, key, value)
    return [out, *grads]


@pytest.mark.parametrize(
    ("packed", "options", "parts"),
    [
        (False, {}, 1),
        (True, {"window": 150, "cap": 3.0}, 1),
        (False, {}, 3),
        (True, {"window": 150, "cap": 3.0}, 3),
    ],
    ids=["causal", "segments-window-cap", "causal-cut", "segments-window-cap-cut"],
)
def test_the_same_numbers_and_gradients(packed, options, parts, interpreted):
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, TOKENS, heads, 8)), "float32")
    query, key, value, weights = draw(4), draw(2), draw(2), draw(4)
    mask = segments = None
    if packed:
        ids = np.repeat([[3, 4, 9], [7, 7, 5]], [100, 180, 104], axis=1)
        real = np.arange(TOKENS)[None] < np.array([[TOKENS], [310]])
        config = models.from_config(
            content("mistral", sliding_window=options["window"])
        ).config
        positions = jnp.arange(TOKENS)[None]
        context = _attention.make_context(config, positions, real, ids)
        mask, _ = context.of("sliding_attention", None)
        segments = context.segments
        weights = weights * jnp.asarray(real[:, :, None, None], "float32")
    given = (query, key, value)
    wanted = run(*given, "xla", mask, segments, weights, **options)
    mesh = training.make_mesh(1, 1, 1, parts, devices=jax.devices()[:parts])
    with jax.set_mesh(mesh) if parts > 1 else contextlib.nullcontext():
        got = run(*given, "splash", mask, segments, weights, **options)
    for ours, other in zip(got, wanted, strict=True):
        limit = 1e-5 * np.abs(other).max()  # measured at most 1e-6
        np.testing.assert_allclose(ours, other, atol=limit, rtol=0)
    for wrong in ({"window": 149, "cap": 3.0}, {"window": 150, "cap": 4.0}):
        if packed and parts == 1:
            other = run(*given, "splash", mask, segments, weights, **wrong)
            assert np.abs(other[0] - wanted[0]).max() > 1e-3 * np.abs(wanted[0]).max()


def test_a_model_and_its_mesh(interpreted):
    """Scanned, rematerialised, padded; each device has its own rows and heads."""
    changes = {"max_position_embeddings": 128, "num_hidden_layers": 1}
    config = content("llama", **changes)
    model = models.from_config(config, head="causal_lm", scan_layers=True, remat="full")
    params = models.init(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 64, (4, 128)).astype(np.int32)
    real = np.arange(128)[None] < np.array([[128], [70], [128], [5]])

    def loss(params, model):
        logits = model.apply({"params": params}, ids, real.astype(np.int32))
        return jnp.sum(jnp.where(real[:, :, None], logits, 0.0) ** 2)

    grad = lambda model: jax.jit(jax.grad(lambda p: loss(p, model)))(params)
    wanted = grad(model)
    mesh = jax.make_mesh(
        (2, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    flash = model.clone(attention="splash")
    with jax.set_mesh(mesh):
        got = grad(flash)
    for ours, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-5 * np.abs(other).max())


def test_where_it_is_taken_and_where_refused(monkeypatch):
    model = models.from_config(content("llama", max_position_embeddings=256))
    abstract = models.abstract(model)
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def flash(model, ids=ids, params=abstract, **inputs):
        run = lambda params, ids: model.apply({"params": params}, ids, **inputs)
        return "pallas_call" in str(jax.make_jaxpr(run)(params, ids))

    assert not flash(model)
    assert flash(model.clone(attention="splash"))
    short = jax.ShapeDtypeStruct((2, 127), jnp.int32)
    named = model.clone(attention="splash")
    assert models.abstract(named) == abstract
    with pytest.raises(ValueError, match="'splash', which needs a multiple of 128 tok"):
        flash(named, short)
    cache = models.init_cache(model, 2, 128)
    with pytest.raises(ValueError, match="'splash', which has no mask for a cache"):
        flash(named, cache=cache)
    with pytest.raises(ValueError, match="float32 and bfloat16, not float16"):
        flash(named.clone(dtype=jnp.float16))
    # Unasked it is taken on a TPU, and everything else as before.
    monkeypatch.setattr(_splash.jax, "default_backend", lambda: "tpu")
    assert not flash(model)  # eight devices and no mesh
    monkeypatch.setattr(_splash.jax, "device_count", lambda: 1)
    assert flash(model)
    assert not flash(model, short) and not flash(model, cache=cache)
    assert not flash(model.clone(attention="xla"))
    mixed = models.from_config(
        content("gemma2", max_position_embeddings=256), scan_layers=True
    )
    assert not flash(mixed, params=models.abstract(mixed))
    apart = mixed.clone(scan_layers=False)
    assert flash(apart, params=models.abstract(apart))


def test_a_model_is_made_with_it():
    config = content("llama")
    assert models.from_config(config, attention="splash").attention == "splash"
    with pytest.raises(ValueError, match="`attention` is 'flash'; known are"):
        models.from_config(config, attention="flash")
    with pytest.raises(ValueError, match="a Bert has one program for it"):
        models.from_config({"model_type": "bert"}, attention="splash")
