"""Convolutions: every term of the formula, every setting, and HF PEFT's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from adapt_toolbox import (
    CLOSE,
    check,
    cotangent,
    distance,
    everything,
    gate,
    gated,
    numbers,
    pair,
    prepare,
    run_with_gradients,
)
from jax import lax

import jaxpeft as jp

CHANNELS, FEATURES = 4, 6

# Settings of one two-dimensional convolution; the kernel's spatial shape is (3, 2).
SETTINGS = {
    "same": {"padding": "SAME"},
    "strides, padding": {"window_strides": (2, 1), "padding": ((1, 2), (0, 3))},
    "dilation": {"rhs_dilation": (2, 3), "padding": "SAME"},
    "transposed": {"lhs_dilation": (2, 3), "padding": ((2, 1), (1, 1))},
    "patches": {"window_strides": (3, 2)},
    "groups": {"feature_group_count": 2, "padding": "SAME"},
    "depthwise": {"feature_group_count": CHANNELS, "window_strides": (2, 2)},
    "all": {
        "window_strides": (2, 1),
        "padding": ((2, -1), (0, 4)),
        "lhs_dilation": (1, 2),
        "rhs_dilation": (2, 1),
        "feature_group_count": 2,
    },
}
LAYOUTS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), "in in in out"),
    "NCHW": (("NCHW", "OIHW", "NCHW"), "out in in in"),
    "odd": (("HNCW", "IHOW", "CWNH"), "in in out in"),
}


def convolution(settings, layout):
    """A function, its parameters, its input and the roles of its kernel."""
    numbers_of, roles = LAYOUTS[layout]
    groups = settings.get("feature_group_count", 1)
    features = 8 if groups == CHANNELS else FEATURES
    sizes = {"H": 3, "W": 2, "I": CHANNELS // groups, "O": features}
    image = {"N": 2, "H": 9, "W": 7, "C": CHANNELS}
    w = numbers(*(sizes[c] for c in numbers_of[1]), seed=1, scale=0.3)
    x = numbers(*(image[c] for c in numbers_of[0]))
    settings = {"window_strides": (1, 1), "padding": "VALID"} | settings

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], dimension_numbers=numbers_of, **settings
        )

    return fn, {"w": w}, x, roles


# What the model does to its own kernel, in its gradient with respect to the input.
OWN = ("reverse", "transpose", "copy", "slice")
CASES = [(name, "NHWC", pair()) for name in SETTINGS]
CASES += [(name, "NHWC", everything()) for name in ("patches", "transposed", "all")]
CASES += [("all", layout, everything()) for layout in ("NCHW", "odd")]


@pytest.mark.parametrize(
    "name, layout, adapter", CASES, ids=lambda x: getattr(x, "name", x)
)
def test_settings(name, layout, adapter, keys):
    fn, params, x, roles = convolution(SETTINGS[name], layout)
    check(fn, params, x, sites={"w": roles}, keys=keys, adapter=adapter, allow=OWN)


def patches_by_hand(x):
    """``[2, 9, 7, 4]`` as the windows of "patches", in the kernel's order."""
    rows = [
        x[:, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2].reshape(2, -1)
        for i in range(3)
        for j in range(3)
    ]
    return jnp.stack(rows, 1).reshape(2, 3, 3, -1)


def test_a_gate_sees_windows(keys):
    fn, params, x, roles = convolution(SETTINGS["patches"], "NHWC")
    adapted = prepare(params, gated(), ["w"], keys, axes={"w": roles})
    leaf = {n: v.reshape(-1, v.shape[-1]) for n, v in adapted["w"].trainable.items()}
    rows = patches_by_hand(x)
    h = gate(rows @ leaf["router"].reshape(rows.shape[-1], -1), rows @ leaf["a"])
    expected = fn(params, x) + h @ leaf["b"]
    assert distance(jp.adapt(fn)(adapted, x), expected) < CLOSE
    assert distance(fn(params, x), expected) > 1e-2


