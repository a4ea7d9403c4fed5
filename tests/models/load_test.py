"""Checkpoints into trees: every tensor in its place, or all that is wrong said once."""

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft import models
from jaxpeft.models import _checkpoint as checkpoint

D, F, V, P, L = 16, 24, 64, 20, 2


def layer_names(i):
    e = f"encoder.layer.{i}"
    for name in ("query", "key", "value"):
        yield f"{e}.attention.self.{name}.weight", (D, D)
        yield f"{e}.attention.self.{name}.bias", (D,)
    for name, shape in (
        ("attention.output.dense", (D, D)),
        ("intermediate.dense", (F, D)),
        ("output.dense", (D, F)),
    ):
        yield f"{e}.{name}.weight", shape
        yield f"{e}.{name}.bias", shape[:1]
    for name in ("attention.output", "output"):
        yield f"{e}.{name}.LayerNorm.weight", (D,)
        yield f"{e}.{name}.LayerNorm.bias", (D,)


def body():
    """Names and shapes as transformers writes them, by hand."""
    yield "embeddings.word_embeddings.weight", (V, D)
    yield "embeddings.position_embeddings.weight", (P, D)
    yield "embeddings.token_type_embeddings.weight", (2, D)
    yield "embeddings.LayerNorm.weight", (D,)
    yield "embeddings.LayerNorm.bias", (D,)
    for i in range(L):
        yield from layer_names(i)


POOLER = {"pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}
CLASSIFIER = {"classifier.weight": (3, D), "classifier.bias": (3,)}


def tensors(prefix="bert.", pooler=True, classifier=True, dtype=np.float32, **extra):
    rng = np.random.default_rng(0)
    names = dict(body()) | (POOLER if pooler else {})
    names = {prefix + name: shape for name, shape in names.items()}
    names |= CLASSIFIER if classifier else {}
    names |= {name.replace("__", "."): shape for name, shape in extra.items()}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in names.items()}


@pytest.fixture
def write(tmp_path, tiny):
    """Writes a folder: tensors, a config, perhaps in several files."""

    def make(content, model_type="bert", shards=1, folder=None, **changes):
        folder = tmp_path / (folder or "model")
        folder.mkdir()
        config = tiny(model_type, **changes)
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            safetensors.numpy.save_file(content, folder / "model.safetensors")
            return folder
        index = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(content.items())[i::shards])
            safetensors.numpy.save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        )
        return folder

    return make


def flat(params):
    return flatten_dict(params, sep="/")


def assert_same(params, other):
    ours, theirs = flat(params), flat(other)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_every_tensor_finds_its_place(write):
    content = tensors()
    model, params = models.load(write(content), head="classification", num_labels=3)
    got = flat(params)
    assert {k: v.shape for k, v in got.items()} == {
        k: v.shape for k, v in flat(models.abstract(model)).items()
    }
    for path, name in {
        "embeddings/word_embeddings/embedding": "embeddings.word_embeddings.weight",
        "embeddings/LayerNorm/scale": "embeddings.LayerNorm.weight",
        "encoder/layer_0/attention/query/bias": (
            "encoder.layer.0.attention.self.query.bias"
        ),
        "encoder/layer_1/output/LayerNorm/bias": (
            "encoder.layer.1.output.LayerNorm.bias"
        ),
    }.items():
        np.testing.assert_array_equal(got[path], content[f"bert.{name}"])
    for path, name in {
        "encoder/layer_1/attention/key/kernel": (
            "bert.encoder.layer.1.attention.self.key.weight"
        ),
        "encoder/layer_0/intermediate/dense/kernel": (
            "bert.encoder.layer.0.intermediate.dense.weight"
        ),
        "pooler/dense/kernel": "bert.pooler.dense.weight",
        "classifier/kernel": "classifier.weight",
    }.items():
        np.testing.assert_array_equal(got[path], content[name].T)


def test_the_scanned_tree_is_the_stack_of_the_unrolled(write):
    folder = write(tensors())
    _, plain = models.load(folder)
    _, stacked = models.load(folder, scan_layers=True)
    plain, stacked = flat(plain), flat(stacked)
    assert {p.replace("layer_0", "layer") for p in plain if "layer_1" not in p} == set(
        stacked
    )
    for path, leaf in stacked.items():
        if "/layer/" in path:
            for i in range(L):
                one = plain[path.replace("/layer/", f"/layer_{i}/")]
                np.testing.assert_array_equal(leaf[i], one)
        else:
            np.testing.assert_array_equal(leaf, plain[path])


