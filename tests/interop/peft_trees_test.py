"""Adapter files of hand-written trees, without PyTorch: shapes, forms, refusals."""

import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families_toolbox import config_of, scrambled, tensors_of
from safetensors.numpy import save_file
from trees_toolbox import (
    AXES,
    KEY,
    PART,
    STACKED,
    UNROLLED,
    D,
    F,
    L,
    flat_layer,
    make_adapted,
    make_params,
    moved,
    unrolled,
)

import jaxpeft as jp
from jaxpeft.interop import load_peft, save_hf, save_peft


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def adapted(params):
    return make_adapted(params)


@pytest.fixture(scope="module")
def saved(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees") / "stacked"
    return save_peft(moved(adapted), folder, names=STACKED, base_model="some/base")


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_in_the_folder(saved):
    assert {p.name for p in saved.folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config, tensors = config_of(saved.folder), tensors_of(saved.folder)
    assert config["target_modules"] == ["q_proj", "o_proj", "up"]
    assert (config["r"], config["lora_alpha"]) == (2, 5)
    assert config["rank_pattern"] == {
        r"model\.layers\.0\.up": 1,
        r"model\.layers\.1\.up": 3,
        r"model\.layers\.2\.o_proj": 3,
    }
    assert config["alpha_pattern"] == {r"model\.layers\.1\.up": 2.5}
    assert config["modules_to_save"] == ["score"] == list(saved.saved)
    assert tensors[f"{PART}.0.q_proj.lora_B.weight"].shape == (D, 2)
    assert tensors[f"{PART}.1.up.lora_A.weight"].shape == (3, D)
    assert tensors[f"{PART}.0.up.lora_B.weight"].shape == (F, 1)
    assert tensors["base_model.model.score.weight"].shape == (3, D)
    assert 'base_model: "some/base"' in (saved.folder / "README.md").read_text()


def test_it_loads_into_the_stack_and_into_single_layers(saved, params, adapted):
    stacked = load_peft(saved.folder, params, names=STACKED, axes=AXES)
    before = jp.tree.flat(moved(adapted))
    for path, x in jp.tree.flat(stacked).items():
        assert np.array_equal(x, before[path]), path
    single = load_peft(saved.folder, unrolled(params), names=UNROLLED)
    whole, each = jp.merge(stacked), jp.merge(single)
    for i in range(L):
        for name in ("q_proj", "o_proj", "up"):
            layer = flat_layer(i, whole["layers"]["layer"])[name]["kernel"]
            mine = each["layers"][f"layer_{i}"][name]["kernel"]
            np.testing.assert_allclose(mine, layer, rtol=0, atol=1e-6)
    assert np.array_equal(whole["score"]["bias"], each["score"]["bias"])
    change = (
        whole["layers"]["layer"]["up"]["kernel"]
        - params["layers"]["layer"]["up"]["kernel"]
    )
    assert np.all(np.max(np.abs(change), axis=(1, 2)) > 0.1)  # control
    assert jp.count(single)[0] == jp.count(stacked)[0]


def test_stacks_write_the_bytes_of_single_layers(saved, params, tmp_path):
    single = load_peft(saved.folder, unrolled(params), names=UNROLLED)
    again = save_peft(single, tmp_path / "a", names=UNROLLED, base_model="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again.folder / name).read_bytes() == (saved.folder / name).read_bytes()


def test_portable_is_the_same_function_at_one_rank(adapted, params, tmp_path):
    tree = moved(adapted)
    tree["score"] = params["score"]
    done = save_peft(tree, tmp_path / "p", names=STACKED, form="portable")
    config = config_of(done.folder)
    assert (done.rank, config["r"], config["lora_alpha"]) == (3, 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None and not done.errors
    shapes = {x.shape for x in tensors_of(done.folder).values()}
    assert shapes == {(3, D), (D, 3), (F, 3)}
    again = load_peft(done.folder, params, names=STACKED, axes=AXES)
    for x, y in zip(*map(jax.tree.leaves, map(jp.merge, (again, tree))), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)
    # Factors of equal norm; measured 1e-6 of it.
    for i in range(L):
        a, b = (tensors_of(done.folder)[f"{PART}.{i}.up.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-5)


def test_a_smaller_rank_cuts_and_says_by_how_much(adapted, params, tmp_path):
    tree = moved(adapted)
    tree["score"] = params["score"]
    done = save_peft(tree, tmp_path / "p", names=STACKED, form="portable", rank=2)
    three = {f"model.layers.{i}.{n}" for i, n in ((1, "up"), (2, "o_proj"))}
    assert done.errors.keys() == three and done.rank == 2
    node = tree["layers"]["layer"]["up"]["kernel"]
    change = np.asarray(node.trainable["a"][1] @ node.trainable["b"][1], np.float64)
    values = np.linalg.svd(change)[1]
    error = np.linalg.norm(values[2:]) / np.linalg.norm(values)
    np.testing.assert_allclose(done.errors["model.layers.1.up"], error, rtol=1e-5)
    assert f"{error:.2e}" in (done.folder / "README.md").read_text()


def test_balance_keeps_a_small_difference_in_half_precision():
    """Two near pairs, concatenated, lose in bfloat16 what balanced factors keep."""
    from jaxpeft.interop.peft._pairs import balance

    rng = np.random.default_rng(0)
    a0, b0 = rng.normal(size=(96, 8)), rng.normal(size=(8, 96))
    a, b = a0 + 3e-3 * rng.normal(size=a0.shape), b0 + 3e-3 * rng.normal(size=b0.shape)
    wide = np.concatenate([a, a0], 1), np.concatenate([b, -b0])
    exact = wide[0] @ wide[1]
    round_ = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64)
    lost = lambda p: np.linalg.norm(round_(p[0]) @ round_(p[1]) - exact)
    left, right, error = balance(*wide)
    assert lost((left, right)) < 0.005 * np.linalg.norm(exact) and error < 1e-12
    assert lost(wide) > 0.3 * np.linalg.norm(exact)  # control


def test_a_changed_scale_is_written_as_alpha(params, tmp_path):
    tree = jp.attach(params, jp.lora(2, 4), ["up"], key=KEY, axes=AXES)
    node = tree["layers"]["layer"]["up"]["kernel"]
    half = {"scale": node.frozen["scale"] / 2}
    tree["layers"]["layer"]["up"]["kernel"] = node.replace(frozen=half)
    done = save_peft(tree, tmp_path / "a", names=STACKED)
    assert config_of(done.folder)["lora_alpha"] == 2


def test_old_keys_and_half_precision_are_read(copy, params, saved):
    tensors = {}
    for key, x in tensors_of(copy).items():
        for end in ("lora_A", "lora_B"):
            key = key.replace(f"{end}.weight", f"{end}.default.weight")
        tensors[key] = x.astype(ml_dtypes.bfloat16)
    save_file(tensors, copy / "adapter_model.safetensors")
    tree = load_peft(copy, params, names=STACKED, axes=AXES)
    leaf = tree["layers"]["layer"]["up"]["kernel"].trainable["a"]
    key = f"{PART}.1.up.lora_A.default.weight"
    assert leaf.dtype == jnp.float32
    assert np.array_equal(leaf[1], tensors[key].astype(np.float32).T)


def test_leaves_lie_where_their_kernels_do(saved, params):
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = lambda *s: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*s))
    where = jax.tree.map(lambda x: spec(*(None,) * x.ndim), params)
    where["layers"]["layer"]["up"]["kernel"] = spec(None, None, "x")
    tree = load_peft(
        saved.folder, jax.device_put(params, where), names=STACKED, axes=AXES
    )
    leaves = tree["layers"]["layer"]["up"]["kernel"].trainable
    assert leaves["b"].sharding.spec == jax.sharding.PartitionSpec(None, None, "x")
    assert len(leaves["a"].devices()) == 2
    plain = load_peft(saved.folder, params, names=STACKED, axes=AXES)
    for x, y in zip(*map(jax.tree.leaves, (tree, plain)), strict=True):
        assert np.array_equal(x, y)


def test_a_hub_cache_of_links_is_read(copy, params, tmp_path):
    """Files of .../snapshots/HASH are links to .../blobs."""
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(copy.iterdir())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    tree = load_peft(snapshot, params, names=STACKED, axes=AXES)
    assert re.match("AdaptedKernel", repr(tree["score"]["kernel"]))


def test_a_part_of_the_layers(params, tmp_path):
    """A tree without its first layers, or with a gap, is written by its numbers."""
    plain = unrolled(params)
    layers = plain["layers"]
    part = {"layers": {f"layer_{n}": layers[f"layer_{n % L}"] for n in (2, 3, 10)}}
    adapted = scrambled(jp.attach(part, jp.lora(2), ["up"], key=KEY))
    saved = save_peft(adapted, tmp_path / "part", names=UNROLLED)
    ups = [f"model.layers.{n}.up" for n in (2, 3, 10)]
    assert list(saved.sites) == ups
    # "up" would also mean layers 0 and 1 of the whole model.
    assert config_of(saved.folder)["target_modules"] == ups
    again = load_peft(saved.folder, part, names=UNROLLED)
    for one, other in zip(*map(jax.tree.leaves, (again, adapted)), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"layers \[2, 3, 10\].*the model 11 from 0"):
        save_hf(part, tmp_path / "no", names=UNROLLED, config={"model_type": "mine"})
    config = {"model_type": "mine", "num_hidden_layers": L + 1}
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\].*the model 4 from 0"):
        save_hf(params, tmp_path / "no", names=STACKED, config=config, axes=AXES)
    assert not (tmp_path / "no").exists()
