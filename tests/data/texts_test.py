"""Writing tasks: which tokens are learnt, and that none is lost."""

import hashlib
import json

import numpy as np
import pytest

from jaxpeft import data

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "user", "assistant", "say", "\n"]
WORDS += [f"w{i}" for i in range(60)]
PAD, BOS, EOS, USER, ASSISTANT = 0, 1, 2, 4, 5
W = WORDS.index("w0")
# Every turn ends in the end token and one more token, as a line end often is.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}assistant {% generation %}{{ m['content'] }} "
    "[EOS]{% endgeneration %} say {% else %}{{ m['role'] }} {{ m['content'] }} [EOS] "
    "say {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def make_tokenizer():
    import tokenizers
    import transformers

    def make(eos="[EOS]", template=TEMPLATE):
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(
                {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"
            )
        )
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", BOS)]
        )
        names = {"bos_token": "[BOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **names,
            eos_token=eos,
            model_max_length=64,
        )
        # The tokenizer would else put a token before what the template renders whole.
        made.chat_template = template
        return made

    return make


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def encode(tokenizer, rows, *, max_length=16, split="validation", **columns):
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, **columns)
    found = data.tokenize(task, tokenizer, vocab_size=len(WORDS), max_length=max_length)
    return found[split]


def rows_of(encoded):
    """Ids and learnt flags of every row."""
    cuts = encoded.offsets[1:-1]
    pairs = zip(np.split(encoded.ids, cuts), np.split(encoded.learn, cuts), strict=True)
    return [(ids.tolist(), learn.astype(int).tolist()) for ids, learn in pairs]


def test_of_a_completion_all_is_learnt_and_of_its_prompt_nothing(tokenizer):
    rows = [{"q": words(1, 2), "a": " w3"}, {"q": b"w4", "a": ""}]
    encoded = encode(tokenizer, rows, prompt="q", completion="a")
    assert rows_of(encoded) == [
        ([BOS, W + 1, W + 2, W + 3, EOS], [0, 0, 0, 1, 1]),
        ([BOS, W + 4, EOS], [0, 0, 1]),
    ]
    assert encoded.labels.tolist() == [2, 1]
    counts = {"rows": 2, "continued": 0, "left_out": 0}
    assert encoded.facts == {**counts, "tokens": 8, "learnt_tokens": 3}


def test_what_is_too_long_is_left_out_whole_and_counted(tokenizer):
    rows = [{"q": words(*range(9)), "a": " w3"}, {"q": "w4", "a": " w5"}]
    encoded = encode(tokenizer, rows, prompt="q", completion="a", max_length=11)
    assert rows_of(encoded) == [([BOS, W + 4, W + 5, EOS], [0, 0, 1, 1])]
    assert encoded.facts["left_out"] == 1
    with pytest.raises(ValueError, match="2 of 2 rows .* `max_length` 3; .* 12 tokens"):
        encode(tokenizer, rows, prompt="q", completion="a", max_length=3)


def test_of_a_text_every_token_but_the_first_is_learnt_once(tokenizer):
    encoded = encode(tokenizer, [{"t": words(*range(7))}], text="t", max_length=4)
    assert rows_of(encoded) == [
        ([BOS, W, W + 1, W + 2], [0, 1, 1, 1]),
        ([W + 2, W + 3, W + 4, W + 5], [0, 1, 1, 1]),
        ([W + 5, W + 6, EOS], [0, 1, 1]),
    ]
    assert encoded.facts["continued"] == 1
    exact = encode(tokenizer, [{"t": words(0, 1)}], text="t", max_length=4)
    assert rows_of(exact) == [([BOS, W, W + 1, EOS], [0, 1, 1, 1])]


CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def test_of_a_chat_what_the_assistant_says_is_learnt(tokenizer):
    encoded = encode(tokenizer, [{"m": CHAT}], messages="m", max_length=32)
    ((ids, learnt),) = rows_of(encoded)
    said = [W + 3, EOS, W + 5, W + 6, EOS]
    assert [i for i, learn in zip(ids, learnt, strict=True) if learn] == said
    # transformers' own mask, by the marks in the template.
    theirs = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids, learnt) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_chat_whose_beginning_depends_on_its_end(make_tokenizer):
    template = "{{ messages | length }} " + TEMPLATE
    template = template.replace("{{ messages | length }}", "w{{ messages | length }}")
    with pytest.raises(ValueError, match="up to message 1 are not the first ones"):
        encode(make_tokenizer(template=template), [{"m": CHAT}], messages="m")


def test_packing_keeps_every_token(tokenizer):
    random = np.random.default_rng(0)
    rows = [
        {"q": words(*random.integers(0, 60, n)), "a": f" w{i % 60}"}
        for i, n in enumerate(random.integers(1, 11, 80))
    ]
    columns = {"prompt": "q", "completion": "a"}
    columns = {**columns, "max_length": 32, "split": "train"}
    single = encode(tokenizer, rows, **columns)
    packed = encode(tokenizer, rows, **columns, pack=True)
    assert packed.rows == packed.facts["sequences"] < single.rows / 3
    assert packed.lengths.max() <= 32
    assert packed.lengths.mean() > 30  # best fit leaves little room
    texts = []
    for start, end in zip(packed.offsets, packed.offsets[1:], strict=False):
        segments = packed.segments[start:end]
        assert (np.diff(segments) >= 0).all()
        for segment in range(1, segments.max() + 1):
            where = start + np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(packed.positions[where], range(len(where)))
            learnt = packed.learn[where].astype(int).tolist()
            texts.append((packed.ids[where].tolist(), learnt))
    assert sorted(texts) == sorted(rows_of(single))
    assert packed.labels.sum() == single.labels.sum() == packed.learn.sum()
    with pytest.raises(ValueError, match="toy/train, cannot be packed: .* already"):
        data.pack(packed)


def test_batches_shift_the_targets_and_never_across_texts(tokenizer):
    rows = [{"q": words(i), "a": f" w{i + 1} w{i + 2}"} for i in range(12)]
    columns = {"prompt": "q", "completion": "a"}
    packed = encode(tokenizer, rows, split="train", **columns, pack=True, max_length=11)
    stream = iter(data.batches(packed, 2, seed=0, lengths=(12,)))
    state = stream.get_state()
    batch = next(stream)
    assert {name: column.dtype.name for name, column in batch.items()} == {
        "input_ids": "int32",
        "attention_mask": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "targets": "int32",
        "target_weights": "float32",
        "label": "int32",
    }
    for row in range(2):
        ids, weights = batch["input_ids"][row], batch["target_weights"][row]
        # Two texts of five tokens: BOS q | a a EOS.
        assert batch["segment_ids"][row].tolist() == [1] * 5 + [2] * 5 + [0] * 2
        assert batch["positions"][row].tolist() == [*range(5), *range(5), 0, 0]
        assert weights.tolist() == [0, 1, 1, 1, 0] * 2 + [0, 0]
        assert batch["targets"][row][weights > 0].tolist() == [
            *ids[2:5],
            *ids[7:10],
        ]
        assert batch["label"][row] == weights.sum()
    stream.set_state(state)
    for name, column in next(stream).items():
        np.testing.assert_array_equal(column, batch[name])
    seen = [
        b["targets"][b["target_weights"] > 0]
        for b in data.batches(packed, 2, seed=0, epochs=1)
    ]
    assert sum(map(len, seen)) == packed.learn.sum() == 36


