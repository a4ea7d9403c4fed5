"""Tokenizers of GGUF files: against transformers' reader of them, and its classes."""

import functools
import json
import pathlib

import gguf
import numpy as np
import pytest

from jaxpeft import models

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = {
    "<unk>": UNKNOWN,
    "<s>": CONTROL,
    "</s>": CONTROL,
    "<think>": USER,
    "</think>": USER,
    "<tool_call>": USER,
    "[PAD7]": UNUSED,
}
TEXTS = [
    "The year 2024, we'll say: it's 31415 times    better!\n\n  New\r\n\tand tabs.",
    "<think>\nI think so.</think> Hello <tool_call>x</tool_call>world</s>",
    "<think> spaced </think>",
    " leading space, trailing ",
    "Grüße, 世界! cafe\u0301 🙂 [PAD7] <s>!! <unk> DON'T",
    "",
]
ROOT = pathlib.Path(__file__).parents[2]
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def trained(kind):
    """Tokens, merges and scores of a small vocabulary, and the types of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    prose = "".join(page.read_text(encoding="utf-8") for page in PROSE)
    text = prose[:20000] + "".join(TEXTS)
    inner = Tokenizer(models.BPE())
    if kind == "gpt2":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, bytes_ = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁")
        alphabet, bytes_ = ["▁"], [f"<0x{i:02X}>" for i in range(256)]
        text = "".join(x for x in text if x.isascii())  # all others: as bytes
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([text], trainer)
    model = json.loads(inner.to_str())["model"]
    own = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*SPECIAL, *bytes_, *own]
    types = [*SPECIAL.values(), *[BYTE] * len(bytes_), *[NORMAL] * len(own)]
    merges = [" ".join(pair) for pair in model["merges"]]
    made = {"".join(pair): -i for i, pair in enumerate(model["merges"])}
    scores = [float(made.get(token, 0)) for token in tokens]
    return tokens, types, merges, scores


def write(folder, kind="gpt2", pre="llama-bpe", tokens=None, drop=(), rows=None, **own):
    """A file with a tokenizer; fields of ``own`` beside the usual."""
    usual, types, merges, scores = trained(kind)
    tokens = usual if tokens is None else tokens
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count"):
        writer.add_uint32(f"llama.{name}", 8)
    writer.add_uint32("llama.feed_forward_length", 8)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    fields = {
        "model": kind,
        "pre": pre if kind == "gpt2" else "default",
        "tokens": tokens,
        "token_type": types,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({"merges": merges} if kind == "gpt2" else {"scores": scores}),
        **own,
    }
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, value in fields.items():
        if name not in drop:
            put = add.get(type(value), writer.add_array)
            put(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((rows or len(tokens), 8), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(ours, theirs, texts=TEXTS):
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours(text, text)["input_ids"] == theirs(text, text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.interop
@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("eos", [False, True], ids=["", "eos"])
@pytest.mark.parametrize(
    ("kind", "pre"),
    [
        ("gpt2", "llama-bpe"),
        ("gpt2", "deepseek-r1-qwen"),
        ("gpt2", "gpt-2"),
        ("llama", "default"),
    ],
)
def test_every_type_of_token_and_both_ends(tmp_path, kind, pre, bos, eos):
    from transformers import AutoTokenizer

    own = {"add_bos_token": bos, "add_eos_token": eos}
    path = write(tmp_path, kind, pre, **own)
    ours = models.tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert_same(ours, theirs)
    tokens = trained(kind)[0]
    ids = ours("a<think>b</s>c[PAD7]", add_special_tokens=False)["input_ids"]
    assert tokens.index("<think>") in ids and tokens.index("</s>") in ids
    assert tokens.index("[PAD7]") not in ids  # it is not used
    assert "<think>" in ours.decode(ids, skip_special_tokens=True)
    assert "</s>" not in ours.decode(ids, skip_special_tokens=True)
    assert (ours.add_bos_token, ours.add_eos_token) == (bos, eos)
    whole = ours("x")["input_ids"]
    assert (whole[0] == 1, whole[-1] == 2) == (bos, eos)


@pytest.mark.interop
def test_qwen_s_own_class(tmp_path):
    """Its text is composed first, which transformers' reader of these files is not."""
    from transformers import Qwen2Tokenizer

    tokens, _, merges, _ = trained("gpt2")
    path = write(tmp_path, pre="qwen2", add_bos_token=False)
    theirs = Qwen2Tokenizer(
        {token: i for i, token in enumerate(tokens)},
        [tuple(merge.split(" ")) for merge in merges],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
    )
    theirs.add_tokens(["<think>", "</think>", "<tool_call>"])
    assert_same(models.tokenizer(path), theirs)
    one, other = (models.tokenizer(path)(x)["input_ids"] for x in ("é", "e\u0301"))
    assert one == other
    plain = models.tokenizer(write(tmp_path, pre="deepseek-r1-qwen"))
    assert plain("e\u0301")["input_ids"] != other


