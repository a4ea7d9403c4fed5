"""The console script on adapters of a tied model's embedding or head alone.

Whether the function is PEFT's is tests/interop/peft_tied_test.py's business; here every
command keeps it, and none puts such an adapter onto the table that is both.
"""

import json

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import interop, models
from jaxpeft.cli import main

pytestmark = pytest.mark.interop

CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
WORDS = ["<unk>", *(f"w{i}" for i in range(1, 20))]
IDS = np.random.default_rng(0).integers(3, 20, (2, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tied model with a tokenizer, in a folder."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "llama"
    model = models.from_config(CONFIG, head="causal_lm")
    params = models.init(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, params)
    interop.save_hf(params, folder, names=model.names, config=model.hf_config)
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """``({name: tree}, {name: folder})``: look-up (PEFT's), head (ours), a layer."""
    root = tmp_path_factory.mktemp("adapters")
    model, params = models.load(base, head="causal_lm")
    loose = interop.untie(params, names=model.names)
    trees, folders = {}, {}
    for i, (name, start, target) in enumerate(
        [
            ("words", loose, "embed_tokens/lookup"),
            ("head", loose, "lm_head"),
            ("layer", params, "q_proj"),
        ]
    ):
        tree = jp.attach(start, jp.lora(2 + i), [target], key=jax.random.key(i))
        trainable, frozen = jp.partition(tree)
        draw = np.random.default_rng(i).normal
        moved = jax.tree.map(
            lambda x: x + np.float32(draw(size=x.shape)),  # noqa: B023
            trainable,
        )
        trees[name] = jp.combine(moved, frozen)
        folders[name] = root / name
    for name in ("words", "layer"):
        interop.save_peft(
            trees[name], folders[name], names=model.names, task_type="CAUSAL_LM"
        )
    interop.save_adapter(trees["head"], folders["head"])
    return trees, folders


def logits(params):
    model = models.from_config(CONFIG, head="causal_lm")
    return np.asarray(model.apply({"params": params}, IDS))


@pytest.mark.parametrize("name", ["words", "head"])
def test_merge_and_back(name, base, adapters, tmp_path):
    trees, folders = adapters
    want = logits(jp.merge(trees[name]))
    out = tmp_path / "merged"
    folder = str(folders[name])
    assert main(["merge", folder, "--base", str(base), "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model, params = models.load(out, head="causal_lm")
    got = np.asarray(model.apply({"params": params}, IDS))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    _, plain = models.load(base, head="causal_lm")
    assert np.abs(want - logits(plain)).max() > 0.1

    other = "import" if name == "words" else "export"
    out = tmp_path / "other"
    assert main([other, folder, "--base", str(base), "--out", str(out)]) == 0
    names = models.from_config(CONFIG, head="causal_lm").names
    load = interop.load_adapter if other == "import" else interop.load_peft
    np.testing.assert_allclose(
        logits(jp.merge(load(out, plain, names=names))), want, rtol=0, atol=2e-5
    )


def test_every_prompt_has_its_own(base, adapters, capsys):
    trees, folders = adapters
    rows = ["words", "__base__", "layer", "head"]
    given = [f"--adapter={name}={folder}" for name, folder in folders.items()]
    capsys.readouterr()
    status = main(
        ["generate", *["w7 w9"] * 4, "--base", str(base), *given]
        + ["--rows", ",".join(rows), "--max-new-tokens", "5"]
    )
    out, err = capsys.readouterr()
    assert status == 0, err
    lines = out.splitlines()
    model, params = models.load(base, head="causal_lm")
    for name, line in zip(rows, lines, strict=True):
        tree = trees.get(name, params)
        new = models.generate(model, tree, [[7, 9]], max_new_tokens=5, stop=[0])[0]
        assert line.split() == [WORDS[i] for i in new], name
    assert len({lines[0], lines[1], lines[3]}) == 3