def test_scores(tokenizer):
    rows = [{"t": words(1, 2)}]
    task = data.make_text_task("toy", {"train": rows, "validation": rows}, text="t")
    outputs = np.array([[2.0, 2, 2], [4.0, 4, 1]], np.float32)
    assert data.score(task, outputs, np.array([2, 4])) == {
        "perplexity": pytest.approx(np.e),
        "token_accuracy": 0.5,
        "exact_match": 0.5,
    }
    with pytest.raises(ValueError, match="count 6 learnt tokens, `labels` 7"):
        data.score(task, outputs, np.array([2, 5]))
    with pytest.raises(ValueError, match=r"must be \[n, 3\].*got \(2, 2\)"):
        data.score(task, outputs[:, :2], np.array([2, 4]))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"t": ""}], {"text": "t"}, None),
        ([{"q": "w1"}], {"prompt": "q"}, "or `prompt` and `completion`, or"),
        ([{"q": "w1"}], {"text": "q", "metrics": ["bleu"]}, "has 'bleu'; it must name"),
        ([{"q": "w1"}], {"text": "t"}, "row 0 has no column 't'"),
        ([{"q": 5}], {"text": "q"}, "row 0: column 'q' must be text; got int 5"),
        ([{"m": CHAT[:1]}], {"messages": "m"}, "no message has the role 'assistant'"),
        ([{"m": ["hi"]}], {"messages": "m"}, "message 0 must be .*; got 'hi'"),
        (
            [{"m": [{"role": "user", "name": "me"}]}],
            {"messages": "m"},
            "message 0, of the role 'user', has no 'content'",
        ),
    ],
)
def test_bad_rows(tokenizer, rows, columns, message):
    if message is None:  # an empty text still has its two ends
        assert encode(tokenizer, rows, **columns).labels.tolist() == [1]
        return
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, rows, **columns)


def test_tokenizers_that_do_not_do(make_tokenizer):
    rows = [{"t": "w1", "m": CHAT}]
    with pytest.raises(ValueError, match="`tokenizer` has no end token"):
        encode(make_tokenizer(eos=None), rows, text="t")
    with pytest.raises(ValueError, match="`tokenizer` has no chat template"):
        encode(make_tokenizer(template=None), rows, messages="m")
    refusing = "{{ raise_exception('only two turns') }}"
    with pytest.raises(ValueError, match="row 0: .* refused it: only two turns"):
        encode(make_tokenizer(template=refusing), rows, messages="m")


def test_files(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"m": [{**CHAT[0], "content": f"w{i}"}, CHAT[1]]} for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    task = data.task({"name": "texts", "train": str(path), "messages": "m"})
    assert (task.name, task.form, task.head) == ("chats", "chat", "causal_lm")
    assert all(len(task.splits[split]) for split in ("train", "validation"))
    both = [*task.splits["train"], *task.splits["validation"]]
    assert sorted(map(str, both)) == sorted(map(str, rows))
    json.dumps(task.facts)
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="has 1 rows, too few to cut a tenth off"):
        data.tasks.texts(train=path, messages="m")


def test_tfds_rows_are_rows(monkeypatch):
    from jaxpeft.data.tasks import _texts

    read = lambda name, split, data_dir: [{"question": b"w1", "answer": b"w2"}]
    monkeypatch.setattr(_texts, "read_tfds", read)
    task = data.tasks.tfds_texts(
        "gsm8k",
        splits={"train": "train[:90%]", "validation": "train[90%:]"},
        prompt="question",
        completion="answer",
    )
    assert task.facts["splits"]["train"] == "train[:90%]"
    assert task.splits["validation"][0]["answer"] == b"w2"


def test_asdiv_is_what_it_has_always_been():
    task = data.task("asdiv", progress=False)
    sizes = {split: len(rows) for split, rows in task.splits.items()}
    assert sizes == {"train": 1854, "validation": 217, "test": 233}
    digest = hashlib.sha256(json.dumps(task.splits).encode()).hexdigest()
    assert digest[:16] == "bd44fda56d1c8b0a"
    assert task.splits["test"][1] == {
        "prompt": "A museum had ninety-eight paintings. After they got rid of some, "
        "they had ninety-five left. How many paintings did they get rid of?\nAnswer:",
        "completion": " 3 paintings",
    }
    assert task.facts["kept"] == 2304
