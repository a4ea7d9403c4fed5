"""``infer_axes``: what it says of uses, and of leaves that meet each other."""

import pickle

import jax
import jax.numpy as jnp
import pytest
from adapt_errors_test import own_matmul, own_product
from adapt_toolbox import numbers
from jax import lax

import jaxpeft as jp
from jaxpeft.transform import Axes, Equation

D, F, V, L = 6, 10, 12, 3
IDS = jnp.asarray([1, 2, 3, 1])


def decoder(p, ids):
    """A bit of everything that a language model does to its leaves."""
    x = p["embed"][ids] + p["positions"][: ids.shape[0]]

    def layer(x, w):
        y = x * (1 + w["scale"])[None] + w["bias"][None]
        return x + jnp.tanh(y @ w["up"]) @ w["down"], jnp.sum(w["kept"])

    x, _ = lax.scan(jax.checkpoint(layer), x, p["layers"])
    return x @ p["embed"].T, jax.vmap(lambda i: p["types"][i])(ids)


@pytest.fixture
def params():
    return {
        "embed": numbers(V, D),
        "types": numbers(2, D),
        "positions": numbers(16, D),
        "unused": numbers(D, D),
        "layers": {
            "scale": numbers(L, D),
            "bias": numbers(L, D),
            "kept": numbers(L, 5),
            "up": numbers(L, D, F),
            "down": numbers(L, F, D),
        },
        "norm": numbers(D),
    }


def test_every_leaf_with_two_axes_has_a_use(params):
    axes = jp.infer_axes(decoder, params, IDS)
    assert axes == {
        "embed": "in out",
        "types": "in out",
        "layers/up": "layer in out",
        "layers/down": "layer in out",
    }
    assert axes.uses == {
        "embed": "tied",  # looked up, and contracted at the output
        "types": "looked up",
        "positions": "added",
        "unused": "other",
        "layers/bias": "added",
        "layers/scale": "added",
        "layers/kept": "other",
        "layers/up": "contracted",
        "layers/down": "contracted",
    }
    shapes = jax.eval_shape(lambda: params)
    assert jp.infer_axes(decoder, shapes, IDS).uses == axes.uses


def test_attaching_to_what_is_contracted(params, keys):
    """The uses say which leaves are linear layers, whatever their names."""
    axes = jp.infer_axes(decoder, params, IDS)
    linear = lambda path, leaf: axes.uses[path] in ("contracted", "tied")
    attach = lambda key: jp.attach(params, jp.lora(rank=2), linear, key=key, axes=axes)
    adapted = jax.eval_shape(attach, next(keys))
    bases = [path for path in jp.tree.flat(adapted) if path.endswith("/base")]
    assert bases == ["embed/base", "layers/down/base", "layers/up/base"]
    jax.eval_shape(jp.adapt(decoder), adapted, IDS)


def test_images_and_their_positions():
    """A position table of a vision transformer is no kernel, whatever its axes."""
    params = {
        "pos": jnp.zeros((1, 4, D)),
        "cls": jnp.zeros((1, 1, D)),
        "fc": numbers(D, D),
    }

    def fn(p, x):
        first = jnp.broadcast_to(p["cls"], (x.shape[0], 1, D))
        x = jnp.concatenate([first, x], 1) + p["pos"]
        return jnp.einsum("btd,de->bte", x, p["fc"])

    axes = jp.infer_axes(fn, params, jnp.zeros((2, 3, D)))
    assert axes == {"fc": "in out"}
    assert axes.uses == {"pos": "added", "cls": "other", "fc": "contracted"}


def test_roles_that_the_user_adds_keep_the_uses(params):
    axes = jp.infer_axes(decoder, params, IDS)
    more = axes | {"positions": "in out"}
    assert isinstance(more, Axes) and more.uses == axes.uses
    assert more == {**axes, "positions": "in out"} and "positions" not in axes
    again = pickle.loads(pickle.dumps(axes))
    assert again == axes and again.uses == axes.uses


