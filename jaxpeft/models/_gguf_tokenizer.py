"""The tokenizer inside a GGUF file, as a transformers object."""

from pathlib import Path
from typing import Any

from jaxpeft.models._gguf import GgufFile
from jaxpeft.numerics import optional

_CONTROL = 3  # the type of tokens such as <|im_start|>


def gguf_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file, a ``PreTrainedTokenizerFast``.

    Args:
      path: the file.

    Raises:
      ValueError: if its tokenizer is of a kind that is not implemented.
    """
    with optional("Tokenizers"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import AddedToken, PreTrainedTokenizerFast

    with GgufFile(path) as file:
        get = {
            name: file.field(f"tokenizer.ggml.{name}")
            for name in (
                "model",
                "pre",
                "tokens",
                "token_type",
                "merges",
                "add_bos_token",
                "bos_token_id",
                "eos_token_id",
                "unknown_token_id",
                "padding_token_id",
            )
        }
        template = file.field("tokenizer.chat_template")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutters = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        ),
    }
    if get["model"] != "gpt2" or get["pre"] not in cutters:
        raise ValueError(
            f"{path} has a tokenizer of model {get['model']!r} and pre-tokenizer "
            f"{get['pre']!r}; known are 'gpt2' with {sorted(cutters)}. Load the "
            "tokenizer from the model's Hugging Face folder."
        )
    tokens = get["tokens"]
    merges = [tuple(merge.split(" ")) for merge in get["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = cutters[get["pre"]]
    inner.decoder = decoders.ByteLevel()
    special = {
        f"{role}_token": tokens[get[f"{name}_token_id"]]
        for role, name in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
        if get[f"{name}_token_id"] is not None
    }
    if get["add_bos_token"]:
        bos = special["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, vocabulary[bos])],
        )
    inner.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, get["token_type"], strict=True)
            if kind == _CONTROL
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