@pytest.mark.parametrize("name", ["patches", "all"])
def test_taps_see_windows(name, keys):
    """What the tap sees, times the kernel's matrix, is the convolution."""
    fn, params, x, roles = convolution(SETTINGS[name], "NHWC")
    adapted = prepare(params, pair(), ["w"], keys, axes={"w": roles})
    out, tapped = jp.adapt(fn, taps=lambda x, *_: x)(adapted, x)
    rows, w = tapped["w"], jp.merge(adapted)["w"].reshape(-1, FEATURES)
    if name == "patches":
        assert jnp.array_equal(rows, patches_by_hand(x))
        assert distance(rows @ w, out) < CLOSE
    else:  # two groups
        each = jnp.einsum("nhwgi,igo->nhwgo", rows, w.reshape(-1, 2, FEATURES // 2))
        assert distance(each.reshape(out.shape), out) < CLOSE


def test_dropout_is_of_the_low_rank_path_alone(keys):
    fn, params, x, roles = convolution(SETTINGS["strides, padding"], "NHWC")
    adapted = prepare(params, pair(dropout=0.5), ["w"], keys, axes={"w": roles})
    call = jax.jit(jp.adapt(fn))
    dropped = call(jp.with_dropout(adapted, next(keys)), x)
    plain = fn(params, x)
    assert distance(dropped, call(adapted, x)) > 1e-2
    low_rank = call(adapted, x) - plain  # its mean over masks
    draws = jax.vmap(lambda k: call(jp.with_dropout(adapted, k), x) - plain)
    mean = jnp.mean(draws(jax.random.split(next(keys), 400)), 0)
    # Standard error of 400 masks: about 0.05 of the mean's size.
    assert distance(mean, low_rank) < 0.25


def test_kernels_stacked_for_a_scan(keys):
    shape = (3, 3, CHANNELS, CHANNELS)
    params = {"w": numbers(3, *shape, seed=1, scale=0.2)}
    step = lambda x, w: (
        jnp.tanh(
            lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        ),
        None,
    )
    fn = lambda p, x: lax.scan(jax.checkpoint(step), x, p["w"])[0]
    x, sites = numbers(2, 5, 7, CHANNELS), {"w": "layer in in in out"}
    check(fn, params, x, sites=sites, keys=keys, adapter=pair(), allow=OWN)


def test_what_has_no_form_names_the_site(keys):
    """Kernels that are mapped over become groups, whose roles no tree tells."""
    params = {"w": numbers(5, 3, 2, CHANNELS, FEATURES, seed=1, scale=0.3)}
    one, _, x, _ = convolution({}, "NHWC")
    fn = lambda p, x: jax.vmap(lambda w: one({"w": w}, x))(p["w"])
    axes = {"w": "member in in in out"}
    adapted = prepare(params, pair(), ["w"], keys, axes=axes)
    match = r"site 'w' reaches `reshape` at .*convolution_test\.py.* joins"
    with pytest.raises(jp.UnsupportedError, match=match):
        jp.adapt(fn)(adapted, x)
    with pytest.warns(UserWarning, match=match):
        got = jp.adapt(fn, unsupported="materialise")(adapted, x)
    assert distance(got, fn(jp.merge(adapted), x)) < CLOSE


def test_roles_that_a_convolution_does_not_have(keys):
    fn, params, x, _ = convolution({}, "NHWC")
    adapted = prepare(params, pair(), ["w"], keys, axes={"w": "in in out in"})
    match = r"site 'w' reaches `conv_general_dilated` .* 'out', but is used as 'in'"
    with pytest.raises(jp.UnsupportedError, match=match):
        jp.adapt(fn)(adapted, x)


# PEFT's `lora_A` forgets the layer's dilation, and mixes groups.
PEFT_SETTINGS = {
    "patches": {"stride": (3, 2)},
    "strides, padding": {"stride": (2, 1), "padding": (2, 1)},
}


@pytest.mark.interop
@pytest.mark.parametrize("name", PEFT_SETTINGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_as_hf_peft(name, method, keys):
    """PEFT on ``torch.nn.Conv2d``: forward, every gradient, and the merged weight."""
    settings = PEFT_SETTINGS[name]
    base = torch.nn.Sequential()
    base.add_module("conv", torch.nn.Conv2d(CHANNELS, FEATURES, (3, 2), **settings))
    weight = base.conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    bias = base.conv.bias.detach().numpy()
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["conv"], use_dora=method == "dora"
    )
    theirs = peft.get_peft_model(base, config)
    layer = theirs.base_model.model.conv

    adapter = {
        "lora": jp.lora(rank=2, alpha=6),
        "dora": jp.dora(rank=2, alpha=6, stop_gradient_norm=True),
    }[method]
    params = {"conv": {"kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}}
    roles = {"conv": "in in in out"}
    adapted = prepare(params, adapter, ["conv"], keys, axes=roles)
    leaves = adapted["conv"]["kernel"].trainable
    tensors = {
        "a": (layer.lora_A.default.weight, (3, 2, 0, 1)),  # [r, in, h, w]
        "b": (layer.lora_B.default.weight, None),  # [out, r, 1, 1]
    }
    if method == "dora":
        tensors["m_out"] = (layer.lora_magnitude_vector.default.weight, None)

    def as_theirs(leaf, name):
        tensor, order = tensors[name]
        moved = np.asarray(leaf).transpose(order) if order else np.asarray(leaf).T
        return torch.tensor(np.ascontiguousarray(moved)).reshape(tensor.shape)

    assert leaves.keys() == tensors.keys()
    for leaf, (tensor, _) in tensors.items():
        tensor.data = as_theirs(leaves[leaf], leaf)
    x = numbers(2, 9, 7, CHANNELS)
    y = theirs(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    model = nn.Conv(
        FEATURES,
        (3, 2),
        strides=settings["stride"],
        padding=[(n, n) for n in settings.get("padding", (0, 0))],
    )
    fn = lambda params, x: model.apply({"params": params["conv"]}, x)
    got, (grads, _), _ = run_with_gradients(jp.adapt(fn), adapted, [x])
    assert distance(got, jnp.asarray(y.detach().numpy())) < CLOSE
    assert distance(fn(params, x), got) > 1e-2
    y.backward(torch.tensor(np.asarray(cotangent(got))))
    for leaf, (tensor, _) in tensors.items():
        ours = as_theirs(grads["conv"]["kernel"].trainable[leaf], leaf)
        assert distance(ours.numpy(), tensor.grad.numpy()) < CLOSE, leaf
    merged = theirs.merge_and_unload().conv.weight.detach().numpy()
    ours = jp.merge(adapted)["conv"]["kernel"]
    assert distance(ours, jnp.asarray(merged.transpose(2, 3, 1, 0))) < CLOSE
