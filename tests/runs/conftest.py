"""A model, a tokenizer, rows and a config so small that a run takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from causal_toolbox import write_llama
from flax.traverse_util import flatten_dict

from jaxpeft import models, runs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # train.py is a script, not part of the package
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(60))]
SHAPE = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Of processes that train: as where there is no PyTorch, which takes seconds to import.
WITHOUT_TORCH = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name == "torch" else found(name, *rest)
)
"""
CONFIG = """
import importlib.util

def get_config():
    spec = importlib.util.spec_from_file_location("quickstart", {quickstart!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config().unlock()
    config.model.name = {model!r}
    config.data = dict(
        name="files", train={rows!r}, text="text", label="label", labels=("a", "b", "c")
    )
    config.max_length, config.lengths = 16, (16,)
    config.batch_size, config.eval_batch_size = 8, 16
    config.adapter.rank, config.adapter.dropout = 4, 0.1
    config.optimizer.learning_rate = config.optimizer.head_learning_rate = 1e-2
    config.train_for, config.evaluate_every = "12 steps", "6 steps"
    config.save_every, config.log.every = "2 steps", 3
    config.log.compilation_cache = {cache!r}
    return config.lock()
"""


def write_model(folder: Path) -> None:
    import safetensors.numpy
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    params = models.init(models.from_config(SHAPE), jax.random.key(7))
    tensors = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        turned = leaf.T if path.endswith("kernel") else leaf
        tensors[_hugging_face_name(path)] = np.ascontiguousarray(turned)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE))


def _hugging_face_name(path: str) -> str:
    module, _, leaf = path.rpartition("/")
    for name in ("query", "key", "value"):
        module = module.replace(f"attention/{name}", f"attention/self/{name}")
    module = module.replace("layer_", "layer/").replace("/", ".")
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


def write_rows(path: Path) -> None:
    """A class has its own words: w0 to w19, w20 to w39, w40 to w59."""
    random = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(240):
            kind, length = random.integers(0, 3), random.integers(3, 12)
            words = kind * 20 + random.integers(0, 20, length)
            text, label = " ".join(f"w{w}" for w in words), "abc"[kind]
            print(json.dumps({"text": text, "label": label}), file=file)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The path of the small run's config file."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    file = folder / "tiny.py"
    file.write_text(
        CONFIG.format(
            quickstart=str(ROOT / "configs/quickstart.py"),
            model=str(folder / "model"),
            rows=str(folder / "rows.jsonl"),
            cache=str(folder / "cache"),
        )
    )
    return file


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The folder of a tiny Llama, and of sums for it."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.fixture
def tiny_config(tiny):
    """Loads the small run's config: tiny_config("seed=1")."""
    return lambda *overrides: runs.load_config(tiny, overrides)


@pytest.fixture(scope="session")
def start(tiny, tmp_path_factory):
    """Starts train.py on the small config in a process of its own, on two devices."""
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
    first = tmp_path_factory.mktemp("first")
    (first / "sitecustomize.py").write_text(WITHOUT_TORCH)
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(first))),
        "COLUMNS": "100",
    }

    def start(*arguments, script=(str(ROOT / "train.py"),)):
        return subprocess.Popen(
            [sys.executable, *script, f"--config={tiny}", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def command(start):
    """The same, waited for: (returncode, stdout, stderr)."""

    def command(*arguments, check=True, **options):
        (done,) = finish([start(*arguments, **options)])
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return command


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def finish(processes, timeout=300) -> list[Done]:
    """Waits for processes; none is left behind, whatever happens."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
        pairs = zip(processes, texts, strict=True)
        return [Done(process.returncode, *text) for process, text in pairs]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def all_of():
    return finish
