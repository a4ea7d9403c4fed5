"""Prompts and what is behind them, in every form of task, on every kind of tokenizer.

The reference is lm-evaluation-harness's rule for a context and its continuation.
"""

import warnings

import pytest
from tokenizers_toolbox import KINDS, harness, tokenizer_of

from jaxpeft import data, models, study

SUMS = [
    {"q": "The capital of France is", "a": " Paris."},
    {"q": "Question: what is 2 + 2?\nAnswer:", "a": " 4"},
    {"q": "Hello world", "a": ", hello"},
]
CHOICES = [
    {"q": "The capital of France is", "c": [" Paris", " happiness"], "a": 0},
    {"q": "Hello", "c": [" world", " there, hello", " 4"], "a": 1},
]


def ready(kind):
    """A tokenizer, with an end and a padding token, and what opens its texts."""
    tokenizer = tokenizer_of(kind)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    tokenizer.pad_token = tokenizer.eos_token
    bare = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer("a")["input_ids"][0]
    front = [first] * (first in tokenizer.convert_tokens_to_ids(["<s>", "[CLS]"]))
    return tokenizer, lambda text: front + bare(text)


def encode(tokenizer, rows, **columns):
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, **columns)
    return data.tokenize(task, tokenizer, vocab_size=500, max_length=64)


def pairs(encoded):
    """Of every row what is read and what is learnt."""
    for begin, end in zip(encoded.offsets, encoded.offsets[1:], strict=False):
        ids, learn = encoded.ids[begin:end], encoded.learn[begin:end]
        yield ids[~learn].tolist(), ids[learn].tolist()


@pytest.mark.filterwarnings("ignore:.*prompts by themselves have other tokens")
@pytest.mark.parametrize("kind", KINDS)
def test_completions(kind):
    tokenizer, opened = ready(kind)
    found = list(pairs(encode(tokenizer, SUMS, prompt="q", completion="a")["train"]))
    for (before, after), row in zip(found, SUMS, strict=True):
        assert after.pop() == tokenizer.eos_token_id
        theirs = harness(opened, row["q"], row["a"])
        whole = opened(row["q"] + row["a"])
        assert before + after == whole
        if theirs[0] + theirs[1] == whole:  # no token spans the border
            assert (before, after) == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_choices(kind):
    """Held out and trained on: no mark of space of its own in a likelihood."""
    tokenizer, opened = ready(kind)
    columns = dict(prompt="q", choices="c", answer="a")
    encoded = encode(tokenizer, CHOICES, **columns)
    wanted = [harness(opened, row["q"], c) for row in CHOICES for c in row["c"]]
    assert list(pairs(encoded["validation"])) == wanted
    right = [wanted[0], wanted[3]]
    end = [tokenizer.eos_token_id]
    assert list(pairs(encoded["train"])) == [(a, b + end) for a, b in right]
    learnt = encoded["validation"].labels[:, 0].tolist()
    assert learnt == [len(after) for _, after in wanted]


def test_a_border_inside_a_token_is_said_once_and_counted():
    tokenizer, _ = ready("gpt2")
    rows = [{"q": "The capital of Fra", "a": "nce"}, SUMS[0], SUMS[0]]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoded = encode(tokenizer, rows, prompt="q", completion="a")
    assert [str(w.message).partition(" of them")[0] for w in said] == [
        f"toy/{split}: prompts by themselves have other tokens than before what "
        "follows them, 1"
        for split in ("train", "validation")
    ]
    assert encoded["train"].facts["borders_moved"] == 1
    before, after = next(pairs(encoded["train"]))
    names = tokenizer.convert_ids_to_tokens
    assert names(before)[-1] == "Ġof" and names(after) == ["ĠFrance", "</s>"]
    with pytest.raises(ValueError, match="row 0: the first token is of the prompt 'H'"):
        encode(tokenizer, [{"q": "H", "a": "ello"}], prompt="q", completion="a")
    with pytest.raises(ValueError, match="row 0: column 'q' has no text"):
        encode(tokenizer, [{"q": "", "a": "Hello"}], prompt="q", completion="a")


@pytest.mark.parametrize("kind", ["llama-first", "llama-always-eos", "t5", "bert"])
def test_prompts_and_labels_of_the_study(kind):
    """The label's token is the one behind the prompt, which ends in a line end."""
    tokenizer, opened = ready(kind)
    labels = ("Paris", "there")
    records = data.PromptSet(
        "toy", (), (), (data.Record("The capital", "Paris"),), labels, {}
    )
    found = study.ask(records, tokenizer, vocab_size=500, max_length=99)
    prompt = opened("The capital\n")
    assert (
        found.encoded.ids.tolist()
        == prompt
        == models.opened(tokenizer, "The capital\n")
    )
    expected = [opened("The capital\n" + label)[len(prompt)] for label in labels]
    assert found.tokens.tolist() == [expected]


def test_one_label_is_no_question():
    tokenizer, _ = ready("gpt2")
    records = data.PromptSet("toy", (), (), (data.Record("a", "b"),), ("b",), {})
    options = dict(vocab_size=500, max_length=99)
    with pytest.raises(ValueError, match="has the one label 'b', and every answer"):
        study.ask(records, tokenizer, **options)
    assert study.ask(records, tokenizer, label_tokens="none", **options).right is None