@pytest.mark.interop
@pytest.mark.parametrize("prefix", [True, False])
def test_the_space_in_front(tmp_path, prefix):
    """transformers' reader drops the field; its class has it."""
    from transformers import LlamaTokenizer

    path = write(tmp_path, "llama", add_space_prefix=prefix, add_bos_token=True)
    ours = models.tokenizer(path)
    inner = json.loads(ours.backend_tokenizer.to_str())["model"]
    theirs = LlamaTokenizer(
        inner["vocab"],
        [tuple(pair) for pair in inner["merges"]],
        add_prefix_space=prefix,
        add_bos_token=True,
        pad_token=None,
    )
    theirs.add_tokens(["<think>", "</think>", "<tool_call>"])
    assert_same(ours, theirs)
    first = ours.convert_ids_to_tokens(ours("The")["input_ids"])[1]
    assert first.startswith("▁") == prefix


def test_where_no_field_says_how_a_text_begins(tmp_path):
    """Llama's begin with bos, those of GPT-2 and Qwen do not; an explicit no holds."""
    for kind, pre, begins in (
        ("llama", "default", True),
        ("gpt2", "llama-bpe", True),
        ("gpt2", "qwen2", False),
        ("gpt2", "smollm", False),
    ):
        ids = models.tokenizer(write(tmp_path, kind, pre))("x")["input_ids"]
        assert (ids[0] == 1) == begins, pre
        path = write(tmp_path, kind, pre, add_bos_token=False)
        assert models.tokenizer(path)("x")["input_ids"][0] != 1


def test_words_that_no_merge_reaches(tmp_path):
    """Llama 3 has tokens that merges would not find; its words are looked up first."""
    tokens, types, _, _ = trained("gpt2")
    tokens = [*tokens, "qzqzqz"]
    own = {"tokens": tokens, "token_type": [*types, NORMAL], "add_bos_token": False}
    ids = models.tokenizer(write(tmp_path, **own))("qzqzqz")["input_ids"]
    assert ids == [len(tokens) - 1]
    ids = models.tokenizer(write(tmp_path, pre="qwen2", **own))("qzqzqz")["input_ids"]
    assert len(ids) == 6


def test_control_tokens_of_any_letters(tmp_path):
    """DeepSeek's have signs that no token of bytes is written in."""
    tokens, types, _, _ = trained("gpt2")
    mark = "<｜User｜>"
    own = {"tokens": [*tokens, mark], "token_type": [*types, CONTROL]}
    ours = models.tokenizer(write(tmp_path, pre="deepseek-r1-qwen", **own))
    assert ours(f"{mark}x")["input_ids"][0] == len(tokens) == len(ours) - 1
    assert ours.decode(ours(f"{mark}x")["input_ids"]) == f"{mark}x"


def test_what_a_file_lacks(tmp_path):
    for drop, kind, own, match in (
        ("scores", "llama", {}, "no fields .'tokenizer.ggml.scores'"),
        ("merges", "gpt2", {}, "no fields .'tokenizer.ggml.merges'"),
        ("token_type", "gpt2", {}, "no fields .'tokenizer.ggml.token_type'"),
        ("eos_token_id", "gpt2", {"add_eos_token": True}, "'tokenizer.ggml.eos_tok"),
        ("pre", "gpt2", {}, "model 'gpt2' and pre-tokenizer None; known are 'llama'"),
        ("", "gpt2", {"pre": "tekken"}, "pre-tokenizer 'tekken'; known are"),
        ("", "gpt2", {"model": "t5"}, "model 't5' and"),
        ("", "gpt2", {"token_type": [9] * len(trained("gpt2")[0])}, r"of types \[9\]"),
        ("", "gpt2", {"rows": 40}, "a table of 40 embeddings"),
    ):
        with pytest.raises(ValueError, match=match):
            models.tokenizer(write(tmp_path, kind, drop=[drop], **own))
