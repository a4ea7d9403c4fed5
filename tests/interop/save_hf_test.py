"""Whole checkpoints, adapters folded in, opened by the real transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families_toolbox import FAMILIES, Family, close, far, quiet, scrambled
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft import models
from jaxpeft.interop import save_hf

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, oracle, tmp_path_factory):
    return Family(request.param, oracle, tmp_path_factory.mktemp(request.param))


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype and np.array_equal(x, other[name]), name


def folded(family, params):
    one, other = (words[0].replace(".", "/") for words in family.facts.targets)
    key = jax.random.key(0)
    with jax.disable_jit():
        tree = jp.attach(params, jp.bora(2), rf".*layer_0/.*{one}", key=key)
        tree = jp.attach(tree, jp.ia3(), rf".*layer_1/.*{one}", key=key)
        tree = jp.attach(tree, jp.lora(3, 7), [other], key=key)
        tree = jp.attach(tree, jp.full(), [family.facts.norm], key=key)
    return scrambled(tree)


def test_the_base_comes_back_bit_for_bit(family, tmp_path):
    model = family.model
    done = save_hf(
        family.params,
        tmp_path / "a",
        names=model.names,
        config=model.hf_config,
        source=family.folder,
    )
    same(tensors_of(tmp_path / "a"), tensors_of(family.folder))
    assert done.files == ("model.safetensors",) and not done.drift
    for name in ("config.json", "generation_config.json"):
        if (family.folder / name).is_file():
            mine = json.loads((tmp_path / "a" / name).read_text())
            assert mine == json.loads((family.folder / name).read_text())


def test_a_merged_model_opens_in_transformers(family, tmp_path):
    import transformers

    tree, model = folded(family, family.params), family.model
    done = save_hf(tree, tmp_path / "a", names=model.names, config=model.hf_config)
    with quiet():
        kind = getattr(transformers, family.facts.kind)
        theirs, info = kind.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values()), info
    logits = family.theirs(theirs.eval())
    close(family.ours(tree), logits)
    far(family.run(family.params), logits)
    drift = {name: change for name, (_, change) in done.drift.items()}
    assert len(drift) == 5 and list(drift.values()) == sorted(drift.values())[::-1]
    merged, base = tensors_of(tmp_path / "a"), tensors_of(family.folder)
    for name, (largest, change) in done.drift.items():
        old, new = base[f"{name}.weight"], merged[f"{name}.weight"]
        np.testing.assert_allclose(largest, np.max(np.abs(new - old)), rtol=1e-5)
        norm = np.linalg.norm(new - old) / np.linalg.norm(old)
        np.testing.assert_allclose(change, norm, rtol=1e-5)


def test_shards_and_stacks_are_the_same_tensors(family, tmp_path):
    tree, model = folded(family, family.params), family.model
    whole = save_hf(tree, tmp_path / "a", names=model.names, config=model.hf_config)
    cut = save_hf(
        tree,
        tmp_path / "b",
        names=model.names,
        config=model.hf_config,
        max_shard_size="4KB",
    )
    same(tensors_of(cut.folder), tensors_of(whole.folder))
    assert len(cut.files) > 2 and cut.size == whole.size
    index = json.loads((cut.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.size
    for name, file in index["weight_map"].items():
        assert name in load_file(cut.folder / file)
    for file in cut.files:
        held = load_file(cut.folder / file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 4000
    # A stack of layers, read and written again.
    scanned, params = models.load(
        family.folder, **family.facts.options, scan_layers=True
    )
    same(
        tensors_of(
            save_hf(
                params,
                tmp_path / "c",
                names=scanned.names,
                config=scanned.hf_config,
                axes=scanned.axes,
            ).folder
        ),
        tensors_of(family.folder),
    )


# --- without PyTorch: one small tree

ROWS = [
    jp.models.ModuleName("model.layers.{i}.up", "layers/up", "linear"),
    jp.models.ModuleName("model.norm", "norm", "norm"),
]
CONFIG = {"model_type": "mine"}


def small(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), dtype)
    return {"layers": {"up": {"kernel": draw(2, 4, 6)}}, "norm": {"scale": draw(6)}}


def adapted(params):
    tree = jp.attach(
        params,
        jp.lora(2),
        ["up"],
        key=jax.random.key(0),
        axes={"up": "layer in out"},
    )
    return scrambled(tree, scale=0.01)


def save(tree, folder, **options):
    return save_hf(tree, folder, **({"names": ROWS, "config": CONFIG} | options))


def test_half_precision_is_rounded_once(tmp_path):
    low = adapted(small(jnp.bfloat16))
    done = save(low, tmp_path / "low")
    merged = np.asarray(jp.merge(low)["layers"]["up"]["kernel"])
    tensors = {}
    from safetensors import safe_open

    with safe_open(tmp_path / "low" / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for i in range(2):
        assert np.array_equal(tensors[f"model.layers.{i}.up.weight"], merged[i].T)
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    wide = save(low, tmp_path / "wide", dtype="float32")
    exact = jax.tree.map(lambda x: x, low)
    node = exact["layers"]["up"]["kernel"]
    exact["layers"]["up"]["kernel"] = node.replace(base=node.base.astype(jnp.float32))
    kernel = np.asarray(jp.merge(exact)["layers"]["up"]["kernel"])
    written = tensors_of(wide.folder)["model.layers.1.up.weight"]
    np.testing.assert_allclose(written, kernel[1].T, rtol=0, atol=1e-7)
    assert np.max(np.abs(written - np.float32(merged[1].T))) > 1e-3  # control


def test_what_is_not_written(tmp_path):
    params = small()

    def refused(match, tree=params, error=ValueError, **options):
        with pytest.raises(error, match=match):
            save(tree, tmp_path / "no", **options)
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "no").exists()

    refused("'norm/scale'.* in no row", names=ROWS[:1])
    refused("no 'model_type'", config={})
    refused("`max_shard_size` must be", max_shard_size="many")
    mixed = params | {"norm": {"scale": jnp.ones(6, jnp.bfloat16)}}
    refused("dtypes .*write dtype='float32'", mixed)
    save(mixed, tmp_path / "mixed", dtype="float32")
    tree = adapted(params)
    node = tree["layers"]["up"]["kernel"]
    bad = {"a": node.trainable["a"].at[1].set(jnp.inf), "b": node.trainable["b"]}
    tree["layers"]["up"]["kernel"] = node.replace(trainable=bad)
    refused("'layers/up/kernel' is not finite, as model.layers.1.up.weight", tree)
    wide = params | {"norm": {"scale": jnp.full(6, 1e5)}}
    refused("'norm/scale' is not finite.* beyond what float16", wide, dtype="float16")
    save(wide, tmp_path / "wide", dtype="bfloat16")
    (tmp_path / "base").mkdir()
    refused("holds no config.json", error=FileNotFoundError, source=tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "yours"}')
    refused(
        "of a 'mine' and the one in `source` of a 'yours'", source=tmp_path / "base"
    )
    with pytest.raises(FileExistsError, match="choose another"):
        save(params, tmp_path)


def test_the_base_s_files_go_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    kept = {"model_type": "mine", "x": 1, "id2label": {"0": "no", "1": "yes"}}
    gone = {"quantization_config": {"bits": 4}, "torch_dtype": "float16"}
    (base / "config.json").write_text(json.dumps(kept | gone))
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "code.py"):
        (base / name).write_text(name)
    save(small(), tmp_path / "a", source=base, config=CONFIG | {"num_labels": 2})
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "merges.txt"),
        *("chat_template.jinja", "README.md"),
    }
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written == kept | {"dtype": "float32"}
    save(small(), tmp_path / "b", source=base, config=CONFIG | {"num_labels": 3})
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["label2id"] == {f"LABEL_{i}": i for i in range(3)}
