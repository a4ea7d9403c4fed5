"""Saving adapters and loading them again, and every way in which that can fail."""

import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft.interop import adapter_info, load_adapter, save_adapter

AXES = {"layers/mlp": "layer in out", "query": "in out out"}


def make_params(keys, dtype=jnp.float32):
    def draw(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    return {
        "embed": {"embedding": draw(11, 6)},
        "query": {"kernel": draw(6, 2, 4)},
        "layers": {"mlp": {"kernel": draw(3, 6, 9), "bias": draw(3, 9)}},
        "head": {"kernel": draw(9, 5), "bias": draw(5)},
    }


def perturb(adapted, keys):
    """Moves every trained leaf away from where it began."""
    trainable, frozen = jp.partition(adapted)
    moved = jax.tree.map(
        lambda x: x + jax.random.normal(next(keys), x.shape, x.dtype), trainable
    )
    return jp.combine(moved, frozen)


def make_adapted(params, keys, kasa=None):
    key = lambda: next(keys)
    tree = jp.attach(params, jp.lora(2, init="embedding"), ["embed"], key=key())
    tree = jp.attach(
        tree,
        kasa or jp.kasa(rank=3, alpha=7),
        ["query", "mlp"],
        key=key(),
        rank_pattern={"layers/mlp": [1, 3, 2]},
        alpha_pattern={"layers/mlp": [1, 2.5, 3]},
        axes=AXES,
    )
    tree = jp.attach(tree, jp.full(), ["head"], key=key())
    return perturb(tree, keys)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    theirs = jp.tree.flat(other)
    for path, x in jp.tree.flat(one).items():
        assert x.dtype == theirs[path].dtype, path
        assert np.array_equal(x, theirs[path]), path  # bit for bit


@pytest.fixture
def params(keys):
    return make_params(keys)


@pytest.fixture
def adapted(params, keys):
    return make_adapted(params, keys)


@pytest.fixture
def folder(adapted, tmp_path):
    return save_adapter(adapted, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_was_saved_comes_back(dtype, keys, tmp_path):
    params = make_params(keys, dtype)
    adapted = make_adapted(params, keys)
    folder = save_adapter(adapted, tmp_path / "new" / "adapter")
    assert_same(load_adapter(folder, params), adapted)
    merged = jax.tree.leaves(jp.merge(load_adapter(folder, params)))
    plain = jax.tree.leaves(params)
    assert any(np.any(x != y) for x, y in zip(merged, plain, strict=True))  # control


def test_trained_leaves_in_half_precision_come_back(params, adapted, tmp_path):
    trainable, frozen = jp.partition(adapted)
    trainable = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable)
    half = jp.combine(trainable, frozen)
    assert_same(load_adapter(save_adapter(half, tmp_path / "a"), params), half)


def test_loading_runs_no_decomposition(folder, params, adapted, monkeypatch):
    right = jnp.linalg.svd

    def fails_when_run(matrix, **options):  # but may be traced for its shapes
        shapes = jax.eval_shape(lambda m: right(m, **options), matrix)
        return jax.pure_callback(decomposed, shapes, matrix)

    def decomposed(matrix):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(jnp.linalg, "svd", fails_when_run)
    jax.clear_caches()
    with pytest.raises(jax.errors.JaxRuntimeError, match="decomposed again"):
        other = jp.attach(params, jp.kasa(2), [r"head/kernel"], key=jax.random.key(0))
        jax.block_until_ready(other)
    loaded = load_adapter(folder, params)
    jax.clear_caches()
    assert_same(loaded, adapted)


def test_the_file_holds_adapters_only(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter.safetensors",
    ]
    shapes = {k: x.shape for k, x in load_file(folder / "adapter.safetensors").items()}
    assert shapes["query/kernel/a"] == (6, 3)
    assert shapes["query/kernel/b"] == (3, 2, 4)
    assert shapes["query/kernel/v_d"] == (3, 2, 4)
    assert shapes["query/kernel/scale"] == ()
    assert shapes["layers/mlp/kernel/sigma"] == (3, 3)
    assert shapes["head/bias/value"] == (5,)
    assert not any(name.endswith(("/base", "/key")) for name in shapes)


def test_dropout_keys_are_not_saved(params, keys, tmp_path):
    plain = jp.attach(params, jp.lora(2, dropout=0.5), ["head"], key=next(keys))
    noisy = jp.with_dropout(plain, next(keys))
    assert_same(load_adapter(save_adapter(noisy, tmp_path / "a"), params), plain)


def test_adapters_at_other_sites_stay(folder, params, adapted, keys, tmp_path):
    rest = {**params, "extra": {"kernel": jnp.ones((4, 4))}}
    rest = jp.attach(rest, jp.lora(1), ["extra"], key=next(keys))
    both = load_adapter(folder, rest)
    again = load_adapter(
        save_adapter(both, tmp_path / "both"),
        {
            **params,
            "extra": {"kernel": jnp.ones((4, 4))},
        },
    )
    assert_same(again, both)


def test_methods_and_metadata_are_readable(adapted, tmp_path):
    note = {"score": 0.93, "seeds": [1, 2]}
    info = adapter_info(save_adapter(adapted, tmp_path / "a", metadata=note))
    assert info["metadata"] == note
    assert sorted(m["name"] for m in info["methods"]) == ["full", "kasa", "lora"]
    kasa = next(m["options"] for m in info["methods"] if m["name"] == "kasa")
    assert kasa["rank"] == 3
    assert kasa["alpha"] == 7
    assert kasa["truncation"] == "min"


def test_a_folded_base_is_folded_again(params, keys, tmp_path):
    folded = make_adapted(params, keys, jp.kasa(rank=3, base="folded"))
    loaded = load_adapter(save_adapter(folded, tmp_path / "a"), params)
    assert jax.tree.structure(loaded) == jax.tree.structure(folded)
    mine, theirs = jp.tree.flat(folded), jp.tree.flat(loaded)
    for path in mine:
        np.testing.assert_allclose(mine[path], theirs[path], atol=1e-6)
    plain = params["query"]["kernel"]
    assert np.max(np.abs(theirs["query/kernel/base"] - plain)) > 0.1
    other = {**params, "query": {"kernel": plain + 0.1}}
    with pytest.raises(ValueError, match="'query/kernel' is not the kernel"):
        load_adapter(tmp_path / "a", other)


def test_leaves_lie_where_their_kernels_lie(folder, params, adapted):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    spread = {
        **params,
        "query": {
            "kernel": jax.device_put(
                params["query"]["kernel"],
                NamedSharding(mesh, PartitionSpec("x", None, "y")),
            )
        },
    }
    loaded = load_adapter(folder, spread)
    assert_same(loaded, adapted)  # and the checksum does not see the sharding
    leaves = {**loaded["query"]["kernel"].frozen, **loaded["query"]["kernel"].trainable}
    specs = {name: tuple(leaves[name].sharding.spec) for name in ("a", "b", "scale")}
    assert specs == {"a": ("x", None), "b": (None, None, "y"), "scale": ()}


def test_works_on_numpy_parameters(folder, params, adapted):
    arrays = jax.tree.map(np.asarray, params)
    assert_same(load_adapter(folder, arrays), adapted)


# --- writing


def test_a_folder_with_files_is_refused(folder, adapted):
    with pytest.raises(FileExistsError, match="not empty.*overwrite=True"):
        save_adapter(adapted, folder)
    with pytest.raises(FileExistsError, match="not empty"):
        save_adapter(adapted, folder / "adapter.json")


def test_overwriting_leaves_other_files_alone(folder, adapted, params, keys):
    (folder / "notes.txt").write_text("mine")
    other = perturb(adapted, keys)
    save_adapter(other, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert_same(load_adapter(folder, params), other)


def test_an_empty_folder_is_fine(adapted, params, tmp_path):
    (tmp_path / "a").mkdir()
    assert_same(load_adapter(save_adapter(adapted, tmp_path / "a"), params), adapted)


def test_a_failed_write_leaves_nothing(adapted, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr("jaxpeft.interop._save.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_is_noticed(folder, adapted, params, keys, tmp_path):
    other = save_adapter(perturb(adapted, keys), tmp_path / "other")
    (other / "adapter.safetensors").replace(folder / "adapter.safetensors")
    with pytest.raises(ValueError, match="come from different saves"):
        load_adapter(folder, params)


def test_what_cannot_be_saved(params, adapted, tmp_path):
    with pytest.raises(ValueError, match="`adapted` has no adapters"):
        save_adapter(params, tmp_path / "a")
    with pytest.raises(ValueError, match="`metadata` must be what JSON can hold"):
        save_adapter(adapted, tmp_path / "a", metadata={"x": jnp.ones(2)})

    @jp.tree.cached  # without a name that files know
    def homemade():
        return jp.lora(2)._replace(name="")

    tree = jp.attach(params, homemade(), ["head"], key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"homemade\(\) could not .*@jaxpeft.tree"):
        save_adapter(tree, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- reading


def edit_config(folder, change):
    file = folder / "adapter.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder, change):
    file = folder / "adapter.safetensors"
    arrays = load_file(file)
    change(arrays)
    identity = adapter_info(folder)["id"]
    save_file(arrays, file, metadata={"id": identity})


def test_missing_files(folder, params, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter.json"):
        load_adapter(tmp_path / "nowhere", params)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="but no adapter.safetensors"):
        load_adapter(folder, params)


def test_damaged_files(folder, params):
    file = folder / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_adapter(folder, params)
    file.write_bytes(whole)
    edit_config(folder, lambda c: c.pop("sites"))
    with pytest.raises(ValueError, match="is damaged: it lacks sites"):
        load_adapter(folder, params)
    (folder / "adapter.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged or not an adapter's"):
        load_adapter(folder, params)


def bit_of(folder, name):
    """Where a tensor's first bit lies in the file."""
    data = (folder / "adapter.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]


@pytest.mark.parametrize("name", ["head/kernel/value", "layers/mlp/kernel/a"])
def test_a_flipped_bit_is_noticed(folder, params, name):
    file = folder / "adapter.safetensors"
    whole = file.read_bytes()
    assert adapter_info(folder)["sha256"] == hashlib.sha256(whole).hexdigest()
    at = bit_of(folder, name)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="adapter.safetensors is not as it was saved"):
        load_adapter(folder, params)
    edit_config(folder, lambda c: c.pop("sha256"))  # as older folders are
    before = load_adapter(folder, params)
    file.write_bytes(whole)
    after = load_adapter(folder, params)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert sum(not np.array_equal(x, y) for x, y in pairs) == 1  # control


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_leaves_that_are_not_finite(folder, params, adapted, value, tmp_path):
    def change(arrays):
        for name in ("layers/mlp/kernel/a", "head/kernel/value"):
            arrays[name][..., 0] = value

    edit_tensors(folder, change)
    edit_config(folder, lambda c: c.pop("sha256"))
    with pytest.raises(ValueError, match="nothing was loaded") as raised:
        load_adapter(folder, params)
    for name in ("layers/mlp/kernel/a", "head/kernel/value"):
        assert f"{name!r} is not finite" in str(raised.value)
    node = adapted["query"]["kernel"]
    b = node.trainable["b"].at[0, 0, 0].set(value)
    node = node.replace(trainable=node.trainable | {"b": b})
    bad = adapted | {"query": {"kernel": node}}
    with pytest.raises(ValueError, match=r"not finite, \['query/kernel/b'\]"):
        save_adapter(bad, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_another_version(folder, params):
    edit_config(folder, lambda c: c.update(version=2, jaxpeft="9.0"))
    with pytest.raises(ValueError, match="version 2;.*reads.*version 1.*jaxpeft 9.0"):
        load_adapter(folder, params)


def test_everything_that_does_not_fit_is_listed(folder, params):
    def change(arrays):
        arrays["query/kernel/surplus"] = np.zeros(3, np.float32)
        del arrays["embed/embedding/b"]
        arrays["layers/mlp/kernel/sigma"] = np.zeros((3, 4), np.float32)

    edit_tensors(folder, change)
    other = {
        **params,
        "embed": {"embedding": params["embed"]["embedding"]},
        "query": {"kernel": params["query"]["kernel"] + 1},
        "head": {"kernel": jnp.zeros((9, 6)), "bias": params["head"]["bias"]},
    }
    with pytest.raises(ValueError) as raised:
        load_adapter(folder, other)
    message = str(raised.value)
    for part in (
        "nothing was loaded",
        "missing: 'embed/embedding/b'",
        "left over: 'query/kernel/surplus'",
        "'layers/mlp/kernel/sigma' has shape [3, 4], should have [3, 3]",
        "'head/kernel' has shape [9, 6], was [9, 5]",
        "'query/kernel' is not the kernel that the adapter was trained with",
    ):
        assert part in message


def test_sites_that_are_not_there_or_taken(folder, params, adapted, keys):
    renamed = {("query_" if k == "query" else k): v for k, v in params.items()}
    with pytest.raises(ValueError, match="no leaf 'query/kernel'.*'query_/kernel'"):
        load_adapter(folder, renamed)
    with pytest.raises(ValueError, match="'head/bias' already carries 'full'"):
        load_adapter(folder, adapted)


def test_unknown_methods_and_options(folder, params):
    public = (n for n in dir(jp.adapters) if not n.startswith("_"))
    known = jp.tree.methods()
    assert {n for n in public if callable(getattr(jp.adapters, n))} <= set(known)
    names = ", ".join(known)

    def rename(config):
        for method in config["methods"]:
            if method["name"] == "kasa":
                method["name"] = "kazaa"
            if method["name"] == "lora":
                method["options"]["width"] = 3

    edit_config(folder, rename)
    with pytest.raises(ValueError) as raised:
        load_adapter(folder, params)
    assert f"unknown method 'kazaa'; there are {names}" in str(raised.value)
    assert re.search("'lora' does not take the saved options.*width", str(raised.value))


def test_leaves_the_config_does_not_list_are_missed(folder, params):
    def forget(config):
        for site in config["sites"]:
            if site["path"] == "query/kernel":
                site["leaves"]["trainable"].remove("sigma")

    edit_config(folder, forget)
    message = "missing: 'query/kernel/sigma', a trainable leaf"
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, params)


@pytest.mark.parametrize("change", ["one bit", "order", "dtype"])
def test_another_base_is_refused_unless_asked_for(change, folder, params, adapted):
    kernel = np.asarray(params["query"]["kernel"])
    if change == "one bit":
        kernel = kernel.copy()
        kernel.view(np.uint32)[3, 1, 2] ^= 1
    elif change == "order":
        kernel = kernel[:, :, ::-1]
    else:
        kernel = kernel.astype(jnp.bfloat16)
    other = {**params, "query": {"kernel": jnp.asarray(kernel)}}
    says = "has dtype bfloat16, was" if change == "dtype" else "is not the kernel"
    with pytest.raises(ValueError, match=f"'query/kernel' {says}.*check_base=False"):
        load_adapter(folder, other)
    loaded = load_adapter(folder, other, check_base=False)
    assert np.array_equal(
        loaded["query"]["kernel"].trainable["a"],
        adapted["query"]["kernel"].trainable["a"],
    )


def test_a_head_trained_in_full_may_have_been_drawn_anew(tmp_path, keys):
    draw = lambda: {"head": {"kernel": jax.random.normal(next(keys), (4, 3))}}
    tree = jp.attach(draw(), jp.full(), ["head"], key=next(keys))
    save_adapter(tree, tmp_path / "a")
    other = draw()
    loaded = load_adapter(tmp_path / "a", other)["head"]["kernel"]
    assert np.array_equal(loaded.trainable["value"], tree["head"]["kernel"].base)
    assert np.array_equal(loaded.base, other["head"]["kernel"])
    narrow = {"head": {"kernel": other["head"]["kernel"].astype(jnp.bfloat16)}}
    with pytest.raises(ValueError, match="has dtype bfloat16, was float32"):
        load_adapter(tmp_path / "a", narrow)


def test_wide_leaves_need_wide_numbers(tmp_path):
    with jax.enable_x64(True):
        params = {"head": {"kernel": jnp.ones((4, 3), jnp.float64)}}
        tree = jp.attach(params, jp.lora(1), ["head"], key=jax.random.key(0))
        save_adapter(tree, tmp_path / "a")
        assert_same(load_adapter(tmp_path / "a", params), tree)
    narrow = {"head": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match="'head/kernel/a' is float64.*jax_enable_x64"):
        load_adapter(tmp_path / "a", narrow, check_base=False)
