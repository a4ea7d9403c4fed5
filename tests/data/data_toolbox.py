"""A tiny tokenizer and tiny tasks, made on the spot."""

import numpy as np

from jaxpeft import data

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(100))]


def make_tokenizer(types: bool = True, pad: bool = True):
    """A tokenizer of transformers: one id a word, [CLS] a [SEP] b [SEP]."""
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
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]" if pad else None,
        unk_token="[UNK]",
        model_input_names=names,
        model_max_length=64,
    )


def make_rows(count: int, longest: int = 50, seed: int = 0) -> list[dict]:
    """Different rows of 2 to `longest` words; the label is a class id out of three."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        words = random.integers(0, 100, random.integers(0, longest - 1))
        text = " ".join(f"w{word}" for word in (i % 100, i // 100, *words))
        rows.append({"text": text, "label": i % 3})
    return rows


def toy_task(rows: list[dict], **options):
    options = {"text": "text", "label": "label", "labels": ["a", "b", "c"]} | options
    return data.make_task("toy", {"train": rows, "validation": rows}, **options)
