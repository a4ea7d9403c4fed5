"""A tokenizer that is not the model's is refused, by its files and its vocabulary."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as kinds

from jaxpeft import models


def bpe(size):
    inner = Tokenizer(kinds.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["one two three four five six seven eight"], trainer)
    return inner


def write(folder, model_type, rows=256, **files):
    folder.mkdir()
    config = {"model_type": model_type, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "qwen2", "gemma2"])
def test_a_folder_without_a_tokenizer(tmp_path, model_type):
    folder = write(tmp_path / "bare", model_type)
    with pytest.raises(
        ValueError, match=r"has [1-9] tokens.* the folder lacks \['tokeni"
    ):
        models.tokenizer(folder)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_a_folder_of_which_transformers_makes_none(tmp_path, model_type):
    folder = write(tmp_path / "bare", model_type)
    with pytest.raises(ValueError, match="makes no tokenizer of .'config.json'. in"):
        models.tokenizer(folder)


def test_a_file_of_two_is_missing(tmp_path):
    """A vocabulary without its merges finds letters alone."""
    inner = bpe(270)
    parts = json.loads(inner.to_str())["model"]
    vocabulary = json.dumps(parts["vocab"])
    merges = "\n".join(" ".join(pair) for pair in parts["merges"])
    folder = write(tmp_path / "part", "gpt2", 270, vocab__json=vocabulary)
    with pytest.raises(ValueError, match=r"no tokenizer of \['config.json', 'vocab.js"):
        models.tokenizer(folder)
    (folder / "merges.txt").write_text(merges)
    ids = models.tokenizer(folder)("one")["input_ids"]
    assert ids == inner.encode("one").ids and len(ids) < 3


def test_a_vocabulary_of_another_model(tmp_path):
    inner = bpe(280)
    inner.add_special_tokens(["<|endoftext|>"])  # GPT-2's class would add it
    text, size = inner.to_str(), inner.get_vocab_size()
    for rows in (size, size + 60, 2 * size):  # the embedding may be padded
        folder = write(tmp_path / f"{rows}", "gpt2", rows, tokenizer__json=text)
        assert len(models.tokenizer(folder)) == size
    for rows in (2 * size + 1, size - 2):
        folder = write(tmp_path / f"{rows}", "gpt2", rows, tokenizer__json=text)
        match = f"has {size} tokens, up to {size - 2}, .* {rows} rows. It is another"
        with pytest.raises(ValueError, match=match):
            models.tokenizer(folder)
    # A token beside what texts are made of, as Gemma's picture, may lie beyond.
    folder = write(tmp_path / "added", "gpt2", size - 1, tokenizer__json=text)
    assert len(models.tokenizer(folder)) == size
    other = write(tmp_path / "other", "gpt_neox", 10, tokenizer__json=text)
    assert len(models.tokenizer(other)) > size  # its model is not here
