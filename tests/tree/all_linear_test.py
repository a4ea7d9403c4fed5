"""What "all-linear" takes: by use where the model was looked at, else by name."""

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft.tree import nodes

KEY = jax.random.key(0)
IDS = jnp.array([1, 2])


def sites(params, axes=None, targets="all-linear"):
    adapted = jax.eval_shape(
        lambda p: jp.attach(p, jp.lora(2), targets, key=KEY, axes=axes), params
    )
    return sorted(node.site.path for node in nodes(adapted))


def test_a_table_that_is_added_is_left_out():
    params = {
        "pos_embedding": jnp.zeros((1, 4, 16)),
        "cls": jnp.zeros((1, 1, 16)),
        "fc": {"kernel": jnp.zeros((16, 16))},
    }
    fn = lambda p, x: (x + p["pos_embedding"]) @ p["fc"]["kernel"] + p["cls"]
    axes = jp.infer_axes(fn, params, jnp.ones((2, 4, 16)))
    assert sites(params, axes) == ["fc/kernel"]
    with pytest.raises(ValueError, match="'cls' has shape"):  # control: by name alone
        sites(params)


def test_names_of_other_libraries_do_not_matter():
    params = {
        "embedder": {"input_embedding": jnp.zeros((64, 16))},
        "language_model": {"positional_embeddings": jnp.zeros((2, 16))},
        "embedding": jnp.zeros((16, 16)),  # a kernel, whatever its name
    }

    def fn(p, ids):
        x = p["embedder"]["input_embedding"][ids]
        x = x + p["language_model"]["positional_embeddings"]
        return x @ p["embedding"]

    assert sites(params, jp.infer_axes(fn, params, IDS)) == ["embedding"]
    assert "embedder/input_embedding" in sites(params)  # control
    whole = jp.infer_axes(lambda p, ids: fn(p["params"], ids), {"params": params}, IDS)
    assert sites(params, whole) == ["embedding"]


def test_a_tied_table_is_an_output_head():
    params = {"table": jnp.zeros((8, 4)), "w": jnp.zeros((4, 4))}
    fn = lambda p, ids: p["table"][ids] @ p["w"] @ p["table"].T
    axes = jp.infer_axes(fn, params, IDS)
    assert axes.uses == {"table": "tied", "w": "contracted"}
    assert sites(params, axes) == ["w"]
    assert sites(params, axes, ["table"]) == ["table"]  # by name it is adapted


@pytest.mark.parametrize("head", ["lm_head", "score", "classifier"])
def test_heads_are_left_out(head):
    params = {"fc": {"kernel": jnp.zeros((4, 4))}, head: {"kernel": jnp.zeros((4, 9))}}
    fn = lambda p, x: x @ p["fc"]["kernel"] @ p[head]["kernel"]
    for axes in (None, jp.infer_axes(fn, params, jnp.ones((2, 4)))):
        assert sites(params, axes) == ["fc/kernel"]
        assert sites(params, axes, [head]) == [f"{head}/kernel"]


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("query", "q_proj"),
        ("value", "v_proj"),
        ("intermediate", "up_proj"),
        ("down", "down_proj"),
        ("qproj", "q_proj"),
    ],
)
def test_other_families_names_are_offered(wrong, right):
    names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = {name: {"kernel": jnp.zeros((4, 4))} for name in names}
    params = {"layer_0": layer, "layer_1": layer}
    with pytest.raises(ValueError, match=rf"write targets=\['{right}'\]"):
        sites(params, targets=[wrong])


def test_advice_is_never_what_was_just_tried():
    """``bias`` is there, and no kernel: it matched nothing, and is not offered."""
    params = {"fc": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}
    with pytest.raises(ValueError) as error:
        sites(params, targets=["bias"])
    assert "'bias']" not in str(error.value).partition("nearest")[2]