def test_spellings_of_the_same_checkpoint(write):
    """Shards, no prefix, old names: one tree."""
    content = tensors()
    options = {"head": "classification", "num_labels": 3}
    _, wanted = models.load(write(content), **options)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): leaf
        for name, leaf in content.items()
    }
    bare = {name.removeprefix("bert."): leaf for name, leaf in content.items()}
    for folder in (
        write(content, shards=3, folder="shards"),
        write(old, folder="old"),
        write(bare, folder="bare"),
    ):
        assert_same(models.load(folder, **options)[1], wanted)


def test_the_single_file_wins_over_the_index(write):
    content = tensors()
    folder = write(content, shards=2)
    other = {name: leaf + 1 for name, leaf in content.items()}
    safetensors.numpy.save_file(other, folder / "model.safetensors")
    table = models.load(folder)[1]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(
        table, other["bert.embeddings.word_embeddings.weight"]
    )


def test_the_pooler_is_kept_and_the_classifier_drawn(write, caplog):
    content = tensors(classifier=False)
    folder = write(content)
    with pytest.raises(ValueError, match=r"`key` is needed.*no \['classifier'\]"):
        models.load(folder, head="classification", num_labels=4)
    caplog.clear()
    model, params = models.load(
        folder, head="classification", num_labels=4, key=jax.random.key(3)
    )
    np.testing.assert_array_equal(
        params["pooler"]["dense"]["kernel"], content["bert.pooler.dense.weight"].T
    )
    assert params["classifier"]["kernel"].shape == (D, 4)
    whole = models.init(model, jax.random.key(3))
    np.testing.assert_array_equal(
        params["classifier"]["kernel"], whole["classifier"]["kernel"]
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(
        "NOT in the checkpoint, drawn at random: classifier/kernel, classifier/bias"
    )


def test_a_masked_language_model_gives_its_body(write, caplog):
    """Buffers and other heads are reported, once, and not used."""
    extra = {"lm_head__dense__weight": (D, D), "lm_head__bias": (V,)}
    content = tensors("roberta.", pooler=False, classifier=False, **extra)
    content["roberta.embeddings.position_ids"] = np.arange(P)[None]
    folder = write(content, "roberta")
    with caplog.at_level(logging.INFO):
        _, params = models.load(folder, head="regression", key=jax.random.key(0))
    assert list(params["classifier"]) == ["dense", "out_proj"]
    (record,) = caplog.records
    assert (
        "not used by this model: lm_head.bias, lm_head.dense.weight, "
        "roberta.embeddings.position_ids;" in record.getMessage()
    )


def test_without_a_head_the_head_is_not_read(write, caplog):
    with caplog.at_level(logging.INFO):
        _, params = models.load(write(tensors()))
    assert sorted(params) == ["embeddings", "encoder"]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "classifier.weight" in record.getMessage()
    assert "bert.pooler.dense.bias" in record.getMessage()


def test_a_token_classifier_is_not_taken_for_ours(write, caplog):
    folder = write(tensors(), architectures=["BertForTokenClassification"])
    _, params = models.load(
        folder, head="classification", num_labels=3, key=jax.random.key(0)
    )
    assert np.all(params["classifier"]["bias"] == 0)
    assert "drawn at random: classifier/kernel" in caplog.text


def test_dtypes(write):
    content = tensors()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    content[name] = content[name].astype(jnp.bfloat16)  # files may mix
    folder = write(content)
    model, params = models.load(folder)
    query = [params["encoder"][f"layer_{i}"]["attention"]["query"] for i in range(L)]
    assert [q["kernel"].dtype for q in query] == [jnp.bfloat16, jnp.float32]
    assert (model.dtype, model.param_dtype) == (jnp.float32, jnp.float32)
    _, stacked = models.load(folder, scan_layers=True)
    assert (
        stacked["encoder"]["layer"]["attention"]["query"]["kernel"].dtype == "float32"
    )

    model, half = models.load(folder, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert model.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        half["encoder"]["layer_1"]["output"]["dense"]["kernel"],
        content["bert.encoder.layer.1.output.dense.weight"].T.astype(jnp.bfloat16),
    )
    model, params = models.load(folder, dtype="bfloat16", param_dtype=jnp.float32)
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    wide = write(tensors(dtype=np.float64), folder="wide")
    model, params = models.load(wide)  # JAX has no float64 here
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half = write(tensors(dtype=jnp.bfloat16), folder="half")
    model, params = models.load(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert model.dtype == model.param_dtype == jnp.bfloat16


# ------------------------------------ Shardings -------------------------------------


@pytest.fixture
def mesh():
    return jax.make_mesh(
        (2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def spec_for(path, shape):
    if "classifier" in path or len(shape) < 2:
        return PartitionSpec()
    if "word_embeddings" in path:
        return PartitionSpec("fsdp")  # replicated over tensor
    return PartitionSpec(*(None,) * (len(shape) - 2), "fsdp", "tensor")


@pytest.fixture
def reads(monkeypatch):
    """Every block read from disk: (tensor, bounds, bytes)."""
    seen = []
    read = checkpoint.read_block

    def record(handles, tensor, index):
        block = read(handles, tensor, index)
        seen.append((tensor.name, str(index), block.nbytes))
        return block

    monkeypatch.setattr(checkpoint, "read_block", record)
    return seen


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_sharded_equals_plain_and_reads_each_block_once(
    write, mesh, reads, scan_layers
):
    content = tensors()
    folder = write(content, shards=2)
    options = {
        "head": "classification",
        "num_labels": 3,
        "scan_layers": scan_layers,
    }
    _, plain = models.load(folder, **options)
    whole = sum(leaf.nbytes for leaf in content.values())
    assert sum(count for *_, count in reads) == whole
    reads.clear()

    def place(path, shape):
        if "position" in path or "token_type" in path:
            return NamedSharding(mesh, PartitionSpec(None, "tensor"))
        return NamedSharding(mesh, spec_for(path, shape))

    _, params = models.load(folder, sharding=place, **options)
    assert_same(params, plain)
    assert len(reads) == len(set(reads)), "a block was read twice"
    assert sum(count for *_, count in reads) == whole  # eight devices, every byte once
    query = "layer" if scan_layers else "layer_1"
    kernel = params["encoder"][query]["attention"]["query"]["kernel"]
    assert {s.data.shape[-2:] for s in kernel.addressable_shards} == {(D // 2, D // 4)}
    assert kernel.sharding.spec == spec_for("query/kernel", kernel.shape)


def test_shardings_as_one_and_as_a_tree(write, mesh):
    folder = write(tensors(classifier=False))
    options = {"head": "classification", "num_labels": 3, "key": jax.random.key(0)}
    model, plain = models.load(folder, **options)
    everywhere = NamedSharding(mesh, PartitionSpec())
    options["key"] = jax.random.key(0)
    _, params = models.load(folder, sharding=everywhere, **options)
    assert_same(params, plain)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}

    tree = jax.tree.map(lambda _: everywhere, plain)
    tree["classifier"]["kernel"] = NamedSharding(mesh, PartitionSpec("tensor"))
    options["key"] = jax.random.key(0)
    _, params = models.load(folder, sharding=tree, **options)
    assert_same(params, plain)
    assert params["classifier"]["kernel"].sharding.spec == PartitionSpec("tensor")

    drawn = models.init(model, jax.random.key(1), sharding=tree)
    assert_same(drawn, models.init(model, jax.random.key(1)))
    assert drawn["classifier"]["kernel"].sharding.spec == PartitionSpec("tensor")

    del tree["pooler"]["dense"]["bias"]
    with pytest.raises(ValueError, match=r"`sharding` is a tree.*pooler/dense/bias"):
        models.load(folder, sharding=tree, **options)
    with pytest.raises(ValueError, match=r"`sharding` of .*; write jax.sharding.Named"):
        models.load(folder, sharding=spec_for, **options)
    uneven = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
    with pytest.raises(ValueError, match="`sharding` of .*should evenly divide"):
        models.load(folder, sharding=uneven, **options)


@pytest.mark.slow
def test_two_processes_read_disjoint_shards(write):
    folder = write(tensors(classifier=False, pooler=False))
    code = textwrap.dedent(
        """
        import json, sys
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=2, process_id=rank
        )
        from jaxpeft import models
        from jaxpeft.models import _checkpoint as checkpoint
        seen, read = [], checkpoint.read_block
        def record(handles, tensor, index):
            block = read(handles, tensor, index)
            if tensor.name.endswith("dense.weight"):
                seen.append([tensor.name, str(index), block.size])
            return block
        checkpoint.read_block = record
        mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        def place(path, shape):
            spec = PartitionSpec("x") if path.endswith("kernel") else PartitionSpec()
            return NamedSharding(mesh, spec)
        models.load(folder, sharding=place)
        print("READS", json.dumps(seen))
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    first, second = (
        json.loads(output.partition("READS ")[2].splitlines()[0]) for output in outputs
    )
    blocks = [tuple(read[:2]) for read in first + second]
    assert len(blocks) == len(set(blocks))
    sizes = [sum(read[2] for read in reads) for reads in (first, second)]
    assert sizes == [L * (D * D + 2 * D * F) // 2] * 2


# ------------------------------------- Refusals -------------------------------------


def test_all_that_does_not_fit_is_listed_at_once(write):
    content = tensors()
    query = "bert.encoder.layer.0.attention.self.query"
    content[f"{query}s.weight"] = content.pop(f"{query}.weight")  # misspelt
    content["bert.encoder.layer.7.output.dense.bias"] = np.zeros(D, np.float32)
    del content["bert.embeddings.LayerNorm.bias"]
    key = "bert.encoder.layer.1.attention.self.key"
    content[f"{key}.weight"] = np.zeros((D, D + 1), np.float32)
    content[f"{key}.bias"] = np.zeros(D, np.int32)
    content["embeddings.token_type_embeddings.weight"] = np.zeros((2, D), np.float32)
    folder = write(content)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        models.load(folder, head="classification", num_labels=5)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    query = query.removeprefix("bert.")
    assert "2 missing:" in lines
    assert f"{query}.weight (nearest: {query}s.weight)" in lines
    assert any(line.startswith("embeddings.LayerNorm.bias (nearest") for line in lines)
    assert "2 unused:" in lines
    assert f"bert.{query}s.weight (nearest: {query}.weight)" in lines
    assert any(
        line.startswith("bert.encoder.layer.7.output.dense.bias") for line in lines
    )
    assert "4 of another shape or dtype:" in lines
    assert f"{key}.weight: [16, 17] in the file, [16, 16] in the model" in lines
    assert f"{key}.bias: dtype I32" in lines
    assert any("classifier.bias: [3]" in x and "num_labels=3" in x for x in lines)
    assert "1 there twice:" in lines
    assert (
        "bert.embeddings.token_type_embeddings.weight and "
        "embeddings.token_type_embeddings.weight" in lines
    )


def test_a_torn_head_is_missing_not_new(write):
    content = tensors()
    del content["classifier.bias"]
    with pytest.raises(ValueError, match=r"1 missing:\s+classifier.bias"):
        models.load(
            write(content), head="classification", num_labels=3, key=jax.random.key(0)
        )


def test_another_config(write):
    """A checkpoint of another config names every tensor that differs."""
    folder = write(tensors(), intermediate_size=32, num_hidden_layers=3)
    with pytest.raises(
        ValueError, match="(?s)16 missing:.*6 of another shape"
    ) as caught:
        models.load(folder)
    assert "[24, 16] in the file, [32, 16] in the model" in str(caught.value)


@pytest.mark.parametrize("cut", [4, 40, -10])
def test_a_truncated_file(write, cut):
    folder = write(tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="no whole safetensors file.*cut short"):
        models.load(folder)


def test_index_and_files_that_disagree(write):
    folder = write(tensors(), shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["bert.ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not there: .'bert.ghost in model-00001"):
        models.load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="not there: .'model-00002-of-00002"):
        models.load(folder)


def test_folders_without_weights(tmp_path, tiny):
    with pytest.raises(ValueError, match="has no config.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON file"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny("bert")))
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        models.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="AutoModel.from_pretrained.*save_pretrained"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"'llama'; known are \['bert', 'roberta'\]"):
        models.load(tmp_path)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`folder_or_name` .*gone' is no folder"):
        models.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="'./gone' is no folder"):
        models.tokenizer("./gone")
    with pytest.raises(ValueError, match=r"'minilmm' is no folder.*\['minilm'\].*hub"):
        models.load("minilmm")  # the hub is offline here


def test_the_hub_gives_a_folder(write, monkeypatch):
    import huggingface_hub

    folder = write(tensors())
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _, params = models.load("someone/bert")
    assert_same(params, models.load(folder)[1])
    ((name, patterns),) = asked
    assert name == "someone/bert"
    assert "model*.safetensors" in patterns and "*.bin" not in patterns


def test_torch_is_not_needed(write):
    """Loading works where torch and transformers are absent."""
    folder = write(tensors())
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from jaxpeft import models\n"
        f"models.load({str(folder)!r})\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
