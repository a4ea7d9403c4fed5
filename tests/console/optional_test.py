"""Packages that are missing: one message, with the command that helps."""

import sys

import numpy as np
import pytest

from jaxpeft import data, dimension, interop, models, training
from jaxpeft.console import import_message, optional


def one_row():
    ids = np.zeros(1, np.int32)
    return data.Encoded("a", ids, None, np.array([0, 1]), ids, 0, 4)


# What is done, and the package that it needs.
NEEDS = {
    "gguf": lambda folder: models.load(folder / "x.gguf"),
    "transformers": lambda folder: models.tokenizer(folder),
    "huggingface_hub": lambda folder: models.load("nobody/nothing"),
    "safetensors": lambda folder: interop.load_peft(folder, {}, names=[], axes={}),
    "matplotlib": lambda folder: dimension.plot_profiles(
        {"a": [1.0, 2.0]}, folder / "x.png"
    ),
    "orbax": lambda folder: training.Checkpointer(folder, config={}),
    "grain": lambda folder: data.batches(one_row(), 1, seed=0),
    "pyarrow": lambda folder: data.read_parquet(folder / "x.parquet"),
    "zstandard": lambda folder: data.read_jsonl(folder / "x.jsonl.zst"),
    "tensorflow_datasets": lambda folder: data.task("cola"),
    "reasoning_gym": lambda folder: data.task("reasoning_gym/gcd"),
}


@pytest.mark.parametrize("module", NEEDS)
def test_every_room_says_which_extra_brings_a_package(module, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for name in [module, "compression", *sys.modules]:  # as if it were not installed
        if name.split(".")[0] in (module, "compression"):
            monkeypatch.setitem(sys.modules, name, None)
    extra = "reasoning" if module == "reasoning_gym" else "train"
    message = rf"need the package `{module}`: pip install 'jaxpeft\[{extra}\]'\.$"
    with pytest.raises(ImportError, match=message):
        NEEDS[module](tmp_path)


def test_other_errors_go_through():
    with pytest.raises(ZeroDivisionError), optional("Sums"):
        1 / 0  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name") as error:
        with optional("Names"):
            from json import no_such_name  # noqa: F401
    assert import_message(error.value).endswith("Write: pip install 'jaxpeft[train]'")
    with pytest.raises(ImportError) as error, optional("Clouds"):
        import no_such_module.inside  # noqa: F401
    assert error.value.name == "no_such_module"
    assert import_message(error.value) == str(error.value)
