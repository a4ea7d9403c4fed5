"""How a text is opened, and how it is cut into a prompt and its completion."""

import pytest
from tokenizers_toolbox import (
    KINDS,
    byte_level,
    harness,
    metaspace,
    tokenizer_of,
    unigram,
)

from jaxpeft import models

FRONT = {
    "gpt2": [],
    "roberta": [],
    "llama-first": ["<s>"],
    "llama-always-eos": ["<s>"],
    "gemma": ["<s>"],
    "llama-legacy": ["<s>"],
    "t5": [],
    "bert": ["[CLS]"],
}


def opener(tokenizer, kind):
    """Tokens of a text behind those that this kind has in front."""
    front = tokenizer.convert_tokens_to_ids(FRONT[kind])
    return lambda text: front + tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_opened_and_never_closed(kind):
    tokenizer = tokenizer_of(kind)
    front = tokenizer.convert_tokens_to_ids(FRONT[kind])
    for text in ("The capital", "a", "", " Paris"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert models.opened(tokenizer, text) == front + bare
    closes = kind in ("llama-always-eos", "t5", "bert")
    theirs = tokenizer("The capital")["input_ids"]
    assert (theirs != models.opened(tokenizer, "The capital")) == closes  # control
    # What a chat template has written begins with its token already.
    written = "".join(FRONT[kind]) + "Hello"
    assert models.opened(tokenizer, written)[: len(front) + 1].count(1) <= 1
    if front:
        assert tokenizer(written)["input_ids"][:2] == front * 2  # control


def test_several_tokens_and_an_end_token_in_front():
    opened = models.opened(metaspace("first", "<unk> <s> $A </s>"), "")
    assert opened == [0, 1]
    # OPT opens with the token that ends texts, too.
    assert models.opened(metaspace("first", "</s> $A"), "")[:1] == [2]
    assert models.opened(unigram("<s> $A </s>"), "") == [1]


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("Question: what is 2 + 2?\nAnswer:", " 4"),
    ("Answer: ", "4"),
    ("Hello world", "\nhello"),
    ("two", "  spaces"),
    ("", "Paris"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_the_cut_is_the_harness_s(kind, prompt, completion):
    tokenizer = tokenizer_of(kind)
    before, after = models.joint(tokenizer, prompt, completion)
    assert before + after == models.opened(tokenizer, prompt + completion)
    theirs = harness(opener(tokenizer, kind), prompt, completion)
    assert (before, after) == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_end_stays_in_the_prompt(kind):
    """As it does when the model is used; the one difference from the harness."""
    tokenizer = tokenizer_of(kind)
    before, after = models.joint(tokenizer, "Hello\n", "Paris")
    assert before == models.opened(tokenizer, "Hello\n")
    theirs = harness(opener(tokenizer, kind), "Hello\n", "Paris")
    assert before + after == theirs[0] + theirs[1]
    alone = models.opened(tokenizer, "Hello")
    assert before[len(alone) :] == theirs[1][: len(before) - len(alone)]


@pytest.mark.parametrize(
    ("kind", "prompt", "completion"),
    [
        ("llama-legacy", "The capital of France is", " Paris"),
        ("llama-first", "Answer:\n", "Paris"),
        ("llama-always-eos", "Answer:\n", "Paris"),
        ("t5", "Answer:\n", "Paris"),
    ],
)
def test_no_mark_of_space_is_learnt(kind, prompt, completion):
    tokenizer = tokenizer_of(kind)
    text = lambda ids: "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")
    assert text(models.joint(tokenizer, prompt, completion)[1]) == completion
    apart = tokenizer(completion, add_special_tokens=False)["input_ids"]
    assert text(apart) == f" {completion}"  # control


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The capital of Fra", "nce is Paris."), ("unha", "ppiness"), ("what i", "s")],
)
def test_a_token_across_the_border_is_the_completion_s(kind, prompt, completion):
    """Nothing is lost: all but what begins before the border is the prompt's."""
    tokenizer = tokenizer_of(kind)
    before, after = models.joint(tokenizer, prompt, completion)
    whole = models.opened(tokenizer, prompt + completion)
    assert before + after == whole
    found = tokenizer(
        prompt + completion, add_special_tokens=False, return_offsets_mapping=True
    )["offset_mapping"]
    inside = sum(end <= len(prompt) for _, end in found)
    assert len(before) == len(FRONT[kind]) + inside
    theirs = harness(opener(tokenizer, kind), prompt, completion)
    if models.opened(tokenizer, prompt) != before:  # where the harness's rule loses
        assert theirs[0] + theirs[1] != whole


def test_a_prompt_of_other_tokens_that_ends_where_one_ends():
    """Two line ends are one token at the end of a text, and two before a word."""
    tokenizer = tokenizer_of("gpt2")
    alone = models.opened(tokenizer, "undone.\n\n")
    before, after = models.joint(tokenizer, "undone.\n\n", "Hello")
    names = tokenizer.convert_ids_to_tokens
    assert names(alone)[-1] == "ĊĊ" and names(before)[-2:] == ["Ċ", "Ċ"]
    assert names(after) == ["Hello"]


def test_without_offsets():
    """A slow tokenizer: cut where the prompt alone goes another way."""
    fast = byte_level()

    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self):
            return 0

        def __call__(self, text, add_special_tokens=True):
            return fast(text, add_special_tokens=add_special_tokens)

    for prompt, completion in PAIRS:
        found = models.joint(Slow(), prompt, completion)
        assert found == models.joint(fast, prompt, completion)
    before, after = models.joint(Slow(), "unha", "ppiness")
    assert before + after == models.opened(fast, "unhappiness")
    assert len(before) == 2  # "u", "n", as "unha" alone begins
