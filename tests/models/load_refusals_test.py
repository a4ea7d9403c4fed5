"""What does not fit is refused, all of it at once, with the way out."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_toolbox import D, assert_same, tensors

from jaxpeft import models
from jaxpeft.models._families import FAMILIES


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
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(ValueError, match=r"'lama', which is not .*'llama'"):
        models.load(tmp_path)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`folder_or_name` .*gone' is no folder"):
        models.load(tmp_path / "gone")
    with pytest.raises(ValueError, match="'./gone' is no folder"):
        models.tokenizer("./gone")
    message = r"'minilmm' is no folder.*\['minilm', 'smollm2'\].*hub"
    with pytest.raises(ValueError, match=message):
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
    assert "model-*-of-*.safetensors" in patterns and "*.bin" not in patterns


@pytest.mark.interop
def test_no_family_is_taken_for_its_neighbour(tmp_path):
    """Of all that transformers knows, what is not implemented has no near name here."""
    from transformers import CONFIG_MAPPING

    others = set(CONFIG_MAPPING.keys()) - set(FAMILIES)
    assert {"mixtral", "qwen2_moe", "llama4", "gemma3n", "phi", "xlm-roberta"} < others
    for name in sorted(others):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        with pytest.raises(ValueError, match=f"{name!r}, which is not impl") as caught:
            models.load(tmp_path)
        assert "mean" not in str(caught.value)
    assert {"bert", "llama", "gemma3_text"} < set(CONFIG_MAPPING.keys())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_weights_that_are_not_finite(write, value, dtype, scan_layers):
    content = tensors(dtype=dtype)
    name = "bert.encoder.layer.1.output.dense.weight"
    content[name][3, 5] = value
    with pytest.raises(ValueError, match=f"{name} in .*safetensors is not finite: 1 o"):
        models.load(write(content), scan_layers=scan_layers)
    content[name][3, 5] = 0
    content["classifier.weight"][0, 0] = value  # of a head that is not read
    models.load(write(content, folder="whole"), scan_layers=scan_layers)


def test_numbers_beyond_the_dtype_asked_for(write):
    content = tensors()
    content["bert.embeddings.LayerNorm.weight"][0] = 1e5
    folder = write(content)
    with pytest.raises(
        ValueError, match="`param_dtype` is float16, .*LayerNorm.weight"
    ):
        models.load(folder, param_dtype="float16")
    models.load(folder, param_dtype="bfloat16")


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