MEETING = {
    "two factors": (lambda p, x: x @ (p["a"] @ p["b"]), {"a": "out in", "b": "in out"}),
    "a scale of one entry": (lambda p, x: x @ (p["a"] * p["one"]), {"a": "in out"}),
    "a scale": (lambda p, x: x @ (p["row"] * p["a"]), {"a": "in out"}),
    "a mask": (lambda p, x: x @ (p["a"] * p["mask"]), {}),
    "side by side": (
        lambda p, x: x @ jnp.concatenate([p["a"], p["mask"]], 1),
        {"a": "in out", "mask": "in out"},
    ),
    "no rule": (lambda p, x: x @ jnp.tanh(p["a"]), {}),
}


@pytest.mark.parametrize("name", MEETING)
def test_leaves_that_meet(name):
    fn, expected = MEETING[name]
    params = {
        "a": numbers(D, F),
        "b": numbers(F, V),
        "one": numbers(1, 1),
        "row": numbers(1, F),
        "mask": numbers(D, F),
    }
    assert jp.infer_axes(fn, params, numbers(4, D)) == expected


@pytest.mark.parametrize("own", [own_matmul, own_product], ids=["vjp", "jvp"])
def test_a_function_with_its_own_derivative_is_not_entered(own):
    """As in ``adapt``, which refuses kernels there."""
    fn = lambda p, x: own(x, p["w"])
    axes = jp.infer_axes(fn, {"w": numbers(D, F)}, numbers(4, D))
    assert axes == {} and axes.uses == {"w": "other"}


def test_leaves_of_whole_numbers():
    """They choose rows, branches and places; codes become a kernel."""
    params = {
        "table": numbers(V, D),
        "ids": jnp.zeros((2, 3), jnp.int32),
        "places": jnp.zeros((1, 1), jnp.int32),
        "codes": jnp.ones((D, F), jnp.int8),
        "sizes": jnp.full((1, 2), 2),
        "experts": numbers(2, D, F),
    }

    def fn(p, x):
        how = dict(mode="promise_in_bounds", wrap_negative_indices=False)
        rows = p["table"].at[p["ids"]].get(**how)
        rows = rows, jnp.take(p["ids"], jnp.asarray([0, 9]), axis=0)
        at = p["places"][0, 0]
        cut = lax.dynamic_slice(x, (at, 0), (1, D))
        x = lax.switch(at, [jnp.sin, jnp.cos], x)
        y = lax.ragged_dot(x, p["experts"], p["sizes"][0])
        return rows, cut, y, x @ (p["codes"].astype(jnp.float32) * 0.1)

    axes = jp.infer_axes(fn, params, numbers(4, D))
    assert axes == {
        "table": "in out",
        "ids": "in out",
        "codes": "in out",
        "experts": "expert in out",
    }
    assert axes.uses["places"] == axes.uses["sizes"] == "other"


def test_a_loop_that_changes_its_weights_is_walked_once(monkeypatch):
    """A training loop in the function: what a step does with them is what counts."""
    params = {f"w{i}": numbers(D, D, seed=i) for i in range(12)}
    walks = []
    enter = Equation.enter
    watched = lambda *args: (walks.append(1), enter(*args))[1]
    monkeypatch.setattr(Equation, "enter", watched)

    def fn(p, x):
        def step(p, _):
            y = x
            for w in p.values():
                y = jnp.tanh(y @ w)
            return {name: 0.9 * w for name, w in p.items()}, y

        return lax.scan(step, p, None, 2)

    axes = jp.infer_axes(fn, params, numbers(4, D))
    assert axes == dict.fromkeys(params, "in out")
    assert set(axes.uses.values()) == {"contracted"}
    assert len(walks) == 1


def test_an_adapted_tree_is_read_as_its_kernels(params, keys):
    adapted = jp.attach(params, jp.lora(rank=2), ["types"], key=next(keys))
    assert jp.infer_axes(decoder, adapted, IDS) == jp.infer_axes(decoder, params, IDS)
