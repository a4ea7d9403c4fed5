"""Messages about many sites are short, wherever they come from."""

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import interop, training
from jaxpeft.tree._grouped import grouped, some

LAYERS = 24
PARAMS = {f"layer_{i}": {"query": {"kernel": jnp.ones((4, 4))}} for i in range(LAYERS)}


def test_causes_are_told_apart():
    lines = [f"missing: 'layer_{i}/a'" for i in range(9)]
    shape = "has shape [{}, 4], was [4, 4]"
    lines += [f"'layer_{i}/a' {shape.format(i % 2 + 2)}" for i in range(15)]
    lines += ["left over: 'x/y' belongs to no site", *lines[:3]]
    text = grouped(lines)
    assert text.splitlines() == [
        "missing: 'layer_0/a' (and 8 more: 'layer_1/a', 'layer_2/a', ...)",
        "  'layer_0/a' has shape [2, 4], was [4, 4] (and 7 more: 'layer_2/a', "
        "'layer_4/a', ...)",
        "  'layer_1/a' has shape [3, 4], was [4, 4] (and 6 more: 'layer_3/a', "
        "'layer_5/a', ...)",
        "  left over: 'x/y' belongs to no site",
    ]


def test_a_few_stand_by_themselves():
    lines = [f"missing: 'layer_{i}/a'" for i in range(6)]
    assert grouped(lines).splitlines() == [lines[0], *(f"  {x}" for x in lines[1:])]
    assert some(["a", "b", "c"]) == "'a', 'b', 'c'"


def attached(adapter):
    return jp.attach(PARAMS, adapter, ["query"], key=jax.random.key(0))


def of_loading(tmp_path):
    interop.save_adapter(attached(jp.lora(2)), tmp_path / "own")
    wider = jax.tree.map(lambda x: jnp.ones((4, 6)), PARAMS)
    interop.load_adapter(tmp_path / "own", wider)


def of_another_base(tmp_path):
    interop.save_adapter(attached(jp.lora(2)), tmp_path / "own")
    interop.load_adapter(tmp_path / "own", jax.tree.map(lambda x: x + 1, PARAMS))


def of_grafting(tmp_path):
    del tmp_path
    wider = jax.tree.map(lambda x: jnp.ones((4, 6)), PARAMS)
    jp.graft(wider, jp.extract(attached(jp.lora(2))))


@pytest.mark.parametrize("ask", [of_loading, of_another_base, of_grafting])
def test_one_cause_at_every_site_is_one_line(ask, tmp_path):
    with pytest.raises(ValueError) as error:
        ask(tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) <= 3, lines
    assert f"and {LAYERS - 1} more: 'layer_1/query/kernel'" in str(error.value)


def test_a_checkpoint_of_another_base_is_one_line(tmp_path):
    mesh = training.make_mesh(devices=jax.devices()[:1])
    specs = training.param_specs(PARAMS, mesh)
    found = []
    for scale in (1.0, 2.0):
        base = jax.tree.map(lambda x, scale=scale: x * scale, PARAMS)
        adapted = jp.attach(base, jp.lora(2), ["query"], key=jax.random.key(0))
        parts = jp.partition(training.place(adapted, mesh, specs))
        optimizer = training.adamw(parts[0], total_steps=1, learning_rate=0.1)
        key = jax.random.key(1)
        state = training.init_state(parts[0], optimizer, key=key, mesh=mesh)
        found.append((state, parts[1]))
    with training.Checkpointer(tmp_path / "run", config={}) as checkpoints:
        checkpoints.save(*found[0])
    with training.Checkpointer(tmp_path / "run", config={}) as checkpoints:
        with pytest.raises(training.CheckpointError, match="values differ") as error:
            checkpoints.restore(*found[1])
    assert f"and {LAYERS - 1} more" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
